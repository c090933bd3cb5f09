"""The shortest way of a task and the general one come to the same, whatever the task does."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.template import driver

UNSAMPLED_S = 0.002


@pytest.fixture(scope="module")
def template() -> Iterator[driver.Template]:
    with driver.ready(preload=["random"]) as running:
        yield running


@pytest.fixture(params=[True, False], ids=["plain", "general"])
def run(request: pytest.FixtureRequest, template: driver.Template) -> Callable[..., driver.Done]:
    """Run a task which comes with its child's fork."""

    def run(function: Callable[..., Any], *args: Any, **options: Any) -> driver.Done:
        return template.done(template.hand(function, *args, plain=request.param, **options))

    return run


def test_value_output_and_exit_come_together(run: Callable[..., driver.Done]) -> None:
    def work(number: int) -> tuple[int, int]:
        import sys

        print("to stdout")
        print("to stderr", file=sys.stderr)
        return number + 1, os.getpid()

    done = run(work, 4)
    assert done.value == (5, done.pid)
    assert (done.status, done.out, done.err) == (0, "to stdout\n", "to stderr\n")
    assert done.answer is not None
    assert done.answer["wall"] > 0


def test_processor_time_and_faults_are_the_tasks_own(run: Callable[..., driver.Done]) -> None:
    def work() -> int:
        import time

        ends = time.process_time() + 0.005
        pages = bytearray(100 * 4096)
        while time.process_time() < ends:
            pass
        return len(pages)

    answer = run(work).answer
    assert answer is not None
    assert 0.004 < answer["utime"] + answer["stime"] <= answer["wall"] + 0.01
    assert answer["minflt"] >= 100
    assert answer["wall"] > UNSAMPLED_S
    assert answer["peak"] < 1 << 24, "its own memory, and not what it shares with its template"


def test_memory_that_a_task_has_when_it_ends_is_told(template: driver.Template) -> None:
    def work() -> None:
        import time

        globals()["kept"] = b"x" * (30 << 20)
        time.sleep(2 * UNSAMPLED_S)

    for plain in (True, False):
        number = template.hand(work, plain=plain)
        done = template.done(number)
        assert done.answer is not None
        # Of one that has grown old, on a slow machine, the agent looks itself.
        assert done.was_introduced or 30 << 20 <= done.answer["peak"] < 40 << 20


def test_exception_is_answered_as_itself(run: Callable[..., driver.Done]) -> None:
    def work() -> None:
        raise KeyError("missing")

    done = run(work, retry_on=(ValueError,))
    assert isinstance(done.value, KeyError)
    assert done.answer is not None
    assert (done.answer["cause"], done.answer["retryable"]) == ("exception", False)
    assert "in work" in done.answer["traceback"]
    again = run(work, retry_on=(KeyError,)).answer
    assert again is not None
    assert again["retryable"]


@pytest.mark.parametrize("part", ["raw_function", "raw_args"])
def test_what_cannot_be_unpickled_is_said(run: Callable[..., driver.Done], part: str) -> None:
    done = run(lambda: None, **{part: b"no pickle"})
    assert done.answer is not None
    assert (done.answer["t"], done.answer["cause"], done.status) == ("error", "cannot_unpickle", 0)
    assert ("function" if part == "raw_function" else "arguments") in done.answer["message"]


def test_result_that_does_not_pickle_is_said(run: Callable[..., driver.Done]) -> None:
    def work() -> object:
        import threading

        return threading.Lock()

    answer = run(work).answer
    assert answer is not None
    assert (answer["t"], answer["cause"]) == ("error", "not_serializable")


def test_value_that_only_cloudpickle_can_send_arrives(run: Callable[..., driver.Done]) -> None:
    assert run(lambda: lambda: 7).value() == 7


def test_large_result_comes_as_a_memory_file(run: Callable[..., driver.Done]) -> None:
    done = run(lambda: b"x" * 100_000)
    assert done.value == b"x" * 100_000


@pytest.mark.parametrize(("code", "status"), [(0, 0), (3, 3), (None, 0), ("text", 1)])
def test_sys_exit_ends_the_process_without_an_answer(
    run: Callable[..., driver.Done], code: object, status: int
) -> None:
    def work(code: Any) -> None:
        import sys

        sys.exit(code)

    done = run(work, code)
    assert (done.answer, os.waitstatus_to_exitcode(done.status)) == (None, status)
    assert done.err == ("text\n" if code == "text" else "")


def test_crash_is_told_by_its_status(run: Callable[..., driver.Done]) -> None:
    def work() -> None:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)

    done = run(work)
    assert (done.answer, done.out, os.waitstatus_to_exitcode(done.status)) == (None, "last words\n", -signal.SIGSEGV)


def test_copy_of_the_process_that_the_task_made_gives_no_answer(run: Callable[..., driver.Done]) -> None:
    def work() -> str:
        if os.fork() == 0:
            return "copy"
        os.wait()
        return "task"

    assert run(work).value == "task"


def test_exit_handlers_and_threads_end_as_at_the_end_of_a_program(run: Callable[..., driver.Done]) -> None:
    def work() -> None:
        import atexit
        import threading

        atexit.register(print, "handler")
        threading.Timer(0.001, print, ["thread"]).start()

    done = run(work)
    assert (done.status, done.out) == (0, "thread\nhandler\n")


def test_what_c_has_in_its_buffers_is_written(run: Callable[..., driver.Done]) -> None:
    def work() -> None:
        import ctypes

        ctypes.CDLL(None).printf(b"from C\n")

    assert run(work).out == "from C\n"


def test_task_knows_itself_and_its_folder_is_removed(run: Callable[..., driver.Done], tmp_path: Path) -> None:
    def work() -> tuple[Any, ...]:
        import herder

        task = herder.task()
        with open(f"{task.scratch}/file", "w") as file:
            file.write("content")
        return task.id, task.attempt, task.node, os.path.isdir(task.scratch), herder.shared()

    folder = tmp_path / "scratch"
    assert run(work, scratch=str(folder)).value == ("j0b.7", 1, "here", True, None)
    assert not folder.exists()


def test_task_is_where_it_was_sent_and_marked(run: Callable[..., driver.Done]) -> None:
    def work() -> tuple[Any, ...]:
        import subprocess

        told = subprocess.run(["printenv", "HERDER_ATTEMPT"], capture_output=True, text=True, check=True).stdout.strip()
        return os.sched_getaffinity(0), os.environ["HERDER_ATTEMPT"], told, os.getsid(0) == os.getpid()

    cpu = max(os.sched_getaffinity(0))
    cpus, mark, told, leads = run(work, cpus=[cpu]).value
    assert (cpus, leads) == ({cpu}, True)
    assert mark == told
    assert mark.startswith("c1/")


def test_no_two_tasks_share_a_random_stream(run: Callable[..., driver.Done]) -> None:
    def draw() -> float:
        import random

        return random.random()

    assert len({run(draw).value for _ in range(3)}) == 3


def test_task_has_no_descriptor_but_its_own(run: Callable[..., driver.Done]) -> None:
    def work() -> list[str]:
        names = (int(name) for name in os.listdir("/proc/self/fd"))
        return sorted(
            os.readlink(f"/proc/self/fd/{fd}").partition(":")[0]
            for fd in names
            if os.path.exists(f"/proc/self/fd/{fd}")
        )

    assert [kind for kind in run(work).value if kind not in {"/dev/null", "pipe"}] in (["socket"], [])


def test_shared_value_is_there_and_a_write_is_seen_by_nobody_else() -> None:
    def setup() -> list[int]:
        return [1, 2, 3]

    def work() -> list[int]:
        import herder

        value: list[int] = herder.shared()
        value.append(4)
        return value

    with driver.ready(setup) as running:
        for _ in range(2):
            assert running.done(running.hand(work)).value == [1, 2, 3, 4]


def test_shared_outside_a_task_is_still_refused_in_an_idle_child(template: driver.Template) -> None:
    def look() -> bool:
        import sys

        return vars(sys.modules["_herder_task"])["_task"] is not None

    template.done(template.hand(lambda: None))
    child = template.fork()
    assert child.run(look)  # its own task's, and nothing of the one before
    template.drop_children()
