"""`herder nodes`, `drain`, `workloads`, `status`: what the cluster is and what it is doing."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from herder.cli.output import (
    counted,
    escape_controls,
    format_bytes,
    format_duration,
    format_share,
    print_json,
    print_table,
    say,
)
from herder.cli.session import cluster_options, connected
from herder_shared.states import AgentState
from herder_shared.wire.messages import NodeInfo, WorkloadInfo, WorkloadReport

if TYPE_CHECKING:
    from herder import Client

#: How often `drain --wait` asks.
DRAIN_ASK_S = 0.5


@click.command()
@cluster_options
def nodes(profile: str | None, as_json: bool) -> None:
    """List the nodes."""
    with connected(profile) as client:
        found = list(client.nodes())
    if as_json:
        print_json(found)
        return
    columns = ("node", "state", ">cores", ">running", ">free", ">memory", ">used", ">task share", ">heard", "host")
    print_table(columns, map(node_row, found), empty="no nodes: start agents with herder up, or herder agent")
    for node in found:
        for remark in remarks(node):
            click.echo(escape_controls(f"{node.facts.node} {remark}"))


def remarks(node: NodeInfo) -> list[str]:
    """What else is to be said of it, one sentence each."""
    told = []
    fault = node.report.fault if node.report is not None else ""
    if node.why or fault:
        told.append(f"takes nothing new: {node.why or fault}")
    if node.ends_in_s is not None and node.state is not AgentState.LOST:
        told.append(f"is ours for another {format_duration(node.ends_in_s)}")
    if node.kept_for:
        told.append(f"is kept for a task of job {node.kept_for}, which would wait for ever otherwise")
    if node.suspect:
        told.append(f"runs {node.suspect}, which may have cost another node")
    return told


def node_row(node: NodeInfo) -> tuple[str, ...]:
    """One line of `herder nodes`. *task share* is the part of all core-seconds so far that tasks' code had."""
    report = node.report
    seconds = report.core_seconds if report else {}
    return (
        node.facts.node,
        node.state,
        str(node.facts.cores),
        str(node.running),
        f"{max(0.0, node.facts.cores - node.assigned_cores):g}",
        format_bytes(node.facts.memory_bytes),
        format_bytes(report.memory_used_bytes) if report else "-",
        format_share(seconds.get("task", 0.0), sum(seconds.values())),
        f"{format_duration(node.silent_s)} ago",
        node.facts.host,
    )


@click.command()
@click.argument("node")
@click.option("--undo", is_flag=True, help="Use the node again.")
@click.option("--wait", "wait_empty", is_flag=True, help="Return when nothing runs there any more.")
@cluster_options
def drain(node: str, undo: bool, wait_empty: bool, profile: str | None, as_json: bool) -> None:
    """Empty a node: what runs is finished, nothing new is started."""
    if undo and wait_empty:
        raise click.UsageError("--wait does not go with --undo")
    with connected(profile) as client:
        client.drain(node, on=not undo)
        running = wait_until_empty(client, node) if wait_empty else running_on(client.nodes(), node)
    if as_json:
        print_json({"node": node, "draining": not undo, "running": running})
        return
    what = "is used again" if undo else "takes nothing new"
    click.echo(f"{node} {what}; {running} task{'s' * (running != 1)} running")


def running_on(found: Iterable[NodeInfo], name: str) -> int:
    """Attempts on this node; 0 when it is gone or lost."""
    return sum(node.running for node in found if node.facts.node == name and node.state is not AgentState.LOST)


def wait_until_empty(client: Client, name: str) -> int:
    """Ask until nothing runs on the node. Ctrl-C leaves it draining."""
    said = -1
    while running := running_on(client.nodes(), name):
        if running != said:
            say(f"{name}: {running} running")
            said = running
        time.sleep(DRAIN_ASK_S)
    return 0


@click.command()
@click.option("--steps", is_flag=True, help="Show every step of the audit.")
@cluster_options
def workloads(steps: bool, profile: str | None, as_json: bool) -> None:
    """Workloads: start method, fork point, audit."""
    with connected(profile) as client:
        found = list(client.workloads())
    if as_json:
        print_json(found)
        return
    print_workloads(found)
    if steps:
        for workload in found:
            for node, report in sorted(workload.reports.items()):
                print_audit(workload.name, node, report)


def print_workloads(found: Iterable[WorkloadInfo]) -> None:
    """One line for each workload and node: what was chosen, and why."""
    columns = ("workload", "asked", "node", "chosen", "fork point", ">fork", ">fresh", ">memory", "why")
    found = list(found)
    rows = [
        (
            workload.name,
            workload.start,
            node,
            report.start_method or "-",
            report.fork_point or "-",
            format_duration(report.fork_start_s),
            format_duration(report.fresh_start_s),
            memory(report),
            why(report),
        )
        for workload in found
        for node, report in sorted(workload.reports.items())
    ]
    print_table(columns, rows, empty="no workload has been used yet")
    for workload in found:
        for node, report in sorted(workload.reports.items()):
            for note in report.notes:
                say(f"{workload.name} on {node}: {note}")


def memory(report: WorkloadReport) -> str:
    """What the templates have for themselves, and what they share with others."""
    private, shared = (sum(getattr(t, f"{kind}_bytes") for t in report.templates) for kind in ("private", "shared"))
    return f"{format_bytes(private)} + {format_bytes(shared)} shared" if private or shared else "-"


def facts(report: WorkloadReport) -> list[str]:
    """What else the node says of the workload, one sentence each."""
    told = []
    if report.demoted:
        told.append(f"demoted: {report.demoted}")
    if report.setup_mode:
        took = f", setup took {format_duration(report.setup_s)}" if report.setup_s is not None else ""
        told.append(f"setup's value: {report.setup_mode}{took}")
    if report.immortal_objects or report.immortal_off:
        off = f" ({report.immortal_off})" if report.immortal_off else ""
        told.append(f"immortal objects: {report.immortal_objects:,}{off}")
    if report.fork_cost_s is not None:
        told.append(f"a bare fork of its template takes {format_duration(report.fork_cost_s)}")
    return told


def why(report: WorkloadReport) -> str:
    """Why this start method: the node's own words, or what its audit shows."""
    if report.error or report.demoted or report.reason:
        return report.error or report.demoted or report.reason
    safe = sum(step.verdict == "safe" for step in report.steps)
    return f"{safe} of {len(report.steps)} steps are safe to fork after" if report.steps else ""


def print_audit(name: str, node: str, report: WorkloadReport) -> None:
    """The template's start on one node, step by step."""
    rows = [
        (
            step.step,
            format_duration(step.seconds),
            format_bytes(step.rss_bytes),
            str(step.threads),
            step.verdict,
            "; ".join([*(f"{f.rule}: {f.seen} {f.reason} {f.cure}".strip() for f in step.findings), *step.applied]),
        )
        for step in report.steps
    ]
    columns = ("step", ">took", ">memory", ">threads", "verdict", "findings")
    print_table(columns, rows, title=f"{name} on {node}", empty=f"{name} on {node}: no audit yet")
    for fact in facts(report):
        click.echo(f"  {fact}")


@click.command()
@cluster_options
def status(profile: str | None, as_json: bool) -> None:
    """The coordinator, its tasks and agents, in one view."""
    with connected(profile) as client:
        found = client.status()
    if as_json:
        print_json(found)
        return
    rows = [
        ("cluster", found.cluster),
        ("coordinator", f"version {found.version}, epoch {found.epoch}"),
        ("page and metrics", f"http://{found.http}" if found.http else "off"),
        ("agents", counted(found.agents)),
        ("tasks", counted(found.tasks)),
        ("jobs, clients", f"{found.jobs}, {found.clients}"),
    ]
    if found.paused_jobs or found.kept_nodes or found.suspects:
        held = ((found.paused_jobs, "jobs paused"), (found.kept_nodes, "nodes kept"), (found.suspects, "tasks suspect"))
        rows.append(("held back", ", ".join(f"{count} {what}" for count, what in held if count)))
    print_table(("what", "is"), rows)
    columns = ("owner", ">cores", ">lately", ">due", ">weight")
    owners = [
        (one.owner, f"{one.cores:g}", f"{one.mean_cores:.1f}", format_share(one.share, 1.0), f"{one.weight:g}")
        for one in found.owners
    ]
    if owners:
        print_table(columns, owners)
