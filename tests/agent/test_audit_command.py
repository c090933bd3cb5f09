"""`herder audit`: what it prints and how it exits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from herder_agent.audit_command import command


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "starts_a_thread.py").write_text(
        "from threading import Event, Thread\n"
        "def setup():\n"
        "    Thread(target=Event().wait, name='lasting', daemon=True).start()\n"
    )


@pytest.mark.slow
def test_safe_modules_are_forked_after_the_last_of_them() -> None:
    result = CliRunner().invoke(command, ["decimal", "--json"])
    assert result.exit_code == 0
    verdict = json.loads(result.stdout)
    assert verdict["fork_point"] == "import decimal"
    assert [step["step"] for step in verdict["steps"]] == ["start", "import decimal", "canary", "seal"]
    assert 0 < verdict["fork_cost_s"] < verdict["fork_s"] < verdict["fresh_s"]
    assert verdict["missing"] == []


@pytest.mark.slow
def test_thread_of_setup_is_named_with_its_cure_and_the_shallower_fork_point() -> None:
    result = CliRunner().invoke(command, ["decimal", "--setup", "starts_a_thread.setup"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "R1, unsafe: Python thread 'lasting'" in result.stdout
    assert "Cure: end it in setup" in result.stdout
    assert "Forks after 'import decimal'" in result.stdout
    assert "Each child takes these steps itself: setup" in result.stdout


@pytest.mark.slow
def test_setup_that_is_not_there_exits_with_one() -> None:
    result = CliRunner().invoke(command, ["--setup", "starts_a_thread.no_such_function"])
    assert result.exit_code == 1
    assert "no_such_function" in result.stderr


@pytest.mark.slow
def test_module_that_is_not_installed_is_named_and_the_others_are_audited() -> None:
    result = CliRunner().invoke(command, ["decimal", "no_such_module.part"], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "Missing: 'no_such_module.part' is not installed" in result.stdout
    assert "Forks after 'import decimal'" in result.stdout
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_import_that_fails_inside_a_module_is_told_in_one_line() -> None:
    Path("broken_inside.py").write_text("import no_such_module\n")
    result = CliRunner().invoke(command, ["broken_inside"])
    assert result.exit_code == 1
    assert "No module named 'no_such_module'" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_what_was_told_after_one_step_is_not_told_again() -> None:
    Path("allowed.py").write_text("import numpy\n")
    pytest.importorskip("numpy")
    result = CliRunner().invoke(command, ["numpy", "allowed", "decimal"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert result.stdout.count("OPENBLAS_NUM_THREADS=1") <= 1


def test_interpreter_that_is_not_there_is_told() -> None:
    result = CliRunner().invoke(command, ["--python", "/no/such/python"])
    assert result.exit_code == 1
    assert "cannot run '/no/such/python'" in result.stderr


def test_setup_without_a_module_is_a_usage_error() -> None:
    result = CliRunner().invoke(command, ["--setup", "function", "--python", sys.executable])
    assert result.exit_code == 2
