"""What `herder submit` makes of its command line, before any cluster is asked."""

from __future__ import annotations

import io
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from herder.cli.main import cli
from herder.cli.placeholders import parse_command
from herder.cli.submit import input_values, job_options, parse_environment, read_lines
from herder_shared.errors import ConfigError


def test_lines_keep_blanks_and_lose_their_ends() -> None:
    assert list(read_lines(io.BytesIO(b"a b\r\n\nlast"), "f")) == ["a b", "", "last"]


def test_line_that_is_no_text_is_named() -> None:
    with pytest.raises(ConfigError, match="f, line 2"):
        list(read_lines(io.BytesIO(b"a\n\xff\n"), "f"))


def test_each_line_of_a_file_is_a_value(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("a\nb\n")
    with input_values(None, str(tmp_path / "names"), False) as values:
        assert values is not None
        assert list(values) == ["a", "b"]


def test_two_sources_of_values_are_a_usage_error() -> None:
    with pytest.raises(click.UsageError, match="one of"), input_values("1-3", None, True):
        pass


def test_environment_is_read_at_the_first_equals_sign() -> None:
    assert parse_environment(["A=1=2", "B="]) == {"A": "1=2", "B": ""}
    assert parse_environment([]) is None
    with pytest.raises(click.BadParameter):
        parse_environment(["A"])


def test_job_is_named_after_its_command_and_only_what_was_given_is_passed() -> None:
    command = parse_command(["/usr/bin/sort", "{}"], takes_value=True)
    options = job_options({"cores": 2.0, "memory": None, "tags": (), "nodes": "a,b"}, command, detached=True)
    assert options == {"cores": 2.0, "nodes": ("a", "b"), "name": "sort", "detached": True}
    options = job_options({"resources": ("licence=0.5", "disk=2")}, command, detached=False)
    assert options == {"resources": {"licence": 0.5, "disk": 2.0}, "name": "sort", "detached": False}


@pytest.mark.parametrize(
    "arguments",
    [
        ["submit"],
        ["submit", "--", ""],
        ["submit", "--array", "5-1", "--", "true"],
        ["submit", "--each", "/no/such/file", "--", "true"],
        ["submit", "--cores", "1.5", "--", "true"],
        ["submit", "--memory", "much", "--", "true"],
        ["submit", "--env", "A", "--", "true"],
        ["submit", "--resource", "licence", "--", "true"],
        ["submit", "--resource", "=1", "--", "true"],
        ["submit", "--resource", "licence=-1", "--", "true"],
        ["submit", "--placement", "evenly", "--", "true"],
        ["submit", "--memory-max", "1GiB", "--", "true"],
    ],
)
def test_bad_command_line_has_status_2_and_one_line(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr
