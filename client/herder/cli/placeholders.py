"""Placeholders in commands, as GNU parallel has them. Pure.

========  =====================================================  =====================
``{}``    the value                                              ``data/a.tar.gz``
``{.}``   without its extension                                  ``data/a.tar``
``{/}``   its last part                                          ``a.tar.gz``
``{//}``  its folder                                             ``data``
``{/.}``  its last part without extension                        ``a.tar``
``{#}``   the number of the task, from 1                         ``1``
========  =====================================================  =====================

Other braces are left alone. A command without any placeholder gets the value as its last argument.

A command of several arguments is exec'd as it is: a value never meets a shell. A command given as *one* argument that
holds a blank or a shell's special character goes to ``/bin/sh -c``, and values are quoted for it.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from herder_shared.errors import ConfigError
from herder_shared.limits import ARRAY_TASKS_MAX

_PLACEHOLDER = re.compile(r"\{(?:|\.|/|//|/\.|#)\}")
_EXTENSION = re.compile(r"\.[^/.]+$")
_SHELL_SPECIAL = re.compile(r"[\s|&;<>()$`\\\"'*?\[\]~!]")
_RANGE = re.compile(r"(-?\d+)(?:-(-?\d+)(?::(\d+))?)?")


class Command(NamedTuple):
    """A command with placeholders. With `shell`, `arguments` is the one text for `/bin/sh -c`."""

    arguments: tuple[str, ...]
    shell: bool

    def fill(self, value: str, number: int) -> list[str] | str:
        """The command of one task: a list to exec, or a text for the shell. `number` counts from 1."""
        if self.shell:
            return _fill(self.arguments[0], value, number, quote=True)
        return [_fill(argument, value, number, quote=False) for argument in self.arguments]

    def plain(self) -> list[str] | str:
        """The command as it was given, for a job of one task: braces mean nothing."""
        return self.arguments[0] if self.shell else list(self.arguments)


def parse_command(arguments: Sequence[str], *, takes_value: bool) -> Command:
    """Read what was given after `--`. With `takes_value`, a command without a placeholder gets `{}` at its end.

    Raises:
        ConfigError: there is no command.
    """
    if not arguments or not any(arguments):
        raise ConfigError("no command was given: herder submit [options] -- COMMAND [ARGUMENT...]")
    shell = len(arguments) == 1 and _SHELL_SPECIAL.search(arguments[0]) is not None
    has_placeholder = any(_PLACEHOLDER.search(argument) for argument in arguments)
    if takes_value and not has_placeholder:
        arguments = [f"{arguments[0]} {{}}"] if shell else [*arguments, "{}"]
    return Command(tuple(arguments), shell)


def expand(command: Command, values: Iterable[str]) -> Iterator[list[str] | str]:
    """The command of each task, one for each value, lazily."""
    for number, value in enumerate(values, 1):
        yield command.fill(value, number)


def parse_ranges(text: str) -> list[range]:
    """Read `1-1000`, `0-99:10` (every tenth) or `1,5,8-10`.

    Raises:
        ConfigError: it is none of these, or holds more tasks than a job may have.
    """
    ranges = [_parse_range(part.strip(), text) for part in text.split(",")]
    count = sum(map(len, ranges))
    if count > ARRAY_TASKS_MAX:
        raise ConfigError(f"--array {text}: {count:,} tasks; a job has at most {ARRAY_TASKS_MAX:,}")
    return ranges


def range_values(ranges: Iterable[range]) -> Iterator[str]:
    """The numbers of all ranges, in order, as text."""
    return map(str, itertools.chain.from_iterable(ranges))


def _parse_range(part: str, whole: str) -> range:
    found = _RANGE.fullmatch(part)
    if not found:
        raise ConfigError(f"--array {whole}: {part!r} is not a number or a range; write 1-1000, 0-99:10 or 1,5,8-10")
    first = int(found[1])
    last = first if found[2] is None else int(found[2])
    step = 1 if found[3] is None else int(found[3])
    if step < 1 or last < first:
        raise ConfigError(
            f"--array {whole}: {part!r} is empty; write the smaller number first and a step of at least 1"
        )
    return range(first, last + 1, step)


def _fill(text: str, value: str, number: int, *, quote: bool) -> str:
    def replacement(found: re.Match[str]) -> str:
        filled = _value_of(found[0], value, number)
        return shlex.quote(filled) if quote else filled

    return _PLACEHOLDER.sub(replacement, text)


def _value_of(placeholder: str, value: str, number: int) -> str:
    match placeholder:
        case "{.}":
            return _EXTENSION.sub("", value)
        case "{/}":
            return value.rpartition("/")[2]
        case "{//}":
            return _folder(value)
        case "{/.}":
            return _EXTENSION.sub("", value.rpartition("/")[2])
        case "{#}":
            return str(number)
        case _:
            return value


def _folder(value: str) -> str:
    """As dirname(1): `.` for a bare name, `/` for the root's entries."""
    trimmed = value.rstrip("/") or "/"
    folder, slash, _ = trimmed.rpartition("/")
    if not slash:
        return "."
    return folder.rstrip("/") or "/"
