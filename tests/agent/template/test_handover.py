"""Setup's value reaches forked children that cannot inherit it, and fresh interpreters, whole."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from agent.template import driver
from support import interpreters

cloudpickle.register_pickle_by_value(sys.modules[__name__])

NOTHING = b"((t}t."


def _leave_thread() -> None:
    import threading

    threading.Thread(target=threading.Event().wait, name="left-behind", daemon=True).start()


def _arrays() -> Any:
    import numpy as np

    whole = np.arange(1 << 18, dtype="i8")
    fixed = np.ones(100)
    fixed.flags.writeable = False
    table = np.arange(1 << 18, dtype="f4").reshape(512, 512)
    record = np.zeros(10, dtype=[("a", "i4"), ("b", "M8[s]")])
    return {
        "pid": os.getpid(),
        "whole": whole,
        "same": whole,
        "half": whole[::2],
        "back": whole[100:50:-3],
        "turned": table.T,
        "table": table,
        "part": table[3:7, 5:9],
        "fixed": fixed,
        "spread": np.broadcast_to(np.array([1, 2, 3]), (4, 3)),
        "empty": np.zeros((0, 3)),
        "scalar": np.array(5.5),
        "record": record,
        "field": record["a"],
        "objects": np.array([whole, None, "text"], dtype=object),
    }


def _judge() -> list[Any]:
    import numpy as np

    from herder import shared

    value = shared()
    whole, table = value["whole"], value["table"]
    total = int(whole.sum())
    whole[2] = 77
    whole[100] = 99
    table[0, 1] = 88
    table[3, 5] = 66
    value["record"]["a"][1] = 4
    return [
        total == (1 << 18) * ((1 << 18) - 1) // 2,
        value["same"] is whole and value["objects"][0] is whole,
        int(value["half"][1]) == 77 and int(value["back"][0]) == 99 and len(value["back"]) == 17,
        float(value["turned"][1, 0]) == 88.0 and float(value["part"][0, 0]) == 66.0,
        np.shares_memory(value["turned"], table),
        value["turned"].flags.f_contiguous and table.flags.c_contiguous and not value["part"].flags.contiguous,
        not value["fixed"].flags.writeable and whole.flags.writeable and value["half"].flags.writeable,
        value["spread"].tolist() == [[1, 2, 3]] * 4 and value["spread"].strides[0] == 0,
        value["empty"].shape == (0, 3) and float(value["scalar"]) == 5.5 and value["scalar"].shape == (),
        int(value["field"][1]) == 4 and value["record"].dtype.names == ("a", "b"),
        all(value[name].flags.aligned for name in ("whole", "table", "part", "record")),
        whole.__array_interface__["data"][0] % 16 == 0,
    ]


@contextmanager
def _open_fresh(
    spawner: driver.Template, setup: Callable[[], Any] | None, published: driver.Template, **workload: Any
) -> Iterator[driver.Child]:
    """A fresh interpreter which got the value that `published` handed to us."""
    fds = tuple(published.values)
    child = spawner.fresh(workload.pop("python", sys.executable))
    workload = {"max_tasks_per_child": 1, "setup_name": "setup", **workload}
    head = {"t": "open", "workload": workload, "cloudpickle_path": driver.CLOUDPICKLE_PATH, "value": bool(fds)}
    child.task_socket.send(head, cloudpickle.dumps(setup) if setup else b"", fds)
    yield child


def test_value_whose_setup_is_unsafe_is_mapped_in_the_template_and_forked() -> None:
    def setup() -> Any:
        _leave_thread()
        return _arrays()

    with driver.ready(setup, preload=["decimal"]) as running:
        assert running.ready["setup_mode"] == "mapped"
        assert running.ready["setup_s"] > 0
        # Deeper than the last step that was safe: the value is there, its thread is not.
        assert running.ready["fork_point"] == "setup"
        assert "left-behind" in running.ready["reason"]
        assert running.stats()["threads"] == 1
        pids = set()
        for _ in range(2):
            child = running.fork()
            assert all(child.run(_judge)), "a write of one child is seen by no other"
            child = running.fork()
            pids.add(child.run(lambda: __import__("herder").shared()["pid"]))
        assert pids == {running.process.pid}, "setup ran once, in the first life of the template"


def test_value_that_is_unsafe_itself_is_mapped_by_each_child() -> None:
    class Pool:
        """Starts a thread wherever it is unpickled."""

        def __init__(self) -> None:
            self.pid = os.getpid()
            self.start()

        def start(self) -> None:
            import threading

            self.thread = threading.Thread(target=threading.Event().wait, daemon=True)
            self.thread.start()

        def __getstate__(self) -> int:
            return self.pid

        def __setstate__(self, pid: int) -> None:
            self.pid = pid
            self.start()

    def setup() -> Any:
        return Pool(), _arrays()

    def look() -> tuple[int, bool, int]:
        import herder

        pool, arrays = herder.shared()
        return pool.pid, pool.thread.is_alive(), int(arrays["whole"][5])

    with driver.ready(setup) as running:
        assert running.ready["fork_point"] == "start"
        assert running.ready["setup_mode"] == "mapped"
        for _ in range(2):
            assert running.fork().run(look) == (running.process.pid, True, 5)


def test_unpicklable_value_is_made_in_each_child_which_is_then_used_again() -> None:
    def setup() -> Any:
        import threading

        _leave_thread()
        return threading.Lock(), os.getpid()

    with driver.ready(setup) as running:
        assert running.ready["setup_mode"] == "per child"
        assert "lock" in running.ready["not_published"]
        assert not running.ready["value"]
        child = running.fork()
        for _ in range(3):
            assert child.run(lambda: __import__("herder").shared()[1]) == child.pid
    with driver.ready(setup, max_tasks_given=True) as running:
        child = running.fork()
        assert child.run(lambda: __import__("herder").shared()[1]) == child.pid
        assert child.exited()["status"] == 0, "who asked for one task per child gets it"


def test_publisher_runs_setup_and_fresh_interpreters_map_its_value(spawner: driver.Template) -> None:
    with driver.template() as publisher:
        ready = publisher.open(_arrays, start="fresh", publish=True, preload=["decimal"])
        assert [step["step"] for step in publisher.steps] == ["start", "import decimal", "setup"]
        assert (ready["start"], ready["setup_mode"], ready["value"]) == ("fresh", "mapped", True)
        publisher.process.wait(10)
        with _open_fresh(spawner, _arrays, publisher) as child:
            answer, _ = child.task_socket.receive()
            assert (answer["t"], answer["setup_from"]) == ("idle", "mapped")
            assert all(child.run(_judge))


def test_fresh_interpreter_whose_value_does_not_unpickle_runs_setup_itself(spawner: driver.Template) -> None:
    class Fragile:
        def __setstate__(self, state: Any) -> None:
            raise LookupError("only once")

        def __getstate__(self) -> int:
            return 1

    def setup() -> Any:
        return Fragile(), os.getpid()

    with driver.template() as publisher:
        assert publisher.open(setup, start="fresh", publish=True)["value"]
        with _open_fresh(spawner, setup, publisher) as child:
            answer, _ = child.task_socket.receive()
            assert (answer["t"], answer["setup_from"]) == ("idle", "ran")
            assert child.run(lambda: __import__("herder").shared()[1]) == child.pid


def test_failing_setup_of_a_publisher_is_told() -> None:
    def setup() -> Any:
        raise LookupError("no data here")

    with driver.template() as publisher:
        answer = publisher.open(setup, start="fresh", publish=True)
    assert (answer["t"], answer["cause"]) == ("failed", "setup_failed")
    assert "no data here" in answer["message"]


def test_published_memory_is_shared_until_it_is_written_to(spawner: driver.Template) -> None:
    def setup() -> Any:
        import numpy as np

        return np.ones(1 << 21)

    def look() -> tuple[float, int, int]:
        import herder

        array = herder.shared()
        before = _anonymous_bytes()
        total = float(array.sum())
        read = _anonymous_bytes() - before
        array[::512] = 2
        return total, read, _anonymous_bytes() - before

    def _anonymous_bytes() -> int:
        with open("/proc/self/smaps", encoding="utf-8") as lines:
            inside = total = 0
            for line in lines:
                word = line.split(None, 1)[0]
                if "-" in word and not word.endswith(":"):
                    inside = "memfd:herder-value" in line
                elif inside and word == "Anonymous:":
                    total += int(line.split()[1]) << 10
        return total

    with driver.template() as publisher:
        publisher.open(setup, start="fresh", publish=True)
        with _open_fresh(spawner, setup, publisher) as child:
            child.task_socket.receive()
            assert child.run(look) == (float(1 << 21), 0, 16 << 20)


def test_pandas_and_arrow_values_are_not_copied(spawner: driver.Template) -> None:
    def setup() -> Any:
        import numpy as np
        import pandas as pd
        import pyarrow as pa

        frame = pd.DataFrame({"a": np.arange(1 << 18), "b": np.arange(1 << 18), "c": np.arange(1 << 18) * 1.5})
        table = pa.table({"x": np.arange(1 << 18), "y": ["some text"] * (1 << 18)})
        return {"frame": frame, "column": frame["a"], "table": table, "part": table.slice(10, 1000)}

    def look() -> list[Any]:
        import numpy as np

        import herder

        value = herder.shared()
        frame, table = value["frame"], value["table"]
        with open("/proc/self/maps", encoding="utf-8") as lines:
            spans = [line.split()[0].split("-") for line in lines if "memfd:herder-value" in line]
        (low, high) = (int(text, 16) for text in spans[0])

        def is_mapped(address: int) -> bool:
            return low <= address < high

        frame.loc[0, "c"] = 9.0
        whole, part = (value[name]["x"].chunks[0].buffers()[1] for name in ("table", "part"))
        return [
            all(is_mapped(frame[name].to_numpy().__array_interface__["data"][0]) for name in "ab"),
            is_mapped(whole.address) and is_mapped(table["y"].chunks[0].buffers()[2].address),
            whole.address <= part.address < whole.address + whole.size,
            frame["c"][0] == 9.0 and int(value["column"].sum()) == (1 << 18) * ((1 << 18) - 1) // 2,
            np.shares_memory(value["column"].to_numpy(), frame["a"].to_numpy()),
            value["part"]["x"][0].as_py() == 10 and table["y"][5].as_py() == "some text",
        ]

    environment = {**driver.ONE_THREAD, "ARROW_DEFAULT_MEMORY_POOL": "system"}
    with driver.template(env=environment) as publisher:
        publisher.open(setup, start="fresh", publish=True)
        with _open_fresh(spawner, setup, publisher) as child:
            assert child.task_socket.receive()[0]["t"] == "idle"
            assert child.run(look) == [True] * 6


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_other_interpreters_map_a_value_without_herder_installed(
    version: str, tmp_path: Path, spawner: driver.Template
) -> None:
    (tmp_path / "users_module.py").write_text(
        "import os, pickle\n"
        "class Block:\n"
        "    def __init__(self, memory):\n"
        "        self.memory = memory\n"
        "    def __reduce_ex__(self, protocol):\n"
        "        return Block, (pickle.PickleBuffer(self.memory),)\n"
        "def setup():\n"
        "    memory = bytearray(b'x' * (1 << 20))\n"
        "    return Block(memory), Block(memoryview(memory)[5:10]), os.getpid()\n"
        "def look():\n"
        "    import herder\n"
        "    whole, part, pid = herder.shared()\n"
        "    whole.memory[6] = 7\n"
        "    return len(whole.memory), part.memory[1], pid\n"
    )
    python = str(interpreters.require(version))
    workload: dict[str, Any] = {"paths": [str(tmp_path)], "setup_import": "users_module:setup"}
    with driver.template(python=python) as publisher:
        ready = publisher.open(start="fresh", publish=True, **workload)
        assert ready["setup_mode"] == "mapped", ready
        with _open_fresh(spawner, None, publisher, python=python, **workload) as child:
            answer, _ = child.task_socket.receive()
            assert (answer["t"], answer["python"].partition("/")[0]) == ("idle", version)
            look = b"cusers_module\nlook\n."
            seen = child.run(len, raw_function=look, raw_args=NOTHING)
            assert seen == (1 << 20, 7, publisher.process.pid)
