"""A child that runs many tasks: what one leaves to the next, and what it must not."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from agent.template import driver


@pytest.fixture(scope="module")
def one_for_all() -> Iterator[driver.Template]:
    with driver.ready(max_tasks_per_child=0) as running:
        yield running


@pytest.fixture
def child(one_for_all: driver.Template) -> Iterator[driver.Child]:
    """A child for tasks without limit."""
    yield one_for_all.fork()
    one_for_all.drop_children()


def test_many_tasks_run_in_one_process(child: driver.Child) -> None:
    assert {child.run(os.getpid) for _ in range(20)} == {child.pid}


def test_a_function_is_sent_once(child: driver.Child) -> None:
    assert child.run(len, "abc", function_id="id-of-len") == 3
    assert child.run(len, "abcd", function_id="id-of-len", cached=True) == 4


def test_a_function_that_was_never_sent_is_an_infrastructure_error(child: driver.Child) -> None:
    child.send(len, "abc", function_id="unknown", cached=True)
    assert child.answer()[0]["cause"] == "start_failed"


def test_folder_environment_umask_and_handlers_are_put_back(child: driver.Child) -> None:
    def look() -> tuple[str, str | None, str | None, int, bool]:
        mask = os.umask(0)
        os.umask(mask)
        default = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        return os.getcwd(), os.environ.get("LEFT"), os.environ.get("PATH"), mask, default

    def disturb() -> None:
        os.chdir("/")
        os.environ["LEFT"] = "behind"
        del os.environ["PATH"]
        os.umask(0o777)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.alarm(1)

    before = child.run(look)
    child.run(disturb)
    assert child.run(look) == before


def test_a_deleted_working_folder_is_left(child: driver.Child) -> None:
    def lose() -> None:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)

    before = child.run(os.getcwd)
    child.run(lose)
    assert child.run(os.getcwd) == before


def test_an_exception_does_not_end_the_child(child: driver.Child) -> None:
    child.send(lambda: 1 // 0)
    assert isinstance(child.answer()[1], ZeroDivisionError)
    assert child.run(lambda: 5) == 5


def test_discarded_output_of_one_task_does_not_silence_the_next(child: driver.Child) -> None:
    child.run(lambda: print("unheard"), discard=True)
    child.run(lambda: print("heard"))
    child.task_socket.send({"t": "stop"})
    assert child.output()[0] == "heard\n"


def test_the_last_of_its_tasks_ends_a_child() -> None:
    with driver.ready(max_tasks_per_child=2) as running:
        child = running.fork()
        child.run(int)
        child.run(int)
        assert child.exited()["status"] == 0


def test_output_is_in_its_pipe_before_the_result_is_sent(child: driver.Child) -> None:
    def write() -> None:
        import sys

        sys.stdout.write("no newline")

    child.run(write)
    os.set_blocking(child.out, False)
    assert os.read(child.out, 100) == b"no newline"
