"""Fresh interpreters."""

from __future__ import annotations

import os
import sys

import cloudpickle

from agent.template import driver


def test_fresh_interpreter_preloads_runs_setup_and_then_tasks(spawner: driver.Template) -> None:
    def setup() -> int:
        return os.getpid()

    def look() -> tuple[int, int, bool]:
        import sys

        import herder

        return herder.shared(), os.getpid(), "decimal" in sys.modules

    child = spawner.fresh()
    workload = {"preload": ["decimal"], "max_tasks_per_child": 2, "setup_name": "setup"}
    head = {"t": "open", "workload": workload, "cloudpickle_path": driver.CLOUDPICKLE_PATH}
    child.task_socket.send(head, cloudpickle.dumps(setup))
    answer, _ = child.task_socket.receive()
    assert answer["t"] == "idle"
    assert answer["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}/")
    assert child.run(look) == (child.pid, child.pid, True)
    assert child.run(look, job="other") == (child.pid, child.pid, True)
    assert child.exited()["status"] == 0


def test_fresh_interpreter_whose_setup_raises_says_failed(spawner: driver.Template) -> None:
    child = spawner.fresh()
    workload = {"preload": ["no_such_module_anywhere"]}
    child.task_socket.send({"t": "open", "workload": workload, "cloudpickle_path": driver.CLOUDPICKLE_PATH})
    answer, _ = child.task_socket.receive()
    assert (answer["t"], answer["cause"]) == ("failed", "setup_failed")
    assert child.exited()["status"] == 0
