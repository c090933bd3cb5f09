"""`_herder_task`, as a task sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from herder_agent.template import seen


def test_outside_a_task_both_say_so() -> None:
    for call in (seen.task, seen.shared):
        with pytest.raises(RuntimeError, match="outside a task"):
            call()


def test_inside_a_task_it_is_described(tmp_path: Path) -> None:
    scratch = str(tmp_path / "scratch")
    head = {"job": "j", "index": 3, "ordinal": 2, "node": "n", "cpus": [1, 2], "gpus": [0], "scratch": scratch}
    seen.share({"data": 1})
    seen.enter(head, {("j", 1): "value"})
    try:
        found = seen.task()
        assert (found.id, found.job_id, found.index) == ("j.3", "j", 3)
        assert (found.attempt, found.retries) == (2, 1)
        assert (found.node, found.cpus, found.gpus, found.scratch) == ("n", (1, 2), (0,), scratch)
        assert repr(found) == "<herder task j.3, attempt 2 on n>"
        assert seen.shared() == {"data": 1}
        assert seen.dependency("j", 1) == "value"
    finally:
        seen.leave()
        seen.share(None)
    with pytest.raises(RuntimeError):
        seen.task()


def test_scratch_folder_that_was_there_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    found = seen.Task({"scratch": str(tmp_path)})
    assert found.scratch == str(tmp_path)
    found.clean()
    assert (tmp_path / "kept").exists()
