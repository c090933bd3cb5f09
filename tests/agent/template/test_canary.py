"""The canary: children that die or deadlock are found out before a task is risked."""

from __future__ import annotations

import os
import subprocess
import sys

from agent.template import driver
from herder_agent.template import canary


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


def test_a_process_that_sleeps_or_computes_is_not_deadlocked() -> None:
    for code in ("import time; time.sleep(600)", "while True: pass"):
        with subprocess.Popen([sys.executable, "-c", code]) as process:
            try:
                assert not any(canary.is_deadlocked(process.pid) for _ in range(5))
            finally:
                process.kill()
    assert not canary.is_deadlocked(process.pid)
