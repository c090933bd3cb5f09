"""`herder init` makes a profile once; commands without one, or with a wrong one, say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from herder.cli.main import cli


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HERDER_PROFILES", str(tmp_path / "profiles"))
    monkeypatch.delenv("HERDER_PROFILE", raising=False)
    return tmp_path / "profiles"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def test_init_makes_a_profile_with_keys_that_only_the_owner_reads(profiles: Path) -> None:
    result = run("init", "--json")
    assert result.exit_code == 0
    made = json.loads(result.stdout)
    assert made["folder"] == str(profiles / "default")
    keys = [*profiles.rglob("*.key"), *profiles.rglob("key.pem")]
    assert keys
    assert all(key.stat().st_mode & 0o077 == 0 for key in keys)


def test_init_never_overwrites_a_profile(profiles: Path) -> None:
    assert run("init").exit_code == 0
    before = (profiles / "default" / "profile.toml").read_bytes()
    result = run("init")
    assert result.exit_code == 2
    assert "exists" in result.stderr
    assert (profiles / "default" / "profile.toml").read_bytes() == before


@pytest.mark.parametrize("arguments", [("jobs",), ("nodes", "--profile", "no-such"), ("submit", "--", "true")])
def test_command_without_its_profile_is_a_config_error(profiles: Path, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "herder init" in result.stderr


def test_run_gives_the_script_its_arguments_its_profile_and_its_exit_status(profiles: Path, tmp_path: Path) -> None:
    assert run("init", "--profile", "lab").exit_code == 0
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nprint(os.environ['HERDER_PROFILE'], sys.argv[1:])\nsys.exit(7)\n")
    program = [sys.executable, "-m", "herder.cli", "run", "--profile", "lab", str(script), "--fast", "x"]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "lab ['--fast', 'x']\n")


def test_run_of_a_script_that_does_not_exist_is_a_usage_error(profiles: Path) -> None:
    assert run("run", "/no/such/script.py").exit_code == 2
