"""What commands print: tables for people, JSON for programs, and nothing that a task could use against a terminal.

Names, messages and output of tasks come from anybody who may submit. Shown on a terminal, control characters in them
could move the cursor, set the title or answer queries; so whatever is shown passes `escape_controls`, and reaches
`rich` as `Text`, never as markup. Output that goes to a file or a pipe is passed on as it is.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

if TYPE_CHECKING:
    from rich.console import Console

K = TypeVar("K", bound=str)

#: Columns of a table that is not shown on a terminal, so that nothing is cut in a pipe.
WIDTH_COLUMNS_PIPE = 200


def escape_controls(text: str) -> str:
    """Replace control characters (but newline and tab) and direction overrides by their escaped form."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(character if _is_harmless(character) else _escaped(character) for character in text)


def _is_harmless(character: str) -> bool:
    return character in "\n\t" or unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr, wide when nobody looks."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDTH_COLUMNS_PIPE, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout, for people to read as well."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", empty: str = "") -> None:
    """A table on stdout. A column named `>...` is right-aligned. `empty` is said when there are no rows."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [[Text(escape_controls(cell)) for cell in row] for row in rows]
    if not cells and empty:
        click.echo(empty)
        return
    table = Table(box=box.SIMPLE_HEAD, title=Text(title) if title else None, title_justify="left", pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(Text(column.removeprefix(">")), justify="right" if right else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    console().print(table)


def say(text: str) -> None:
    """A line on stderr: progress and remarks, so that stdout holds results only."""
    click.echo(escape_controls(text), err=True)


def write_output(content: bytes, *, stderr: bool = False) -> None:
    """A task's output: escaped on a terminal, byte by byte the same elsewhere."""
    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        stream.write(escape_controls(content.decode("utf-8", "backslashreplace").replace("\r\n", "\n")))
        stream.flush()
    else:
        click.echo(content, nl=False, err=stderr)


def format_duration(seconds: float | None) -> str:
    """Short, for people: `0.8 ms`, `12.3 s`, `4 min 05 s`, `3 h 12 min`, `2 d 03 h`."""
    if seconds is None:
        return "-"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.2g} ms" if seconds < 0.00995 else f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02} h"


def format_bytes(size_bytes: int) -> str:
    """Binary units, three digits: `512 B`, `3.7 GiB`."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_share(part: float, whole: float) -> str:
    """A percentage, or a dash when there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole > 0 else "-"


def counted(counts: Mapping[K, int]) -> str:
    """`3 ready, 1 lost`: what there is none of is left out."""
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "none"
