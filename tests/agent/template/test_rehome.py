"""Large blocks of setup's value lie in a sealed memory file, at their old addresses."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from agent.template import driver
from support import interpreters

cloudpickle.register_pickle_by_value(sys.modules[__name__])

MIB = 1 << 20
NOTHING = b"((t}t."


def _shared_mappings(pid: int | str) -> list[tuple[int, int, str, int]]:
    """Start, end, permissions and bytes copied for this process alone, of the mappings of the memory file."""
    found: list[tuple[int, int, str, int]] = []
    ours = False
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            word = line.split(None, 1)[0]
            if "-" in word and not word.endswith(":"):
                ours = "memfd:herder-setup" in line
                if ours:
                    start, _, end = word.partition("-")
                    found.append((int(start, 16), int(end, 16), line.split()[1], 0))
            elif ours and word == "Anonymous:":
                found[-1] = (*found[-1][:3], int(line.split()[1]) << 10)
    return found


def _arrays() -> Any:
    import numpy as np

    whole = np.arange(1 << 20, dtype="i8")
    fixed = np.ones(1 << 19)
    fixed.flags.writeable = False
    table = np.arange(1 << 20, dtype="i8").reshape(1024, 1024)
    return {"whole": whole, "same": whole, "half": whole[::2], "turned": table.T, "table": table, "fixed": fixed}


def test_arrays_are_mappings_of_a_sealed_memory_file_which_no_fork_copies() -> None:
    def look() -> tuple[list[Any], list[int]]:
        import herder

        shared = herder.shared()
        address = shared["whole"].__array_interface__["data"][0]
        before = _shared_mappings("self")
        total = int(shared["whole"].sum())
        shared["whole"][1000] = -5
        own = [copied for *_, copied in _shared_mappings("self")]
        return [address, total, int(shared["half"][500]), before], own

    with driver.ready(_arrays) as running:
        (seal,) = [step for step in running.steps if step["step"] == "seal"]
        assert any("moved into shared memory" in text for text in seal["applied"])
        assert running.ready["shared"] >= 3 * 4 * MIB - 3 * 4096
        mine = _shared_mappings(running.process.pid)
        # Private, writeable, and never written to here: a fork copies no page table of theirs.
        assert len(mine) >= 3
        assert {(permissions, copied) for _, _, permissions, copied in mine} == {("rw-p", 0)}
        for _ in range(2):
            (address, total, changed, maps), own = running.fork().run(look)
            assert (total, changed) == ((1 << 20) * ((1 << 20) - 1) // 2, -5)
            assert any(start <= address + 4096 < end for start, end, *_ in mine)
            assert [tuple(each[:3]) for each in maps] == [each[:3] for each in mine]
            assert sum(own) == 4096, "one page is the child's own"
        assert {copied for *_, copied in _shared_mappings(running.process.pid)} == {0}


def test_memory_file_cannot_be_written_to_by_any_process() -> None:
    with driver.ready(_arrays) as running:
        start, end, *_ = _shared_mappings(running.process.pid)[0]
        try:
            fd = os.open(f"/proc/{running.process.pid}/map_files/{start:x}-{end:x}", os.O_RDWR)
        except PermissionError:
            pytest.skip("/proc/PID/map_files needs a capability that this test has not")
        try:
            with pytest.raises(PermissionError):
                os.pwrite(fd, b"x", 0)
        finally:
            os.close(fd)


def test_identity_views_and_flags_are_as_they_were() -> None:
    def look() -> list[Any]:
        import numpy as np

        from herder import shared

        value = shared()
        value["whole"][2] = 77
        value["table"][0, 1] = 88
        return [
            value["same"] is value["whole"],
            value["half"].base is value["whole"],
            int(value["half"][1]),
            int(value["turned"][1, 0]),
            np.shares_memory(value["turned"], value["table"]),
            value["turned"].flags.f_contiguous,
            value["fixed"].flags.writeable,
            value["whole"].flags.writeable and value["half"].flags.writeable,
            value["whole"].flags.owndata,
        ]

    with driver.ready(_arrays) as running:
        assert running.fork().run(look) == [True, True, 77, 88, True, True, False, True, True]


def test_block_can_be_grown_shrunk_and_freed_in_a_child() -> None:
    def setup() -> Any:
        import numpy as np

        return [bytearray(b"ab" * MIB), np.arange(MIB, dtype="i4"), bytearray(b"cd" * MIB)]

    def change() -> list[Any]:
        import herder

        shared = herder.shared()
        grown, resized, dropped = shared
        grown.extend(b"x" * 3 * MIB)
        resized.resize(2 * MIB, refcheck=False)
        fine = bytes(grown) == b"ab" * MIB + b"x" * 3 * MIB and int(resized[MIB - 1]) == MIB - 1 and not resized[MIB]
        del grown[MIB // 2 :]
        dropped.clear()
        resized.resize(10, refcheck=False)
        shared.clear()
        return [fine, bytes(grown) == b"ab" * (MIB // 4), resized.tolist() == list(range(10)), len(dropped)]

    with driver.ready(setup) as running:
        assert len(_shared_mappings(running.process.pid)) >= 2
        assert [running.fork().run(change) for _ in range(2)] == [[True, True, True, 0]] * 2


def test_pandas_and_arrow_columns_are_moved_too() -> None:
    def setup() -> Any:
        import numpy as np
        import pandas as pd
        import pyarrow as pa

        frame = pd.DataFrame({"a": np.arange(1 << 19), "b": np.arange(1 << 19) * 2.0})
        return frame, pa.table({"c": pa.array(np.arange(1 << 20))}, metadata={"k": "v"})

    def look() -> tuple[float, int, int, int, int]:
        import herder

        frame, table = herder.shared()
        size = sum(end - start for start, end, *_ in _shared_mappings("self"))
        buffer = table["c"].chunks[0].buffers()[1]
        inside = sum(start <= buffer.address + MIB < end for start, end, *_ in _shared_mappings("self"))
        frame.loc[0, "a"] = 5
        return float(frame["b"].sum()), int(frame["a"][0]), table["c"][1000].as_py(), size, inside

    with driver.ready(setup, env={**driver.ONE_THREAD, "ARROW_DEFAULT_MEMORY_POOL": "system"}) as running:
        for _ in range(2):
            total, changed, cell, size, inside = running.fork().run(look)
            assert (total, changed, cell, inside) == (float((1 << 19) * ((1 << 19) - 1)), 5, 1000, 1)
            assert size >= 16 * MIB - 3 * 4096


def test_memory_that_setup_freed_is_no_reason_to_leave_blocks_where_they_are() -> None:
    def setup() -> Any:
        import numpy as np

        array = np.arange(1 << 20, dtype="i8")
        freed = [bytes(200_000) for _ in range(100)]
        last = bytes(900_000)  # so that the heap cannot shrink
        del freed
        return array, last

    with driver.ready(setup) as running:
        (seal,) = [step for step in running.steps if step["step"] == "seal"]
        assert any("moved into shared memory" in text for text in seal["applied"]), seal["applied"]


def test_untouched_memory_takes_none_in_the_file() -> None:
    def setup() -> Any:
        import numpy as np

        array = np.zeros(1 << 27)  # 1 GiB, of which one page is written to
        array[1 << 20] = 7.0
        return array

    def look() -> tuple[float, float]:
        import herder

        return float(herder.shared()[1 << 20]), float(herder.shared()[5])

    with driver.ready(setup) as running:
        assert running.ready["shared"] >= 1 << 30
        assert running.stats()["rss"] < 256 * MIB
        assert running.fork().run(look) == (7.0, 0.0)


def test_small_values_are_left_where_they_are() -> None:
    with driver.ready(lambda: bytearray(MIB // 2)) as running:
        assert not _shared_mappings(running.process.pid)
        assert running.ready["shared"] == 0


def test_blocks_stay_private_beside_a_thread_that_might_write_and_the_reason_is_told() -> None:
    def setup() -> Any:
        import threading
        import time

        def tick() -> None:
            while True:
                time.sleep(0.01)

        threading.Thread(target=tick, name="ticker", daemon=True).start()
        return bytearray(4 * MIB)

    with driver.ready(setup, allow_threads=["ticker"]) as running:
        (seal,) = [step for step in running.steps if step["step"] == "seal"]
        assert any("other threads might write" in text for text in seal["applied"])
        assert not _shared_mappings(running.process.pid)
        assert running.fork().run(lambda: 1) == 1


def test_tasks_own_arrays_come_from_the_heap_again() -> None:
    def churn() -> int:
        import ctypes

        class Info(ctypes.Structure):
            _fields_ = tuple((name, ctypes.c_size_t) for name in "abcdefghij")

        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = Info
        before = libc.mallinfo2().d
        block = bytearray(4 * MIB)
        return int(libc.mallinfo2().d - before) + len(block) - 4 * MIB

    with driver.ready(lambda: bytearray(4 * MIB)) as running:
        assert running.fork().run(churn) == 0


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_other_interpreters(version: str, tmp_path: Path) -> None:
    (tmp_path / "users_module.py").write_text(
        "import array\n"
        "def setup():\n"
        "    a = array.array('q', range(1 << 19))\n"
        "    return a, memoryview(a)[10:20]\n"
        "def look():\n"
        "    import herder\n"
        "    a, view = herder.shared()\n"
        "    a[10] = -1\n"
        "    return sum(a), view[0]\n"
    )
    python = str(interpreters.require(version))
    with driver.ready(python=python, paths=[str(tmp_path)], setup_import="users_module:setup") as running:
        assert running.ready["shared"] >= 4 * MIB - 2 * 4096
        total = (1 << 19) * ((1 << 19) - 1) // 2 - 11
        for _ in range(2):
            child = running.fork()
            assert child.run(len, raw_function=b"cusers_module\nlook\n.", raw_args=NOTHING) == (total, -1)
