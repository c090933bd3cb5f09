"""What each host needs, decided from what was found there. Pure: no connection, no file, no clock.

The decisions: where the coordinator runs, which interpreter of a host serves, and for each program whether it is left
alone, started, or replaced. So a second `herder up` repairs: what runs is left alone, what is missing is started, and a
second coordinator is never started.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from herder_launch.hosts import HostList, HostSpec
from herder_shared.errors import ConfigError

#: Interpreters that run Herder's coordinator and agent.
PYTHON_MIN = (3, 11)
#: What must be importable beside Herder itself, by role.
MODULES = {"coordinator": ("apsw", "starlette", "uvicorn", "prometheus_client"), "agent": ("prometheus_client",)}
#: Names under which an interpreter is looked for, the best first.
PYTHON_NAMES = ("python3.13", "python3.12", "python3.11", "python3")

LOCAL = "local"


@dataclass(frozen=True, slots=True)
class Interpreter:
    """An interpreter as found on a host. `shipped` is the environment that an earlier `up` made there, if any."""

    executable: str
    version: tuple[int, int, int]
    implementation: str
    machine: str
    libc: str
    herder: str | None
    missing: tuple[str, ...]
    state_dir: str | None
    shipped: str | None


@dataclass(frozen=True, slots=True)
class Use:
    """Herder is there already: use this interpreter."""

    interpreter: Interpreter


@dataclass(frozen=True, slots=True)
class Reuse:
    """An earlier `up` shipped the same Herder: use that environment."""

    python: str


@dataclass(frozen=True, slots=True)
class Ship:
    """Herder must be shipped to an environment made with this interpreter."""

    interpreter: Interpreter


@dataclass(frozen=True, slots=True)
class Impossible:
    """No way to run Herder there. One line for the user."""

    reason: str


def choose_interpreter(
    found: Sequence[Interpreter], unusable: Sequence[str], version: str
) -> Use | Reuse | Ship | Impossible:
    """Which interpreter serves, in the order in which they were found; `version` is the launcher's own Herder."""
    fitting = [each for each in found if each.implementation == "cpython" and each.version[:2] >= PYTHON_MIN]
    for each in fitting:
        if each.herder == version and not each.missing:
            return Use(each)
    for each in fitting:
        if each.shipped is not None:
            return Reuse(each.shipped)
    if fitting:
        return Ship(fitting[0])
    wanted = ".".join(map(str, PYTHON_MIN))
    if unusable or found:
        seen = ", ".join([*unusable, *(each.executable for each in found)])
        return Impossible(f"no CPython {wanted} or later (found: {seen}); name one with --python or `python = ...`")
    return Impossible(f"no Python at all; install Python {wanted} or later, or name one with --python")


def choose_coordinator(hosts: HostList, asked: str | None, recorded: HostSpec | None) -> HostSpec | None:
    """The host of the coordinator; None is this machine.

    An existing cluster keeps its coordinator where it is. Otherwise what was asked for, else the first host.

    Raises:
        ConfigError: the cluster has its coordinator elsewhere, or the named host is not among the hosts.
    """
    asked = asked or hosts.coordinator
    if recorded is not None:
        if asked is not None and asked not in (recorded.node, recorded.host, str(recorded)):
            raise ConfigError(
                f"the coordinator of this cluster is on {recorded}, not on {asked}: "
                "run `herder down` first, or use another profile (--profile)"
            )
        return None if recorded.host == LOCAL else recorded
    if asked == LOCAL:
        return None
    if asked is None:
        return hosts.hosts[0]
    for spec in hosts.hosts:
        if asked in (spec.node, spec.host, str(spec)):
            return spec
    raise ConfigError(f"the coordinator's host {asked!r} is none of the hosts, nor {LOCAL!r}")


def agent_action(argv_running: Sequence[str] | None, addresses: Sequence[str]) -> Literal["start", "keep", "replace"]:
    """What to do about an agent; None = none runs. One that calls another coordinator is replaced."""
    if argv_running is None:
        return "start"
    return "keep" if set(option_values(argv_running, "--coordinator")) & set(addresses) else "replace"


def option_values(argv: Sequence[str], option: str) -> list[str]:
    """The values that follow an option in a command line."""
    return [value for name, value in itertools.pairwise(argv) if name == option]
