"""`import herder` is light: running tasks do it in forked children."""

from __future__ import annotations

import subprocess
import sys

import pytest

import herder


def test_import_loads_nothing_heavy() -> None:
    script = (
        "import sys; before = set(sys.modules); import herder; herder.shared, herder.task\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"typing", "asyncio", "msgspec", "cloudpickle", "logging", "concurrent", "ssl", "dataclasses"}
    assert not heavy & set(loaded)


def test_every_public_name_is_there() -> None:
    for name in dir(herder):
        assert getattr(herder, name) is not None
    assert issubclass(herder.TaskTimeout, TimeoutError)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = herder.nothing_of_the_kind


def test_the_functions_for_tasks_are_not_hidden_by_modules() -> None:
    assert callable(herder.Client)
    assert callable(herder.task)
    assert callable(herder.shared)
    assert callable(herder.task_options)
