"""What is shown on a terminal cannot control it, and numbers are short."""

from __future__ import annotations

import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herder.cli.output import (
    escape_controls,
    format_bytes,
    format_duration,
    format_share,
    print_json,
    print_table,
    write_output,
)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@given(st.text())
def test_nothing_that_controls_a_terminal_is_left(text: str) -> None:
    shown = escape_controls(text)
    assert not any(ord(c) < 32 and c not in "\n\t" for c in shown)
    assert not any(0x7F <= ord(c) < 0xA0 for c in shown)
    shown.encode()


def test_escape_sequences_are_visible() -> None:
    assert escape_controls("a\x1b]0;owned\x07b") == "a\\x1b]0;owned\\x07b"
    assert escape_controls("\u202eabc") == "\\u202eabc"


def test_ordinary_text_is_unchanged() -> None:
    assert escape_controls("größe → 10 µs\n\tok") == "größe → 10 µs\n\tok"


def test_output_is_escaped_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    write_output(b"\x1b[2Jhello\xff\r\n")
    assert terminal.getvalue() == "\\x1b[2Jhello\\xff\n"


def test_output_is_unchanged_in_a_pipe(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    write_output(b"\x1b[2Jhello\xff\r\n")
    write_output(b"\x00", stderr=True)
    captured = capfdbinary.readouterr()
    assert captured.out == b"\x1b[2Jhello\xff\r\n"
    assert captured.err == b"\x00"


def test_table_shows_markup_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name",), [("[red]x[/red]",), ("\x1b[31m",)])
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out
    assert "\x1b" not in out


def test_empty_table_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name",), [], empty="no jobs")
    assert capsys.readouterr().out == "no jobs\n"


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    print_json([{"a": 1.5}])
    assert json.loads(capsys.readouterr().out) == [{"a": 1.5}]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.0012, "1.2 ms"), (0.0456, "46 ms"), (12.34, "12.3 s"), (245, "4 min 05 s"), (11520, "3 h 12 min")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (4 * 2**30, "4.0 GiB"), (2**50, "1024.0 TiB")]
)
def test_sizes(size: int, text: str) -> None:
    assert format_bytes(size) == text


def test_share_of_nothing_is_a_dash() -> None:
    assert format_share(0, 0) == "-"
    assert format_share(1, 4) == "25.0 %"
