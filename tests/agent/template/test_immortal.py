"""Reading the objects of setup's value copies no page, and what must be freed or finalised still is."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.template import driver
from support import interpreters
from support.requirements import unmet

VERSIONS = ("3.12", "3.13")
NOTHING = b"((t}t."


@contextmanager
def holding(setup: str, version: str, **workload: Any) -> Iterator[driver.Template]:
    """A template of this interpreter whose `setup` is one of `users_objects`."""
    options: dict[str, Any] = {"paths": [str(Path(__file__).parent)], "setup_import": f"users_objects:{setup}"}
    with driver.ready(python=str(interpreters.require(version)), **options, **workload) as running:
        yield running


def ask(running: driver.Template, name: str) -> Any:
    call = f"cusers_objects\n{name}\n.".encode()
    return running.fork().run(len, raw_function=call, raw_args=NOTHING)


def having(version: str, module: str) -> None:
    python = interpreters.require(version)
    if subprocess.run([python, "-c", f"import {module}"], stderr=subprocess.DEVNULL, check=False).returncode:
        unmet(f"this test needs {module} in the CPython {version} of HERDER_TEST_PYTHON_{version.replace('.', '')}")


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_reading_all_objects_copies_next_to_no_page(version: str) -> None:
    with holding("setup", version) as running:
        assert running.ready["immortal_off"] == ""
        # Per tuple: itself, the text, the float, the dict and the list; most integers as well.
        assert 30_000 * 5 < running.ready["immortal_objects"] < 30_000 * 7
        total, faults, private_kib = ask(running, "read")
        assert any("made immortal" in applied for step in running.steps for applied in step["applied"])
    with holding("setup", version, immortal=False) as running:
        assert running.ready["immortal_objects"] == 0
        assert running.ready["immortal_off"] == "switched off by the workload"
        total_mortal, faults_mortal, private_kib_mortal = ask(running, "read")
    assert total == total_mortal
    assert faults_mortal > 1500
    assert private_kib_mortal > 6000
    # Pages of a memory file are mapped sixteen at a time when they are first read.
    assert faults < 400
    assert private_kib < 400


def test_interpreter_without_immortal_objects_says_so() -> None:
    with holding("setup_kinds", "3.11") as running:
        assert running.ready["immortal_objects"] == 0
        assert "3.11 has no immortal objects" in running.ready["immortal_off"]
        assert not any(ask(running, "kinds")["data"].values())


def test_nothing_to_be_made_immortal_needs_no_reason() -> None:
    with driver.ready() as running:
        assert (running.ready["immortal_objects"], running.ready["immortal_off"]) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_plain_data_is_immortal_and_nothing_else(version: str) -> None:
    with holding("setup_kinds", version) as running:
        found = ask(running, "kinds")
    assert {name for name, is_so in found["data"].items() if not is_so} == set()
    # A static type of the interpreter's own is immortal anyway: Point is not one.
    assert {name for name, is_so in found["other"].items() if is_so} == set()
    assert found["below"] == {"watched": True, "partial": True, "ended": False, "local": False}


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("tasks_max", [1, 0])
def test_immortal_objects_are_used_and_changed_as_any_other(version: str, tasks_max: int) -> None:
    with holding("setup_kinds", version, max_tasks_per_child=tasks_max) as running:
        for _ in range(2):  # what one child changed, the next one does not see
            assert ask(running, "live") is True


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_elements_of_object_arrays_are_immortal(version: str) -> None:
    having(version, "numpy")
    with holding("setup_arrays", version) as running:
        found, faults, total, changed = ask(running, "arrays")
    assert {name for name, is_so in found.items() if not is_so} == set()
    assert faults < 100
    assert total == sum(len(f"{i} in an array") for i in range(30_000))
    assert changed == 2


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_object_columns_of_frames_are_immortal(version: str) -> None:
    having(version, "pandas")
    with holding("setup_frame", version) as running:
        faults, _, first, changed = ask(running, "frame")
    assert faults < 100
    assert (first, changed) == ("0 in a frame", "changed")
    with holding("setup_frame", version, immortal=False) as running:
        assert ask(running, "frame")[0] > 300


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("sabotage", "reason"),
    [
        ("immortal.sys.getrefcount = lambda each: 5", "self-test failed: the reference count of None is 5"),
        ("immortal.sys.abiflags = 't'", "counts references in another way"),
        ("immortal.sys.version_info = (3, 15)", "has no immortal objects that Herder knows"),
        ("immortal.sys.maxsize = 2**31 - 1", "another shape"),
        ("", "ok"),
    ],
)
def test_unknown_interpreter_is_left_alone(version: str, sabotage: str, reason: str) -> None:
    code = f"""
import sys, types
package = sys.modules["package"] = types.ModuleType("package")
package.__path__ = [{str(driver.FOLDER)!r}]
from package import immortal
immortal.sys = types.SimpleNamespace(**vars(sys))
class Version(tuple):
    major, minor = 3, 15
{sabotage.replace("(3, 15)", "Version((3, 15))")}
print(immortal.make_immortal([object()])[1] or "ok")
"""
    done = subprocess.run(
        [interpreters.require(version), "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert reason in done.stdout, done
