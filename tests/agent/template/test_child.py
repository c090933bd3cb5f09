"""A forked child: what it inherits, what it does not, and how it ends."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import time

import pytest

from agent.template import driver


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

        print("to stdout")
        print("to stderr", file=sys.stderr)
        os.write(1, b"raw\n")
        return os.readlink("/proc/self/fd/0")

    child = bare.fork()
    assert child.run(talk) == "/dev/null"
    assert child.output() == ("to stdout\nraw\n", "to stderr\n")


def test_all_output_is_in_its_pipes_before_the_answer(bare: driver.Template) -> None:
    def talk(fails: bool) -> None:
        atexit.register(signal.pause)
        sys.stdout.write("python's, ")
        sys.stdout.flush()
        ctypes.CDLL(None).printf(b"C's")
        sys.stderr.write("no end of line")
        if fails:
            raise ValueError

    for fails in (False, True):
        child = bare.fork()
        child.send(talk, fails)
        assert child.answer()[0]["t"] == ("error" if fails else "result")
        for fd in (child.out, child.err):
            os.set_blocking(fd, False)
        assert os.read(child.out, 100) == b"python's, C's"
        assert os.read(child.err, 100) == b"no end of line"
        bare.kill(child)
        child.exited()


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ThreadPoolExecutor", "ProcessPoolExecutor"])
def test_an_idle_executor_which_a_task_left_open_does_not_hold_up_its_end(bare: driver.Template, kind: str) -> None:
    def use() -> int:
        from concurrent import futures

        executor = getattr(futures, kind)(1)
        globals()["kept"] = executor
        value: int = executor.submit(pow, 2, 10).result()
        return value

    child = bare.fork()
    assert child.run(use) == 1024
    began = time.monotonic()
    assert child.exited()["status"] == 0
    assert time.monotonic() - began < 2.5  # its threads would be waited for for 5 s


def test_an_exit_handler_and_a_thread_of_the_task_are_waited_for(bare: driver.Template) -> None:
    def register() -> None:
        import atexit
        import threading

        atexit.register(lambda: os.write(1, b"handler\n"))
        threading.Timer(0.05, lambda: os.write(1, b"thread\n")).start()

    child = bare.fork()
    child.run(register)
    assert child.output()[0] == "thread\nhandler\n"
