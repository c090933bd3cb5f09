"""Paths, preloads and `setup`: what they give to tasks, and how their failures are told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from agent.template import driver


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
