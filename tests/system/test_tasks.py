"""What tasks are given, what they may do, and what comes back: a real cluster, from one end to the other."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import os
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import herder
from support.leaks import wait_until

# The nodes cannot import the tests' modules, which lean on pytest's path: their functions travel by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [pytest.mark.slow, pytest.mark.module_state]

WAIT_S = 30


@pytest.fixture(scope="module")
def cluster() -> Iterator[herder.LocalCluster]:
    with herder.LocalCluster(cores=4, agents=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: herder.LocalCluster) -> Iterator[herder.Client]:
    with cluster.client() as client:
        yield client


# --- what goes there -------------------------------------------------------------------------------------------------


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Holder:
    number: int
    inner: Any = None


def give_keywords(**keywords: Any) -> dict[str, Any]:
    return keywords


def test_every_keyword_goes_to_the_function(client: herder.Client) -> None:
    given = {"fn": 1, "self": 2, "cores": 9, "timeout": 0, "retries": 3, "name": "x", "workload": None, "args": 4}
    assert client.options(cores=2).submit(give_keywords, **given).result(WAIT_S) == given


def test_futures_are_found_in_dataclasses_containers_and_closures(client: herder.Client) -> None:
    one: Any = client.submit(int, 5)
    assert client.submit(lambda held: (held.number, held.inner), Holder(1, one)).result(WAIT_S) == (1, 5)
    assert client.submit(lambda held: held, [one, {"deep": (one,)}]).result(WAIT_S) == [5, {"deep": (5,)}]
    assert client.submit(lambda: one).result(WAIT_S) == 5


def test_iterables_are_consumed_and_may_be_empty(client: herder.Client) -> None:
    assert list(client.map(pow, (n for n in (2, 3)), iter([3, 2, 1]))) == [8, 9]
    assert list(client.map(abs, [])) == []
    assert list(client.array(abs, []).results(WAIT_S)) == []


def test_singletons_come_back_as_themselves(client: herder.Client) -> None:
    assert client.submit(lambda color: color, Color.RED).result(WAIT_S) is Color.RED


SCRIPT = """
import herder, beside
class Point:
    def __init__(self, x): self.x = x
def move(point): return Point(point.x + step)
step = 1
def main():
    with herder.LocalCluster(cores=2) as cluster, cluster.client() as client:
        moved = client.submit(move, Point(1)).result(30)
        assert type(moved) is Point and moved.x == 2
        global step
        step = 10
        assert client.submit(move, moved).result(30).x == 12
        if beside is not None:
            assert type(client.submit(beside.make).result(30)) is beside.Thing
    print("fine")
if __name__ == "__main__":
    main()
"""
BESIDE = "class Thing: pass\ndef make(): return Thing()\n"
NOTEBOOK = """
import sys, types
main = types.ModuleType("__main__")
sys.modules["__main__"] = main
for cell in CELLS:
    exec(compile(cell, "<cell>", "exec"), main.__dict__)
"""


@pytest.mark.parametrize("how", ["script", "stdin", "notebook"])
def test_classes_of_main_are_the_same_on_the_way_back(how: str, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text(BESIDE)
    script = tmp_path / "script.py"
    without = SCRIPT.replace("import herder, beside", "import herder; beside = None")
    script.write_text(SCRIPT if how == "script" else NOTEBOOK.replace("CELLS", repr([without])))
    arguments, text = ([], without) if how == "stdin" else ([str(script)], None)
    ran = subprocess.run(
        [sys.executable, *arguments], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.stdout, ran.stderr) == ("fine\n", "")


# --- what comes back -------------------------------------------------------------------------------------------------


class Picky(Exception):
    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"code {code}")
        self.code, self.detail = code, detail


def fail_in_a_group() -> None:
    inner = Picky(3, detail="more")
    inner.add_note("a note")
    raise ExceptionGroup("several", [inner, KeyError("other")])


def test_exceptions_come_with_groups_attributes_and_notes(client: herder.Client) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        client.submit(fail_in_a_group).result(WAIT_S)
    picky, other = caught.value.exceptions
    assert isinstance(picky, Picky)
    assert (str(picky), picky.code, picky.detail, picky.__notes__) == ("code 3", 3, "more", ["a note"])
    assert isinstance(other, KeyError)
    assert "fail_in_a_group" in "".join(traceback.format_exception(caught.value))


def test_output_of_any_bytes_and_size_is_kept_up_to_a_limit(client: herder.Client) -> None:
    every = client.submit(lambda: os.write(1, bytes(range(256))))
    much = client.submit(lambda: sum(os.write(2, b"x" * 65536) for _ in range(100)))
    assert (every.result(WAIT_S), much.result(WAIT_S)) == (256, 100 * 65536)
    assert every.logs() == herder.TaskLogs(bytes(range(256)), b"", False)
    assert much.logs().truncated
    assert 0 < len(much.logs().stderr) < 1 << 20


def test_what_a_failed_task_used_and_wrote_is_known(client: herder.Client) -> None:
    def fail() -> None:
        print("last words")
        raise ValueError

    failed = client.submit(fail)
    assert isinstance(failed.exception(WAIT_S), ValueError)
    assert failed.logs().stdout == b"last words\n"
    assert failed.usage(WAIT_S).attempt == 1
    assert failed.usage(WAIT_S).node.startswith("local-")


def test_large_arrays_go_there_and_back(client: herder.Client) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(3_000_000.0)
    back = client.submit(lambda values: values * 2, array).result(WAIT_S)
    assert back.flags.writeable
    assert (back == array * 2).all()


# --- options ---------------------------------------------------------------------------------------------------------


def fail_twice(log: str, kind: type[Exception]) -> int:
    with open(log, "a+") as file:
        file.write("x")
        file.seek(0)
        runs = len(file.read())
    if runs < 3:
        raise kind(runs)
    return int(herder.task().attempt)


def test_retries_are_for_the_named_exceptions_and_after_a_pause(client: herder.Client, tmp_path: Path) -> None:
    view = client.options(retries=3, retry_on=(OSError,), backoff=0.1)
    began_s = time.monotonic()
    assert view.submit(fail_twice, str(tmp_path / "a"), ConnectionError).result(WAIT_S) == 3
    assert time.monotonic() - began_s >= 0.1
    assert isinstance(view.submit(fail_twice, str(tmp_path / "b"), KeyError).exception(WAIT_S), KeyError)
    assert (tmp_path / "b").read_text() == "x"


def test_timeout_counts_for_each_attempt(client: herder.Client, tmp_path: Path) -> None:
    def sleep_once(log: Path) -> int:
        if not log.exists():
            log.touch()
            time.sleep(60)
        return int(herder.task().attempt)

    assert client.options(timeout=2, retries=1).submit(sleep_once, tmp_path / "log").result(WAIT_S) == 2


def test_seeded_attempts_draw_the_same_numbers_however_they_start(client: herder.Client, tmp_path: Path) -> None:
    def draw_and_die(log: str) -> None:
        import random

        with open(log, "a") as file:
            file.write(f"{random.random()}\n")
        if herder.task().attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    log = tmp_path / "log"
    future = client.options(seed=7).submit(draw_and_die, str(log))
    assert future.exception(WAIT_S) is None
    assert future.usage(WAIT_S).start_method == "fresh"
    first, second = log.read_text().splitlines()
    assert first == second


def test_tasks_run_on_the_nodes_asked_for(client: herder.Client) -> None:
    for name in ("local-1", "local-2"):
        futures = [client.options(nodes=[name]).submit(lambda: herder.task().node) for _ in range(3)]
        assert {future.result(WAIT_S) for future in futures} == {name}


def test_higher_priority_goes_first(client: herder.Client, tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"

    def hold() -> None:
        while not gate.exists():
            time.sleep(0.01)

    def note(word: str) -> None:
        with log.open("a") as file:
            file.write(word)

    one = client.options(nodes=["local-1"], cores=2)
    held = one.submit(hold)
    assert wait_until(held.running, WAIT_S)
    last = [one.submit(note, "b") for _ in range(4)]
    first = [client.options(nodes=["local-1"], cores=2, priority=5).submit(note, "a") for _ in range(4)]
    # One connection, in order: when this one has run, the others are known.
    assert client.options(nodes=["local-2"]).submit(int).result(WAIT_S) == 0
    gate.touch()
    for future in (*last, *first):
        future.result(WAIT_S)
    # What an agent was given already, it runs first.
    assert log.read_text().lstrip("b").startswith("aaaa")


def test_reused_child_is_put_back_as_it_was(client: herder.Client) -> None:
    def spoil() -> int:
        os.chdir("/tmp")
        os.environ["SPOILED"] = "1"
        os.umask(0o777)
        signal.alarm(50)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return os.getpid()

    def look() -> tuple[int, tuple[object, ...]]:
        mask = os.umask(0)
        os.umask(mask)
        handler = signal.getsignal(signal.SIGTERM)
        return os.getpid(), (os.getcwd(), os.environ.get("SPOILED"), mask, signal.alarm(0), handler)

    view = client.options(workload=herder.Workload(max_tasks_per_child=None), nodes=["local-1"])
    clean = view.submit(look).result(WAIT_S)[1]
    spoiled = {view.submit(spoil).result(WAIT_S) for _ in range(4)}
    seen = [view.submit(look).result(WAIT_S) for _ in range(8)]
    assert spoiled & {pid for pid, _ in seen}
    assert {state for _, state in seen} == {clean}


@pytest.mark.parametrize("start", ["fork", "fresh"])
def test_shared_arrays_are_writeable_and_each_childs_own(client: herder.Client, start: Any) -> None:
    pytest.importorskip("numpy")

    def load() -> Any:
        import numpy

        return {"values": numpy.zeros(100_000)}

    def count() -> float:
        values = herder.shared()["values"]
        values += 1
        return float(values[0])

    view = client.options(workload=herder.Workload(start=start, setup=load))
    assert [each.result(WAIT_S) for each in [view.submit(count) for _ in range(3)]] == [1.0, 1.0, 1.0]


# --- commands --------------------------------------------------------------------------------------------------------


def test_commands_get_bytes_folder_and_environment(client: herder.Client, tmp_path: Path) -> None:
    spoken = client.command('cat; pwd; printf %s "$WORD"', stdin=b"\x00in\n", cwd=tmp_path, env={"WORD": "\u00e9\n"})
    assert spoken.result(WAIT_S).stdout == b"\x00in\n" + os.fsencode(tmp_path) + "\n\u00e9\n".encode()
    assert client.command(["printf", "%s", "a b\n\u00fc"]).result(WAIT_S).text() == "a b\n\u00fc"
    assert client.command("kill -9 $$", check=False).result(WAIT_S).returncode == -9


def test_output_of_a_command_is_limited_and_says_so(client: herder.Client) -> None:
    done = client.command(["head", "-c", "17000000", "/dev/zero"]).result(WAIT_S)
    assert done.truncated
    assert len(done.stdout) == 1 << 24


# --- clients ---------------------------------------------------------------------------------------------------------


def test_gather_gives_values_or_exceptions(client: herder.Client) -> None:
    async def gather() -> list[Any]:
        return await client.gather(client.submit(int, 1), client.submit(int, "x"), return_exceptions=True)

    value, error = asyncio.run(gather())
    assert value == 1
    assert isinstance(error, ValueError)


def test_future_of_another_client_is_refused_by_name(cluster: herder.LocalCluster, client: herder.Client) -> None:
    with cluster.client() as other:
        foreign = other.submit(int)
        with pytest.raises(herder.NotSerializable, match=r"args\[0\]\[0\] \(a herder.*Future\).*another client"):
            client.submit(len, [foreign])


def test_detached_job_outlives_its_client(cluster: herder.LocalCluster, client: herder.Client) -> None:
    def think(number: int) -> int:
        time.sleep(0.5)
        return number

    with cluster.client(detached=True) as other:
        job = other.array(think, range(3)).id
    assert list(client.job(job).results(WAIT_S)) == [0, 1, 2]


def test_names_of_any_characters_are_kept(cluster: herder.LocalCluster, client: herder.Client) -> None:
    name = '-rf ../\u00fc\n\x1b[2J\0\u202e"}'
    assert client.array(abs, [1], name=name).status().name == name
    program = [sys.executable, "-m", "herder.cli", "jobs", "--all"]
    environ = {**os.environ, **cluster.environ}
    listed = subprocess.run(program, env=environ, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert not {"\x1b", "\0", "\u202e"} & set(listed.stdout), "a name breaks the table"
    assert "-rf ../\u00fc" in listed.stdout


def test_uncaught_exception_shows_where_it_was_raised_on_the_node(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import herder
            def divide(): return 1 / 0
            with herder.LocalCluster(cores=1) as cluster, cluster.client() as client:
                client.submit(divide).result()
            """
        )
    )
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 1
    assert f'File "{script}", line 3, in divide' in ran.stderr
    assert ran.stderr.endswith("ZeroDivisionError: division by zero\n")
