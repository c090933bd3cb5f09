"""Having Herder on a host: found, or shipped to one that has nothing but a Python."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from herder_launch import install
from herder_launch.errors import HostFailed
from herder_launch.install import ensure_installed, fingerprint, own_wheel, platform_tags
from herder_launch.place import LocalPlace
from support import interpreters


def test_the_wheel_packed_from_this_very_tree_has_all_packages_and_their_data(tmp_path: Path) -> None:
    with zipfile.ZipFile(own_wheel(tmp_path)) as wheel:
        names = set(wheel.namelist())
        record = next(name for name in names if name.endswith("/RECORD"))
        listed = {line.split(",")[0] for line in wheel.read(record).decode().splitlines()}
    assert listed == names
    assert {f"{package}/__init__.py" for package in install.PACKAGES} <= names
    assert "herder_agent/template/main.py" in names
    assert not [name for name in names if "__pycache__" in name]


def test_the_fingerprint_is_stable() -> None:
    assert fingerprint() == fingerprint()
    assert len(fingerprint()) == 24


def test_tags_cover_what_the_machine_takes_the_newest_first() -> None:
    tags = platform_tags("x86_64", "glibc 2.28")
    assert tags[0] == "manylinux_2_28_x86_64"
    assert "manylinux_2_17_x86_64" in tags
    assert "manylinux2014_x86_64" in tags
    assert platform_tags("aarch64", "")[0] == "musllinux_1_2_aarch64"


@pytest.mark.slow
def test_the_launchers_own_interpreter_is_used_where_it_exists(tmp_path: Path) -> None:
    said: list[str] = []
    found = ensure_installed(LocalPlace(), None, ("coordinator", "agent"), None, said.append)
    assert found.python == sys.executable
    assert said == []


@pytest.mark.slow
def test_a_host_without_the_named_python_is_told_so() -> None:
    with pytest.raises(HostFailed, match=r"local: no CPython 3\.11 or later \(found: /nowhere/python: not there\)"):
        ensure_installed(LocalPlace(), "/nowhere/python", ("agent",), None, lambda _: None)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_herder_is_shipped_once_to_a_python_that_has_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = str(interpreters.require("3.12"))
    monkeypatch.setenv("HERDER_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said: list[str] = []
    shipped = ensure_installed(LocalPlace(), bare, ("coordinator", "agent"), None, said.append)
    assert shipped.python == str(tmp_path / "state" / "venvs" / fingerprint() / "bin" / "python")
    assert shipped.state_dir == str(tmp_path / "state")
    assert said[0] == "collecting wheels"
    code = "import sys, herder, herder_agent, herder_coordinator, apsw, uvicorn; print(sys.version_info[:2])"
    printed = subprocess.run([shipped.python, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "(3, 12)\n"
    said.clear()
    assert ensure_installed(LocalPlace(), bare, ("coordinator", "agent"), None, said.append) == shipped
    assert said == []
