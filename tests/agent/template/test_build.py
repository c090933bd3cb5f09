"""How a template becomes ready: its steps, and the fork point that it chooses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

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
        return threading.Lock()  # does not pickle: each child runs setup itself

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
