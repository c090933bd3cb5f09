"""How a template becomes ready: its steps, what the audit finds, and the fork point that it chooses."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.template import driver


def _steps(running: driver.Template) -> dict[str, driver.Head]:
    return {step["step"]: step for step in running.steps}


def test_steps_are_reported_one_by_one() -> None:
    with driver.ready(lambda: {"a": 1}, preload=["json.tool", "decimal"]) as running:
        steps = [step["step"] for step in running.steps]
        assert steps == ["start", "import json.tool", "import decimal", "setup", "canary", "seal"]
        assert all(step["verdict"] == "safe" for step in running.steps)
        assert all(step["rss"] > 1 << 20 and step["threads"] == 1 for step in running.steps)
        assert running.ready["fork_point"] == "setup"
        assert running.ready["pid"] == running.process.pid


def test_value_of_setup_is_shared_with_each_child() -> None:
    def setup() -> dict[str, Any]:
        return {"pid": os.getpid()}

    def look() -> Any:
        import herder

        return herder.shared()["pid"], os.getpid()

    with driver.ready(setup) as running:
        for _ in range(2):
            child = running.fork()
            assert child.run(look) == (running.process.pid, child.pid)


def test_without_setup_the_shared_value_is_none() -> None:
    def look() -> Any:
        import herder

        return herder.shared()

    with driver.ready() as running:
        assert running.fork().run(look) is None


def test_setup_by_name_is_imported() -> None:
    def look() -> Any:
        import herder

        return herder.shared()

    with driver.ready(setup_import="os:getpid") as running:
        assert running.fork().run(look) == running.process.pid


def test_shared_outside_a_task_is_an_error_that_says_so() -> None:
    def setup() -> Any:
        import herder

        return herder.shared()

    with driver.template() as running:
        answer = running.open(setup)
    assert answer["t"] == "failed"
    assert answer["cause"] == "setup_failed"
    assert "outside a task" in answer["message"]


def test_failed_preload_names_the_module() -> None:
    with driver.template() as running:
        answer = running.open(preload=["json", "no_such_module_anywhere"])
        running.process.wait(10)
    assert answer["t"] == "failed"
    assert answer["cause"] == "setup_failed"
    assert "preload of 'no_such_module_anywhere' failed" in answer["message"]
    assert "ModuleNotFoundError" in answer["traceback"]


@pytest.mark.parametrize("error", [ValueError("bad data"), SystemExit(3), KeyboardInterrupt()])
def test_failed_setup_gives_the_traceback(error: BaseException) -> None:
    def setup() -> None:
        raise error

    with driver.template() as running:
        answer = running.open(setup, setup_name="load_all")
    assert answer["cause"] == "setup_failed"
    assert "load_all" in answer["message"]
    assert type(error).__name__ in answer["message"]
    assert "in setup" in answer["traceback"]


def test_missing_working_dir_is_told() -> None:
    with driver.template() as running:
        answer = running.open(working_dir="/no/such/folder")
    assert answer["cause"] == "start_failed"
    assert "/no/such/folder" in answer["message"]


def test_modules_in_paths_and_working_dir_are_importable(tmp_path: Path) -> None:
    beside, work = tmp_path / "beside", tmp_path / "work"
    for folder, name in ((beside, "module_beside"), (work, "module_at_work")):
        folder.mkdir()
        (folder / f"{name}.py").write_text(f"WHERE = {name!r}\n")

    def look() -> Any:
        import module_at_work  # type: ignore[import-not-found]
        import module_beside  # type: ignore[import-not-found]

        return module_beside.WHERE, module_at_work.WHERE, os.getcwd()

    with driver.ready(paths=[str(beside), "/no/such/path"], working_dir=str(work)) as running:
        assert running.fork().run(look) == ("module_beside", "module_at_work", str(work))


def test_templates_folder_is_not_importable_by_tasks() -> None:
    def look() -> list[str]:
        import importlib.util

        return [name for name in ("life", "audit", "seal", "wire", "serve") if importlib.util.find_spec(name)]

    with driver.ready() as running:
        child = running.fork()
        assert child.run(look) == []
        assert str(driver.FOLDER) not in running.fork().run(lambda: sys.path)


def test_thread_left_by_setup_makes_setup_run_in_each_child() -> None:
    def setup() -> Any:
        import threading

        release = threading.Event()
        thread = threading.Thread(target=release.wait, name="left-behind", daemon=True)
        thread.start()
        return {"event": release, "thread": thread}

    def look() -> tuple[bool, int]:
        import herder

        return herder.shared()["thread"].is_alive(), os.getpid()

    with driver.ready(setup, preload=["decimal"]) as running:
        found = _steps(running)["setup"]
        assert found["verdict"] == "unsafe"
        assert found["threads"] == 2
        assert found["findings"][0]["rule"] == "R1"
        assert "left-behind" in found["findings"][0]["seen"]
        assert running.ready["fork_point"] == "import decimal"
        assert "left-behind" in running.ready["reason"]
        assert running.stats()["threads"] == 1
        for _ in range(2):
            child = running.fork()
            assert child.run(look) == (True, child.pid)


def test_failure_of_a_replayed_setup_is_the_tasks_error() -> None:
    def setup() -> Any:
        import threading

        parent = open(f"/proc/{os.getppid()}/cmdline", "rb").read()  # noqa: SIM115
        if b"template/main.py" in parent:
            raise LookupError("not in a child")
        threading.Thread(target=threading.Event().wait, daemon=True).start()

    with driver.ready(setup) as running:
        assert running.ready["fork_point"] == "start"
        child = running.fork()
        child.send(int)
        head, _ = child.answer()
        assert head["cause"] == "setup_failed"
        assert "not in a child" in head["message"]


def test_start_fork_refuses_with_finding_and_cure() -> None:
    def setup() -> Any:
        from concurrent.futures import ThreadPoolExecutor

        pool = ThreadPoolExecutor(1)
        pool.submit(int).result()
        return pool

    with driver.template() as running:
        answer = running.open(setup, start="fork")
    assert answer["t"] == "failed"
    assert answer["cause"] == "fork_unsafe"
    assert "Python thread" in answer["message"]
    assert "shutdown(wait=True)" in answer["message"]


def test_declared_threads_are_allowed() -> None:
    def setup() -> None:
        import threading

        threading.Thread(target=threading.Event().wait, name="watch-1", daemon=True).start()

    with driver.ready(setup, start="fork", allow_threads=["watch-*"]) as running:
        assert running.ready["fork_point"] == "setup"
        assert _steps(running)["setup"]["findings"][0]["verdict"] == "allowed"
        assert running.fork().run(lambda: 1) == 1


def test_unsafe_first_state_means_fresh_interpreters(tmp_path: Path) -> None:
    # A cloudpickle of the user's own that starts a thread: not even "start" is safe.
    (tmp_path / "cloudpickle.py").write_text(
        "import threading\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "__version__ = '3.1.0'\n"
    )
    with driver.template() as running:
        answer = running.open(paths=[str(tmp_path)])
        running.process.wait(10)
    assert answer["t"] == "ready"
    assert answer["start"] == "fresh"
    assert "Python thread" in answer["reason"]


def test_canary_that_dies_means_fresh_interpreters() -> None:
    def setup() -> None:
        os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), 11))

    with driver.template() as running:
        answer = running.open(setup)
    assert answer["start"] == "fresh"
    assert "signal 11" in answer["reason"]


def test_canary_that_deadlocks_is_proved_so_quickly() -> None:
    def setup() -> None:
        import threading

        lock = threading.Lock()
        lock.acquire()
        os.register_at_fork(after_in_child=lock.acquire)

    with driver.template() as running:
        answer = running.open(setup)
    assert answer["start"] == "fresh"
    assert "deadlocked" in answer["reason"]
    assert answer["start_s"] < 5


def test_open_database_connection_and_file_for_writing_make_setup_unsafe(tmp_path: Path) -> None:
    target = tmp_path / "some.db"

    def connect() -> Any:
        import sqlite3

        connection = sqlite3.connect(target)
        connection.execute("create table t (x)")
        return connection

    def write() -> Any:
        return open(tmp_path / "log", "w")

    for setup, seen in ((connect, "SQLite"), (write, "open for writing")):
        with driver.ready(setup) as running:
            found = _steps(running)["setup"]["findings"]
            assert [finding["rule"] for finding in found] == ["R6"]
            assert seen in found[0]["seen"]
            assert running.ready["fork_point"] == "start"


def test_open_connection_makes_setup_unsafe() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()

        def setup() -> Any:
            import socket

            return socket.create_connection(address)

        with driver.template() as running:
            answer = running.open(setup, start="fork")
    assert answer["cause"] == "fork_unsafe"
    assert f"a connection to 127.0.0.1:{address[1]}" in answer["message"]


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


def test_children_end_when_the_agent_is_gone() -> None:
    with driver.ready() as running:
        child = running.fork()
        running.frames.socket.shutdown(2)
        assert driver.wait_gone(child.pidfd)
        assert running.process.wait(10) == 0


def test_a_frame_that_is_none_ends_the_template() -> None:
    with driver.ready() as running:
        running.frames.socket.sendall(b"\xff" * 64)
        assert running.process.wait(10) == 0
