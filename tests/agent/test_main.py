"""The agent's command line: what is wrong is said at once, with the cure."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from herder_agent.main import command, python_tag
from herder_shared import tls
from herder_shared.ids import ClusterId


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cpus", "zero"], "no list of CPUs"),
        (["--resource", "licence=many"], "NAME=AMOUNT"),
        ([], "identity"),
        (["--identity", "/nonexistent", "--coordinator", "h:1"], "/nonexistent"),
    ],
)
def test_wrong_configuration_ends_with_status_2_and_names_the_key(tmp_path: Path, flags: list[str], said: str) -> None:
    result = CliRunner().invoke(command, ["--state-dir", str(tmp_path / "state"), *flags])
    assert result.exit_code == 2, result.output
    assert said in result.output


def test_unknown_environment_variable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERDER_AGENT_CORS", "2")
    result = CliRunner().invoke(command, ["--state-dir", str(tmp_path / "state")])
    assert result.exit_code == 2
    assert "HERDER_AGENT_CORES" in result.output


def test_memory_that_is_no_size_is_refused(tmp_path: Path) -> None:
    tls.create_authority(tmp_path / "authority", ClusterId("c" * 32))
    tls.issue(tmp_path / "authority", tmp_path / "agent", "agent", "n1")
    flags = ["--identity", str(tmp_path / "agent"), "--coordinator", "127.0.0.1:1", "--memory", "lots"]
    result = CliRunner().invoke(command, ["--state-dir", str(tmp_path / "state"), *flags])
    assert result.exit_code == 2
    assert "lots" in result.output


def test_tag_names_interpreter_and_cloudpickle() -> None:
    python, _, cloudpickle = python_tag().partition("/")
    assert python.count(".") == 1
    assert cloudpickle.count(".") == 1
