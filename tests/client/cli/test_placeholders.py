"""Placeholders are GNU parallel's, and no value ever reaches a shell unquoted."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herder.cli.placeholders import expand, parse_command, parse_ranges, range_values
from herder_shared.errors import ConfigError


def filled(arguments: list[str], *values: str) -> list[list[str] | str]:
    return list(expand(parse_command(arguments, takes_value=True), values))


@pytest.mark.parametrize(
    ("placeholder", "value", "expected"),
    [
        ("{}", "data/a.tar.gz", "data/a.tar.gz"),
        ("{.}", "data/a.tar.gz", "data/a.tar"),
        ("{/}", "data/a.tar.gz", "a.tar.gz"),
        ("{//}", "data/a.tar.gz", "data"),
        ("{/.}", "data/a.tar.gz", "a.tar"),
        ("{#}", "data/a.tar.gz", "1"),
        ("{.}", "data.d/a", "data.d/a"),
        ("{//}", "a", "."),
        ("{//}", "/a", "/"),
        ("{//}", "a/b/", "a"),
        ("{/.}", "plain", "plain"),
        ("x{}y{#}z", "v", "xvy1z"),
    ],
)
def test_placeholder_is_replaced_as_gnu_parallel_does(placeholder: str, value: str, expected: str) -> None:
    assert filled(["echo", placeholder], value) == [["echo", expected]]


def test_value_is_appended_when_there_is_no_placeholder() -> None:
    assert filled(["echo", "-n"], "a b") == [["echo", "-n", "a b"]]
    assert filled(["echo -n $HOME"], "a b") == ["echo -n $HOME 'a b'"]


def test_other_braces_are_left_alone() -> None:
    assert filled(["awk", "{print $1}", "{a}", "{}"], "f") == [["awk", "{print $1}", "{a}", "f"]]


def test_plain_command_keeps_its_braces() -> None:
    assert parse_command(["awk", "{}"], takes_value=False).plain() == ["awk", "{}"]


def test_tasks_are_numbered_from_one() -> None:
    assert filled(["echo", "{#}:{}"], "a", "b") == [["echo", "1:a"], ["echo", "2:b"]]


def test_value_that_looks_like_a_placeholder_is_not_filled_again() -> None:
    assert filled(["echo", "{}"], "{#}") == [["echo", "{#}"]]


@pytest.mark.parametrize("arguments", [["echo {} | cat"], ["a;b"], ["cat < {}"], ["ls *.png"]])
def test_one_argument_with_special_characters_goes_to_the_shell(arguments: list[str]) -> None:
    assert parse_command(arguments, takes_value=True).shell


@pytest.mark.parametrize("arguments", [["true"], ["./run-{}.sh"], ["echo", "a | b"]])
def test_other_commands_are_executed_directly(arguments: list[str]) -> None:
    assert not parse_command(arguments, takes_value=True).shell


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_shell_sees_the_value_as_one_word(value: str) -> None:
    (text,) = filled(["printf %s {}"], value)
    assert isinstance(text, str)
    assert shlex.split(text) == ["printf", "%s", value]


def test_shell_runs_the_value_and_not_what_is_in_it() -> None:
    value = "$(echo bad); 'x' \"y\" `z` \\"
    (text,) = filled(["printf %s {}"], value)
    assert isinstance(text, str)
    run = subprocess.run(["/bin/sh", "-c", text], stdout=subprocess.PIPE, check=True, env=dict(os.environ))
    assert run.stdout.decode() == value


@pytest.mark.parametrize("arguments", [[], [""], ["", ""]])
def test_missing_command_is_a_config_error(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="no command"):
        parse_command(arguments, takes_value=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1-4", ["1", "2", "3", "4"]),
        ("0-99:50", ["0", "50"]),
        ("1,5,8-10", ["1", "5", "8", "9", "10"]),
        ("7", ["7"]),
        ("-2-0", ["-2", "-1", "0"]),
    ],
)
def test_ranges(text: str, expected: list[str]) -> None:
    assert list(range_values(parse_ranges(text))) == expected


@pytest.mark.parametrize("text", ["", "a", "1-", "5-1", "1-4:0", "1,,2", "1..3"])
def test_bad_range_names_itself(text: str) -> None:
    with pytest.raises(ConfigError, match="--array"):
        parse_ranges(text)


def test_too_many_tasks_are_refused_before_any_is_made() -> None:
    with pytest.raises(ConfigError, match="10,000,000"):
        parse_ranges("1-10000001")
