"""`herder up` and `herder down`. Exit status: 0 done, 1 some hosts failed, 2 usage, 3 the coordinator is not up."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console
from rich.text import Text

from herder_launch.display import Board
from herder_launch.hosts import HostList, HostSpec, load_hosts, parse_hosts
from herder_shared.config import load_profile
from herder_shared.errors import ConfigError, HerderError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3

_profile_option: Callable[[Callable[..., None]], Callable[..., None]] = click.option(
    "--profile", metavar="NAME", help="The cluster's profile; made when it does not exist."
)
_json_option: Callable[[Callable[..., None]], Callable[..., None]] = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON."
)


@click.command()
@click.argument("hosts_toml", required=False, type=click.Path(path_type=Path))
@click.option("--hosts", metavar="a,user@b[1-64]:PORT", help="Hosts, instead of a file.")
@_profile_option
@click.option("--coordinator", metavar="HOST|local", help="Where the coordinator runs. Default: the first host.")
@click.option("--python", metavar="EXE", help="Python on the hosts. Default: found there.")
@click.option("--cores", type=click.IntRange(min=1), help="Slots of each node. Default: its cores.")
@click.option("--listen", metavar="ADDRESS:PORT", help="Where the coordinator listens and is found.")
@click.option("--http-listen", metavar="ADDRESS:PORT", help="The coordinator's HTTP. Default: loopback.")
@click.option("--wheels", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Wheels to ship.")
@_json_option
def up(
    *,
    hosts_toml: Path | None,
    hosts: str | None,
    profile: str | None,
    coordinator: str | None,
    python: str | None,
    cores: int | None,
    listen: str | None,
    http_listen: str | None,
    wheels: Path | None,
    as_json: bool,
) -> None:
    """Start a coordinator and agents over SSH, or repair what is missing.

    A second `up` starts only what does not run, and never a second coordinator. Hosts that fail are named; the others
    stay up.
    """
    from herder_launch.up import UpOptions, bring_up

    console = Console(stderr=as_json)
    try:
        chosen = _with_defaults(_hosts_of(hosts_toml, hosts), python, cores)
        options = UpOptions(profile, coordinator, listen, http_listen, wheels)
        with Board(console, "herder up") as board:
            result = bring_up(chosen, options, board)
    except HerderError as error:
        _give_up(error)
    if as_json:
        sys.stdout.write(
            json.dumps(
                {
                    "profile": result.profile.name,
                    "addresses": list(result.profile.addresses),
                    "nodes": result.nodes,
                    "failures": result.failures,
                }
            )
            + "\n"
        )
    else:
        _say_result(console, result.profile.name, len(result.nodes), result.failures)
    if not result.is_coordinator_up:
        sys.exit(EXIT_UNREACHABLE)
    if result.failures:
        sys.exit(EXIT_FAILED)


@click.command()
@_profile_option
@_json_option
def down(*, profile: str | None, as_json: bool) -> None:
    """Stop the agents and the coordinator that `herder up` started."""
    from herder_launch.down import take_down

    console = Console(stderr=as_json)
    try:
        with Board(console, "herder down") as board:
            failures = take_down(load_profile(profile), board)
    except HerderError as error:
        _give_up(error)
    if as_json:
        sys.stdout.write(json.dumps({"failures": failures}) + "\n")
    if failures:
        sys.exit(EXIT_FAILED)


def _hosts_of(hosts_toml: Path | None, hosts: str | None) -> HostList:
    if (hosts_toml is None) == (hosts is None):
        raise ConfigError("name the hosts: either a HOSTS.toml or --hosts a,b[1-64]")
    if hosts_toml is not None:
        return load_hosts(hosts_toml)
    assert hosts is not None
    return HostList(parse_hosts(hosts))


def _with_defaults(hosts: HostList, python: str | None, cores: int | None) -> HostList:
    """What the command line says holds where the file says nothing."""

    def filled(spec: HostSpec) -> HostSpec:
        return replace(spec, python=spec.python or python, cores=spec.cores or cores)

    return HostList(tuple(map(filled, hosts.hosts)), hosts.coordinator)


def _say_result(console: Console, profile: str, node_count: int, failures: dict[str, str]) -> None:
    nodes = f"{node_count} node{'' if node_count == 1 else 's'}"
    console.print(Text(f"{nodes} up, profile {profile!r}; {len(failures)} failed"), soft_wrap=True)
    for row, reason in failures.items():
        console.print(Text(f"  {row}: {reason}"), soft_wrap=True)


def _give_up(error: HerderError) -> NoReturn:
    click.echo(f"herder: {error}", err=True)
    sys.exit(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_UNREACHABLE)
