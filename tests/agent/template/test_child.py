"""A forked child: what it inherits, what it does not, and how each way of ending it is told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from agent.template import driver


@pytest.fixture(scope="module")
def one_for_all() -> Iterator[driver.Template]:
    with driver.ready() as running:
        yield running


@pytest.fixture
def bare(one_for_all: driver.Template) -> Iterator[driver.Template]:
    """A template without a workload's modules, for children of one task."""
    yield one_for_all
    one_for_all.drop_children()


def test_a_task_returns_its_value_and_its_child_ends(bare: driver.Template) -> None:
    child = bare.fork()
    assert child.run(lambda a, b: a + b, 40, 2) == 42
    ended = child.exited()
    assert ended["status"] == 0
    assert ended["pid"] == child.pid


def test_started_comes_before_the_users_code_runs(bare: driver.Template) -> None:
    child = bare.fork()
    child.send(lambda: time.sleep(0.05))
    assert child.task_socket.receive()[0]["t"] == "started"
    head, _ = child.task_socket.receive()
    assert head["t"] == "result"
    assert head["wall"] >= 0.05


def test_usage_is_this_tasks_own(bare: driver.Template) -> None:
    def burn() -> None:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass

    child = bare.fork()
    child.send(burn)
    head, _ = child.answer()
    assert 0.03 <= head["utime"] + head["stime"] <= 0.5
    assert head["wall"] >= 0.04


def test_a_child_has_its_own_session_and_no_descriptor_of_others(bare: driver.Template) -> None:
    def look() -> tuple[int, int, int, list[str]]:
        return os.getpid(), os.getsid(0), os.getpgrp(), sorted(os.listdir("/proc/self/fd"))

    other = bare.fork()
    child = bare.fork()
    pid, session, group, fds = child.run(look)
    assert pid == session == group == child.pid
    # The standard streams, the task socket, and the listing's own.
    assert fds[:3] == ["0", "1", "2"]
    assert len(fds) == 5
    assert other.run(os.getpid) == other.pid


def test_stdin_is_empty_and_output_goes_to_the_childs_own_pipes(bare: driver.Template) -> None:
    def talk() -> str:
        import sys

        print("to stdout")
        print("to stderr", file=sys.stderr)
        os.write(1, b"raw\n")
        return os.readlink("/proc/self/fd/0")

    child = bare.fork()
    assert child.run(talk) == "/dev/null"
    assert child.output() == ("to stdout\nraw\n", "to stderr\n")


def test_output_before_a_crash_is_not_lost(bare: driver.Template) -> None:
    def crash() -> None:
        print("last words")
        os.kill(os.getpid(), signal.SIGSEGV)

    child = bare.fork()
    child.send(crash)
    assert child.exited()["status"] & 127 == signal.SIGSEGV
    assert child.output()[0] == "last words\n"


def test_discarded_output_reaches_no_pipe(bare: driver.Template) -> None:
    child = bare.fork()
    child.run(lambda: print("unheard"), discard=True)
    assert child.output() == ("", "")


def test_signal_handlers_are_the_defaults(bare: driver.Template) -> None:
    def handlers() -> list[bool]:
        return [
            signal.getsignal(number) == signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
        ]

    child = bare.fork()
    assert child.run(handlers) == [True, True, True]


def test_exit_status_of_os_exit_is_seen(bare: driver.Template) -> None:
    child = bare.fork()
    child.send(lambda: os._exit(3))
    assert os.waitstatus_to_exitcode(child.exited()["status"]) == 3


def test_sys_exit_in_a_task_ends_its_process_with_that_status(bare: driver.Template) -> None:
    def leave() -> None:
        raise SystemExit(5)

    child = bare.fork()
    child.send(leave)
    assert os.waitstatus_to_exitcode(child.exited()["status"]) == 5


def test_sys_exit_with_a_text_says_it_on_stderr(bare: driver.Template) -> None:
    def leave() -> None:
        raise SystemExit("no good")

    child = bare.fork()
    child.send(leave)
    assert os.waitstatus_to_exitcode(child.exited()["status"]) == 1
    assert child.output()[1] == "no good\n"


def test_an_idle_child_ends_when_told_and_when_the_agent_is_gone(bare: driver.Template) -> None:
    told, left = bare.fork(), bare.fork()
    told.task_socket.send({"t": "stop"})
    assert told.exited()["status"] == 0
    left.task_socket.socket.shutdown(2)
    assert left.exited()["status"] == 0


def test_a_copy_of_the_process_made_by_the_task_does_not_answer(bare: driver.Template) -> None:
    def copy() -> str:
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
        return "parent" if pid else "copy"

    child = bare.fork()
    assert child.run(copy) == "parent"
    with pytest.raises(EOFError):
        child.task_socket.receive()


def test_kill_reaches_descendants_in_sessions_of_their_own(bare: driver.Template) -> None:
    def daemonise() -> None:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.write(1, f"{os.getpid()}\n".encode())
                time.sleep(600)
            os._exit(0)
        time.sleep(600)

    child = bare.fork()
    child.send(daemonise)
    pid = int(os.read(child.out, 100))
    fd = os.pidfd_open(pid)
    try:
        bare.kill(child)
        assert child.exited()["status"] & 127 == signal.SIGKILL
        assert driver.wait_gone(fd)
    finally:
        os.close(fd)


def test_exited_comes_when_the_last_process_left_behind_is_gone(bare: driver.Template) -> None:
    def leave_behind() -> int:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            time.sleep(600)
        return pid

    child = bare.fork()
    pid = child.run(leave_behind)
    assert child.exited()["status"] == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_sigterm_ends_a_running_task_by_that_signal(bare: driver.Template) -> None:
    child = bare.fork()
    child.send(lambda: time.sleep(600))
    assert child.task_socket.receive()[0]["t"] == "started"
    bare.kill(child, signal.SIGTERM)
    assert child.exited()["status"] == signal.SIGTERM


def test_children_die_with_their_template() -> None:
    with driver.ready() as running:
        child = running.fork()
        child.send(lambda: time.sleep(600))
        assert child.task_socket.receive()[0]["t"] == "started"
        running.process.kill()
        assert driver.wait_gone(child.pidfd)


def test_no_child_is_left_unreaped(bare: driver.Template) -> None:
    for _ in range(3):
        child = bare.fork()
        child.run(int)
        child.exited()
    with open(f"/proc/{bare.process.pid}/task/{bare.process.pid}/children", encoding="ascii") as file:
        left = [int(word) for word in file.read().split()]
    known = {child.pid for child in bare.children.values()}
    assert [pid for pid in left if pid not in known] == []
    assert bare.stats()["threads"] == 1


def test_an_exit_handler_and_a_thread_of_the_task_are_waited_for(bare: driver.Template) -> None:
    def register() -> None:
        import atexit
        import threading

        atexit.register(lambda: os.write(1, b"handler\n"))
        threading.Timer(0.05, lambda: os.write(1, b"thread\n")).start()

    child = bare.fork()
    child.run(register)
    assert child.output()[0] == "thread\nhandler\n"


def test_limits_affinity_environment_and_scratch_are_set(bare: driver.Template) -> None:
    def look() -> Any:
        import resource

        import herder

        seen = herder.task()
        limit = resource.getrlimit(resource.RLIMIT_CORE)
        environment = os.environ["COLOUR"], os.environ["OMP_NUM_THREADS"]
        return limit, sorted(os.sched_getaffinity(0)), environment, seen.id, seen.attempt, seen.node, seen.scratch

    cpu = min(os.sched_getaffinity(0))
    options = {"limits": {"RLIMIT_CORE": [0, 0]}, "cpus": [cpu], "env": {"COLOUR": "red"}, "threads": 2}
    child = bare.fork()
    found = child.run(look, **options, scratch="/tmp", ordinal=2)
    assert found == ((0, 0), [cpu], ("red", "2"), "j0b.7", 2, "here", "/tmp")


def test_memory_limit_is_a_memory_error_of_the_task_alone(bare: driver.Template) -> None:
    child = bare.fork()
    child.send(lambda: len(bytearray(1 << 30)), limits={"RLIMIT_AS": [1 << 29, 1 << 29]})
    head, error = child.answer()
    assert head["cause"] == "exception"
    assert isinstance(error, MemoryError)


def test_large_arguments_and_results_travel_as_memory_files(bare: driver.Template) -> None:
    child = bare.fork()
    child.send(lambda content: content * 2, b"x" * 200_000, as_fds=("args",))
    head, value = child.answer()
    assert head["blob"]
    assert value == b"x" * 400_000


def test_dependencies_are_found_by_pickled_arguments(bare: driver.Template) -> None:
    import pickle

    class Reference:
        def __reduce__(self) -> Any:
            return _dependency, ("j0b", 3)

    # What the client's pickler writes: a call of _herder_task.dependency, a module that it does not have itself.
    raw = pickle.dumps(((Reference(),), {}), 0).replace(
        f"c{__name__}\n_dependency".encode(), b"c_herder_task\ndependency"
    )
    child = bare.fork()
    assert child.run(lambda value: value + 1, raw_args=raw, extra={"dep:j0b:3": pickle.dumps(41)}) == 42


def _dependency(job: str, index: int) -> None:
    """Stands in a pickle for `_herder_task.dependency`."""


def test_oom_score_is_raised_in_the_child_alone(bare: driver.Template) -> None:
    child = bare.fork()
    bare.stats()  # answered after the fork is over
    with open(f"/proc/{bare.process.pid}/oom_score_adj", encoding="ascii") as file:
        template = int(file.read())
    assert child.run(lambda: int(open("/proc/self/oom_score_adj").read())) == 500  # noqa: SIM115
    assert template == 0
