"""Which hosts the user named: `--hosts a,user@b[1-64]:2222` and HOSTS.toml, checked, as plain data.

A HOSTS.toml looks so; every key but `name` may be left out, and `[defaults]` holds for all hosts::

    coordinator = "head"                    # one of the hosts, or "local"

    [defaults]
    user = "runner"
    python = "/opt/python/bin/python3.12"

    [[hosts]]
    name = "n[01-64]"                       # the node's name, and where SSH goes

    [[hosts]]
    name = "big-memory"
    host = "login.example.org"              # where SSH goes, if that is another name
    port = 2222
    cores = 96
    memory = "1TiB"
    labels = ["highmem"]
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from herder_shared.errors import ConfigError
from herder_shared.ids import NodeName

#: One `herder up` serves at most this many hosts: above it a scheduler (Slurm) is the way.
HOSTS_MAX = 4096

_T = TypeVar("_T")

_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252})")
_ADDRESS6 = re.compile(r"\[([0-9A-Fa-f:.]+(?:%[A-Za-z0-9]+)?)\]")
_RANGE = re.compile(r"\[([0-9,-]+)\]")


@dataclass(frozen=True, slots=True)
class HostSpec:
    """One host as the user named it. What is None is left to `~/.ssh/config`, or to what the node finds by itself."""

    host: str
    user: str | None = None
    port: int | None = None
    name: NodeName | None = None
    python: str | None = None
    cores: int | None = None
    memory: str | None = None
    gpus: int | None = None
    labels: tuple[str, ...] = ()

    @property
    def node(self) -> NodeName:
        """The name by which the cluster knows it."""
        return self.name or NodeName(self.host)

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        return f"{user}{self.host}{f':{self.port}' if self.port else ''}"


@dataclass(frozen=True, slots=True)
class HostList:
    """All hosts of one `herder up`, in the user's order, and where the coordinator is to run (None: not said)."""

    hosts: tuple[HostSpec, ...]
    coordinator: str | None = None


def parse_hosts(text: str) -> tuple[HostSpec, ...]:
    """Read `a,user@b[1-3,7]:2222`. Ranges keep their leading zeros.

    Raises:
        ConfigError: not of that form, or too many; says which part.
    """
    specs = [parse_host(name) for part in _split(text) for name in _expand(part)]
    if not specs:
        raise ConfigError("no host was named: --hosts a,b[1-64]")
    return _checked(specs)


def parse_host(text: str) -> HostSpec:
    """Read one `user@host:port`; IPv6 addresses stand in brackets.

    Raises:
        ConfigError: a part has characters that no user, host or port has.
    """
    user, at, rest = text.rpartition("@")
    if at and not _USER.fullmatch(user):
        raise ConfigError(f"{text!r}: {user!r} is not a user name")
    if match := _ADDRESS6.match(rest):
        host, rest = match[1], rest[match.end() :]
    else:
        host, colon, tail = rest.partition(":")
        rest = colon + tail
        if not _HOST.fullmatch(host):
            raise ConfigError(f"{text!r}: {host!r} is not a host name; expected user@host:port")
    return HostSpec(host=host, user=user or None, port=_port(text, rest))


def load_hosts(path: Path) -> HostList:
    """Read a HOSTS.toml.

    Raises:
        ConfigError: it cannot be read, an unknown key (with the nearest known one), a value of the wrong kind.
    """
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    _refuse_unknown(table, ("coordinator", "defaults", "hosts"), str(path))
    entries = table.get("hosts")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f'{path}: expected at least one [[hosts]] table with a `name = "node[1-20]"`')
    defaults = table.get("defaults", {})
    if not isinstance(defaults, dict):
        raise ConfigError(f"{path}: `defaults` must be a table")
    common = _settings(defaults, _COMMON_KEYS, f"{path}, [defaults]")
    specs: list[HostSpec] = []
    for number, entry in enumerate(entries, 1):
        specs.extend(_entry(entry, common, f"{path}, [[hosts]] number {number}"))
    return HostList(_checked(specs), _value(table, "coordinator", str, str(path)))


_COMMON_KEYS = ("user", "port", "python", "cores", "memory", "gpus", "labels")


def _entry(entry: dict[str, object], common: HostSpec, where: str) -> list[HostSpec]:
    own = _merge(_settings(entry, (*_COMMON_KEYS, "host", "name"), where), common)
    pattern, host = _value(entry, "name", str, where), _value(entry, "host", str, where)
    if pattern is None:
        raise ConfigError(f'{where}: `name = "..."` is missing')
    found = [parse_host(each) for part in _split(pattern) for each in _expand(part)]
    if host is None:
        return [_merge(spec, own) for spec in found]
    if len(found) != 1:
        raise ConfigError(f"{where}: `host` goes with one name, and {pattern!r} means {len(found)}")
    return [replace(_merge(parse_host(host), own), name=NodeName(found[0].host))]


def _merge(first: HostSpec, second: HostSpec) -> HostSpec:
    """`first`, with what it leaves open taken from `second`."""
    return HostSpec(
        host=first.host,
        user=first.user or second.user,
        port=first.port or second.port,
        name=first.name,
        python=first.python or second.python,
        cores=first.cores or second.cores,
        memory=first.memory or second.memory,
        gpus=first.gpus if first.gpus is not None else second.gpus,
        labels=first.labels or second.labels,
    )


def _settings(table: dict[str, object], known: Sequence[str], where: str) -> HostSpec:
    _refuse_unknown(table, known, where)
    labels = _value(table, "labels", list, where) or []
    if not all(isinstance(label, str) for label in labels):
        raise ConfigError(f"{where}: `labels` must be a list of strings")
    cores = _value(table, "cores", int, where)
    if cores is not None and cores < 1:
        raise ConfigError(f"{where}: `cores` must be at least 1, not {cores}")
    return HostSpec(
        host="",
        user=_value(table, "user", str, where),
        port=_value(table, "port", int, where),
        python=_value(table, "python", str, where),
        cores=cores,
        memory=_value(table, "memory", str, where),
        gpus=_value(table, "gpus", int, where),
        labels=tuple(labels),
    )


def _refuse_unknown(table: dict[str, object], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _value(table: dict[str, object], key: str, kind: type[_T], where: str) -> _T | None:
    value = table.get(key)
    if value is None:
        return None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"{where}: `{key}` must be of type {kind.__name__}, not {value!r}")
    return value


def _checked(specs: Iterable[HostSpec]) -> tuple[HostSpec, ...]:
    found: dict[str, HostSpec] = {}
    for spec in specs:
        if spec.node in found:
            raise ConfigError(f"{spec} and {found[spec.node]} would both be node {spec.node!r}: give one a `name`")
        found[spec.node] = spec
        if len(found) > HOSTS_MAX:
            raise ConfigError(f"more than {HOSTS_MAX} hosts were named")
    return tuple(found.values())


def _split(text: str) -> list[str]:
    """Cut at commas outside brackets."""
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _expand(part: str) -> list[str]:
    """Write out the ranges of `n[01-03]x[1,5]`."""
    match = _RANGE.search(part)
    if match is None:
        return [part]
    heads = [f"{part[: match.start()]}{number}" for number in _numbers(match[1], part)]
    return [head + tail for head in heads for tail in _expand(part[match.end() :])]


def _numbers(text: str, part: str) -> list[str]:
    numbers: list[str] = []
    for piece in text.split(","):
        low, dash, high = piece.partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or (dash and int(low) > int(high)):
            raise ConfigError(f"{part!r}: [{text}] is not a range such as [1-64] or [01-16,20]")
        if dash and int(high) - int(low) >= HOSTS_MAX:
            raise ConfigError(f"{part!r}: [{piece}] is more than {HOSTS_MAX} hosts")
        numbers.extend(str(number).zfill(len(low)) for number in range(int(low), int(high or low) + 1))
    return numbers


def _port(text: str, rest: str) -> int | None:
    if not rest:
        return None
    number = rest.removeprefix(":")
    if not number.isdecimal() or not 0 < int(number) < 65536:
        raise ConfigError(f"{text!r}: {number!r} is not a port number")
    return int(number)
