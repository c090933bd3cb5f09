"""Workloads are checked when they are made, and keyed by everything but their name."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

from herder.workload import Workload, user_code_paths, workload_key
from herder_shared.errors import NotSerializable


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"start": "spawn"}, "start"),
        ({"preload": "numpy"}, "preload"),
        ({"preload": ["not a module"]}, "preload"),
        ({"setup": 3}, "setup"),
        ({"setup": "pkg.mod.fn"}, "setup"),
        ({"setup_timeout": 0}, "setup_timeout"),
        ({"max_tasks_per_child": 0}, "max_tasks_per_child"),
        ({"max_tasks_per_child": 1.5}, "max_tasks_per_child"),
        ({"warm": -1}, "warm"),
        ({"memory": "much"}, "memory"),
        ({"env": {"A=B": "c"}}, "env"),
        ({"env": {"A": 1}}, "env"),
        ({"blas_threads": 0}, "blas_threads"),
        ({"name": "x" * 300}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"python": 3.11}, "python"),
        ({"python": ""}, "python"),
        ({"working_dir": b"/tmp"}, "working_dir"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields: dict[str, Any], what: str) -> None:
    with pytest.raises((ValueError, TypeError), match=what):
        Workload(**fields)


def test_the_key_is_of_everything_but_the_name() -> None:
    one, other = Workload("a", preload=["json"]).for_wire().spec, Workload("b", preload=["json"]).for_wire().spec
    assert one.key == other.key == workload_key(one)
    assert len(one.key) == 16
    assert Workload("a", preload=["csv"]).for_wire().spec.key != one.key
    assert Workload("a", preload=["json"], env={"A": "1"}).for_wire().spec.key != one.key
    env = {"A": "1", "B": "2"}
    assert Workload(env=env).for_wire().spec.key == Workload(env=dict(reversed(env.items()))).for_wire().spec.key


def test_fields_reach_the_wire() -> None:
    spec = (
        Workload(
            "w", start="fork", setup="pkg.mod:load", max_tasks_per_child=None, memory="1GiB", working_dir=Path("/tmp")
        )
        .for_wire()
        .spec
    )
    assert (spec.name, spec.start, spec.setup_import, spec.setup) == ("w", "fork", "pkg.mod:load", None)
    assert (spec.max_tasks_per_child, spec.memory_bytes, spec.working_dir) == (0, 2**30, "/tmp")


def test_setup_travels_pickled() -> None:
    value = 5
    wire = Workload(setup=lambda: value).for_wire()
    assert wire.code_by_value
    assert wire.spec.setup is not None
    assert pickle.loads(wire.spec.setup)() == 5
    assert "lambda" in wire.spec.setup_name
    assert not Workload(setup=os.getcwd).for_wire().code_by_value
    lock = threading.Lock()
    with pytest.raises(NotSerializable, match="setup"):
        Workload(setup=lambda: lock).for_wire()


def test_command_workloads_leave_out_what_only_python_needs() -> None:
    spec = Workload(preload=["json"], setup="a:b", env={"A": "1"}, max_tasks_per_child=None).for_wire("command").spec
    assert (spec.kind, spec.preload, spec.setup_import, spec.paths, spec.max_tasks_per_child) == (
        "command",
        (),
        None,
        (),
        1,
    )
    assert spec.env == {"A": "1"}


def test_user_code_is_looked_for_in_the_current_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert user_code_paths()[-1] == str(tmp_path)


def test_relative_paths_are_taken_from_the_current_folder_and_must_be_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    workload = Workload(python=".venv/bin/python", working_dir="data")
    with pytest.raises(ValueError, match=f"no interpreter {tmp_path}/.venv/bin/python"):
        workload.for_wire()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to("/bin/sh")
    with pytest.raises(ValueError, match=f"no folder {tmp_path}/data"):
        workload.for_wire()
    (tmp_path / "data").mkdir()
    spec = workload.for_wire().spec
    assert (spec.python, spec.working_dir) == (f"{tmp_path}/.venv/bin/python", f"{tmp_path}/data")
    assert spec.key == Workload(python=Path(spec.python or ""), working_dir=tmp_path / "data").for_wire().spec.key


def test_other_paths_are_the_nodes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    for given, there in (
        ("python3.12", "python3.12"),
        ("/nowhere/python", "/nowhere/python"),
        ("~/v/bin/python", "/home/ann/v/bin/python"),
    ):
        assert Workload(python=given).for_wire().spec.python == there
