"""What a sealed template hands to its children."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from agent.template import driver


def test_file_open_for_reading_is_read_by_each_child_at_its_own_offset(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("one\ntwo\nthree\n")

    def setup() -> Any:
        file = open(path, "rb", buffering=0)  # noqa: SIM115
        file.readline()
        return file

    def read() -> bytes:
        import herder

        line: bytes = herder.shared().readline()
        return line

    with driver.ready(setup) as running:
        assert running.ready["fork_point"] == "setup"
        assert [running.fork().run(read) for _ in range(2)] == [b"two\n", b"two\n"]


def test_signal_handlers_are_the_defaults(bare: driver.Template) -> None:
    def handlers() -> list[bool]:
        return [
            signal.getsignal(number) == signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
        ]

    child = bare.fork()
    assert child.run(handlers) == [True, True, True]


def test_output_that_setup_left_unflushed_is_not_written_by_children(tmp_path: Path) -> None:
    def setup() -> None:

        sys.stdout.write("left in the buffer")

    log = tmp_path / "log"
    with driver.ready(setup, log=log) as running:
        child = running.fork()
        child.run(lambda: print("mine"))
        assert child.output()[0] == "mine\n"
    assert log.read_text() == "left in the buffer"


def test_exit_handlers_of_setup_do_not_run_in_children() -> None:
    def setup() -> None:
        import atexit

        atexit.register(os.write, 1, b"handler of the template")

    with driver.ready(setup) as running:
        child = running.fork()
        child.run(int)
        assert child.output()[0] == ""


def test_children_collect_garbage_and_leave_the_templates_alone(bare: driver.Template) -> None:
    def look() -> tuple[bool, bool]:
        import gc

        return gc.isenabled(), gc.get_freeze_count() > 1000

    assert bare.fork().run(look) == (True, True)


def test_a_file_that_only_garbage_still_held_open_is_no_matter() -> None:
    def leave_garbage() -> int:
        class Cycle:
            def __init__(self) -> None:
                self.me = self
                # More than the template itself opens afterwards, so that some of the numbers stay unused.
                self.files = [open(os.__file__, "rb") for _ in range(8)]  # noqa: SIM115

        return len(Cycle().files)

    with driver.ready(leave_garbage) as running:
        child = running.fork()
        assert child.run(os.getpid) == child.pid


def test_a_file_that_its_librarys_hook_closes_at_the_fork_is_no_matter() -> None:
    def open_and_promise() -> None:
        file = open(os.__file__, "rb")  # noqa: SIM115
        os.register_at_fork(after_in_child=file.close)

    with driver.ready(open_and_promise) as running:
        child = running.fork()
        assert child.run(os.getpid) == child.pid
