"""The canary: children that die or deadlock are found out before a task is risked, and a shallower state is tried."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from agent.template import driver
from herder_agent.template import canary
from herder_agent.template.build import LIVES_MAX

# Nobody but this process can import a test module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def _dies() -> None:
    import os

    os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), 11))


def _canaries(running: driver.Template) -> list[driver.Head]:
    return [step for step in running.steps if step["step"] == "canary"]


def test_canary_that_dies_leads_to_the_next_shallower_state() -> None:
    with driver.ready(_dies, preload=["decimal", "fractions"]) as running:
        assert running.ready["fork_point"] == "import fractions"
        assert "a child forked after 'setup' died of signal 11" in running.ready["reason"]
        assert "Each child takes these steps itself: setup" in running.ready["reason"]
        assert [step["verdict"] for step in _canaries(running)] == ["unsafe", "safe"]
        assert _canaries(running)[0]["findings"][0]["rule"] == "canary"
        assert running.fork().run(lambda: 1) == 1


def test_start_fork_is_refused_when_the_canary_dies() -> None:
    with driver.template() as running:
        answer = running.open(_dies, start="fork")
    assert answer["cause"] == "fork_unsafe"
    assert "died of signal 11" in answer["message"]


def test_canary_that_deadlocks_is_proved_so_quickly() -> None:
    def setup() -> None:
        import threading

        def wait_for_nobody() -> None:
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()

        os.register_at_fork(after_in_child=wait_for_nobody)

    with driver.ready(setup) as running:
        assert running.ready["fork_point"] == "start"
        assert "deadlocked" in running.ready["reason"]
        assert running.ready["start_s"] < 5


def test_search_for_a_state_whose_canary_lives_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(
        "import os\nos.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), 11))\n"
    )
    with driver.template() as running:
        answer = running.open(paths=[str(tmp_path)], preload=["dies", "decimal", "fractions", "colorsys", "cmd"])
        running.process.wait(10)
    assert answer["start"] == "fresh"
    assert "after 'import cmd' died of signal 11; then a child forked after 'import colorsys'" in answer["reason"]
    assert len(_canaries(running)) == LIVES_MAX


@pytest.mark.slow
def test_thread_that_was_allowed_by_mistake_is_found_out_by_the_canary() -> None:
    pytest.importorskip("polars")

    def query() -> Any:
        import polars

        return polars.DataFrame({"a": range(1000)}).group_by("a").agg(polars.len()).height

    with driver.ready(query, preload=["polars"], allow_threads=["polars*", "tokio*"]) as running:
        assert running.ready["fork_point"] == "setup", "its value is mapped"
        assert running.ready["setup_mode"] == "mapped"
        assert "a child forked after 'setup' is deadlocked" in running.ready["reason"]
        assert running.fork().run(query) == 1000


def test_cost_of_a_fork_is_measured_by_the_template() -> None:
    with driver.ready() as running:
        assert 0 < running.ready["fork_cost_s"] < 1


def test_a_process_that_sleeps_or_computes_is_not_deadlocked() -> None:
    for code in ("import time; time.sleep(600)", "while True: pass"):
        with subprocess.Popen([sys.executable, "-c", code]) as process:
            try:
                assert not any(canary.is_deadlocked(process.pid) for _ in range(5))
            finally:
                process.kill()
    assert not canary.is_deadlocked(process.pid)
