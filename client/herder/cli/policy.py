"""`herder pause`, `resume`, `priority`: who goes on, and who goes first."""

from __future__ import annotations

import click

from herder.cli.output import print_json
from herder.cli.session import cluster_options, connected

_targets = click.argument("what", metavar="ID", nargs=-1, required=True)
_is_node = click.option("--node", "is_node", is_flag=True, help="The IDs are names of nodes: the same as herder drain.")


@click.command()
@_targets
@_is_node
@cluster_options
def pause(what: tuple[str, ...], is_node: bool, profile: str | None, as_json: bool) -> None:
    """Start no more tasks of these jobs, or on these nodes. What runs goes on. It lasts until herder resume."""
    _set_paused(what, is_node=is_node, paused=True, profile=profile, as_json=as_json)


@click.command()
@_targets
@_is_node
@cluster_options
def resume(what: tuple[str, ...], is_node: bool, profile: str | None, as_json: bool) -> None:
    """Let paused jobs, or nodes, go on."""
    _set_paused(what, is_node=is_node, paused=False, profile=profile, as_json=as_json)


def _set_paused(what: tuple[str, ...], *, is_node: bool, paused: bool, profile: str | None, as_json: bool) -> None:
    with connected(profile) as client:
        for each in what:
            if is_node:
                client.drain(each, on=paused)
            elif paused:
                client.job(each).pause()
            else:
                client.job(each).resume()
    if as_json:
        print_json({"paused" if paused else "resumed": what})
    else:
        click.echo(f"{'paused' if paused else 'resumed'}: {' '.join(what)}")


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("job_id", metavar="ID")
@click.argument("value", metavar="PRIORITY", type=click.IntRange(-(2**63), 2**63 - 1))
@cluster_options
def priority(job_id: str, value: int, profile: str | None, as_json: bool) -> None:
    """Give a job another priority: its tasks go before all of a lower one, whoever they belong to. The default is 0."""
    with connected(profile) as client:
        client.job(job_id).set_priority(value)
    if as_json:
        print_json({"job": job_id, "priority": value})
    else:
        click.echo(f"{job_id} has priority {value}")
