"""Errors become one line and an exit status; help costs no imports; other components' commands are found."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import click
import pytest
from click.testing import CliRunner, Result

from herder.cli import main as cli_main
from herder.cli.main import cli, error_line, exit_status
from herder_shared import errors


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.TaskCrashed("x"), 1),
        (errors.CommandFailed("x"), 1),
        (errors.Unschedulable("x"), 1),
        (errors.ConfigError("x"), 2),
        (errors.JobNotFound("x"), 2),
        (errors.NotSerializable("x"), 2),
        (errors.Unreachable("x"), 3),
        (errors.Unauthorized("x"), 3),
        (errors.ProtocolMismatch("x"), 3),
    ],
)
def test_error_has_its_exit_status(error: errors.HerderError, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_with_failing_command(error, monkeypatch)
    assert (result.exit_code, result.stderr) == (status, "herder: x\n")
    assert exit_status(error) == status


def run_with_failing_command(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Result:
    @click.command()
    def fails() -> None:
        raise error

    monkeypatch.setattr(cli_main, "load", lambda _target: fails)
    return run("nodes")


def test_interruption_has_status_130_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_with_failing_command(KeyboardInterrupt(), monkeypatch)
    assert result.exit_code == 130
    assert result.stderr.strip() == "herder: interrupted"


def test_missing_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_with_failing_command(FileNotFoundError(2, "No such file or directory", "/no/such"), monkeypatch)
    assert (result.exit_code, result.stderr) == (2, "herder: No such file or directory: /no/such\n")


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_with_failing_command(AssertionError("bug"), monkeypatch)
    assert isinstance(result.exception, AssertionError)


def test_error_line_is_one_line_and_says_where() -> None:
    error = errors.TaskCrashed("died\nof \x1b[31m a signal", task_id="3f.1", node="n1", attempt=2)
    assert error_line(error) == "herder: died of \\x1b[31m a signal (task 3f.1, node n1, attempt 2)"
    error = errors.TaskCrashed("died (task 3f.1, attempt 2 on node n1)", task_id="3f.1", node="n1", attempt=2)
    assert error_line(error) == "herder: died (task 3f.1, attempt 2 on node n1)"


def test_help_lists_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name in (*cli_main.OWN_COMMANDS, "up", "down", "agent", "coordinator", "audit"):
        assert f"  {name} " in result.stdout


def test_help_imports_neither_rich_nor_the_client() -> None:
    program = (
        "import sys\nfrom herder.cli.main import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('rich', 'msgspec', 'asyncio', 'herder.client') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", sorted(cli_main.OWN_COMMANDS))
def test_every_own_command_loads_and_explains_itself(name: str) -> None:
    result = run(name, "--help")
    assert (result.exit_code, result.exception) == (0, None)
    assert "Usage:" in result.stdout


def test_unknown_command_names_the_nearest() -> None:
    result = run("nodse")
    assert result.exit_code == 2
    assert "'nodes'" in result.stderr


def test_unknown_option_is_a_usage_error() -> None:
    assert run("jobs", "--jsno").exit_code == 2


def test_command_of_a_component_that_is_not_installed_says_what_to_install() -> None:
    point = EntryPoint("up", "herder_launch.no_such_module:up", cli_main.ENTRY_POINT_GROUP)
    with pytest.raises(errors.ConfigError, match=r"herder\[launch\]"):
        cli_main.load_other(point)


def test_version() -> None:
    assert run("--version").stdout.startswith("herder ")
