"""`_herder_task`, as a task sees it."""

from __future__ import annotations

import pytest

from herder_agent.template import seen


def test_outside_a_task_both_say_so() -> None:
    for call in (seen.task, seen.shared):
        with pytest.raises(RuntimeError, match="outside a task"):
            call()


def test_inside_a_task_it_is_described() -> None:
    head = {"job": "j", "index": 3, "ordinal": 2, "node": "n", "cpus": [1, 2], "gpus": [0], "scratch": "/tmp"}
    seen.share({"data": 1})
    seen.enter(head, {("j", 1): "value"})
    try:
        found = seen.task()
        assert (found.id, found.job_id, found.index) == ("j.3", "j", 3)
        assert (found.attempt, found.retries) == (2, 1)
        assert (found.node, found.cpus, found.gpus, found.scratch) == ("n", (1, 2), (0,), "/tmp")
        assert repr(found) == "<herder task j.3, attempt 2 on n>"
        assert seen.shared() == {"data": 1}
        assert seen.dependency("j", 1) == "value"
    finally:
        seen.leave()
        seen.share(None)
    with pytest.raises(RuntimeError):
        seen.task()
