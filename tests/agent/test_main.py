"""The agent's command line: what is wrong is said at once, with the cure."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from herder_agent.main import command, end_of_node_s, python_tag
from herder_shared import tls
from herder_shared.config import AgentConfig
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


@pytest.mark.parametrize(
    ("walltime", "ends_at", "end_s"),
    [(None, None, None), ("1:00:00", None, 3700.0), (None, 5060.0, 160.0), ("30", 5060.0, 130.0)],
)
def test_the_end_of_a_node_is_on_its_own_clock(
    tmp_path: Path, walltime: str | None, ends_at: float | None, end_s: float | None
) -> None:
    config = AgentConfig(tmp_path, tmp_path, ("h:1",), walltime=walltime, ends_at=ends_at)
    assert end_of_node_s(config, now_s=100.0, wall_s=5000.0) == end_s
