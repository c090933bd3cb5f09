"""`herder demo`: a real analysis on a cluster of this machine, and an account of every core-second.

A coordinator and two agents are started as processes of their own, the analysis of `herder.demo` is run on them, and
what the cluster itself reports is shown: nothing here is estimated. The account covers the time from just before the
job was submitted until each node's first report after its end; so its last seconds are idle ones with no work waiting,
and the share is taken of the others.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from herder import demo
from herder.cli.nodes import print_audit, print_workloads
from herder.cli.output import console, format_duration, format_share, print_json, print_table
from herder.cli.session import json_option
from herder_shared.errors import ConfigError
from herder_shared.states import CoreState
from herder_shared.wire.messages import NodeInfo, WorkloadInfo

if TYPE_CHECKING:
    from herder import Client, Future, Job, Workload

T = TypeVar("T")

#: Nodes report with each heartbeat; a report after the job's end comes within this.
REPORT_WAIT_S = 8.0
REPORT_ASK_S = 0.2

FORK_STARTS = 20
FRESH_STARTS = 5


class Answer(msgspec.Struct, frozen=True):
    """What the analysis found."""

    fits: int
    accuracy: float
    shuffled_mean: float
    shuffled_best: float
    p_value: float


class Run(msgspec.Struct, frozen=True):
    """How the job ran. Times in seconds; `fit_s` is the median of the fits' own wall time."""

    wall_s: float
    fit_s: float
    processes: int
    start_methods: dict[str, int]


class NodeAccount(msgspec.Struct, frozen=True):
    """What the cores of a node did during the job, in core-seconds by state."""

    node: str
    cores: int
    core_seconds: dict[str, float]


class StartCost(msgspec.Struct, frozen=True):
    """Medians over `tasks` empty tasks, one at a time: until the code starts, and until the caller has the result."""

    start_method: str
    tasks: int
    start_s: float
    round_trip_s: float


class Demo(msgspec.Struct, frozen=True):
    """All that `herder demo` found, as `--json` prints it."""

    answer: Answer
    run: Run
    cluster_start_s: float
    nodes: tuple[NodeAccount, ...]
    starts: tuple[StartCost, ...]
    workloads: tuple[WorkloadInfo, ...]
    total_s: float


@click.command()
@click.option("--fits", type=click.IntRange(min=10), default=400, show_default=True, help="How many fits.")
@click.option("--cores", type=click.IntRange(min=1), help="Cores of the cluster.  [default: this machine's]")
@click.option("--agents", type=click.IntRange(min=1), default=2, show_default=True, help="Nodes to make of them.")
@json_option
def command(fits: int, cores: int | None, agents: int, as_json: bool) -> None:
    """Local cluster, a real analysis, and where the core-seconds went."""
    check_installed()
    found = run_demo(fits, max(agents, cores or len(os.sched_getaffinity(0))), agents)
    if as_json:
        print_json(found)
    else:
        show(found)


def check_installed() -> None:
    """Raise ConfigError with the command to run when scikit-learn is missing."""
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError("herder demo needs scikit-learn, which is not installed: pip install 'herder[demo]'")


def run_demo(fits: int, cores: int, agents: int) -> Demo:
    """Start the cluster, run the analysis, measure, end the cluster."""
    import herder

    screen = console(stderr=True)
    began = time.monotonic()
    workload = herder.Workload("digits", preload=demo.PRELOAD, setup=demo.load, blas_threads=1)
    screen.print(f"starting a coordinator and {agents} agents with {cores} cores in all")
    with herder.LocalCluster(cores=cores, agents=agents) as cluster, cluster.client() as client:
        await_agents(client, agents)
        cluster_start_s = time.monotonic() - began
        before = list(client.nodes())
        screen.print(f"fitting {fits} classifiers, each in a process of its own")
        answer, run = analyse(client, workload, fits)
        accounts = account(before, reported_since_now(client))
        screen.print("timing the start of empty tasks: forked, and in fresh interpreters")
        fresh = herder.Workload(
            "digits-fresh", preload=demo.PRELOAD, setup=demo.load, blas_threads=1, start="fresh", warm=0
        )
        starts = (start_cost(client, workload, FORK_STARTS), start_cost(client, fresh, FRESH_STARTS))
        workloads = tuple(client.workloads())
    return Demo(answer, run, cluster_start_s, accounts, starts, workloads, time.monotonic() - began)


def await_agents(client: Client, count: int) -> None:
    """Return when all agents have joined and reported, so that the account starts with all of them."""
    ask_until(client.nodes, lambda nodes: sum(node.report is not None for node in nodes) >= count)


def ask_until(ask: Callable[[], T], enough: Callable[[T], bool]) -> T:
    """Ask again until it is enough or a report is overdue; the last answer."""
    deadline_s = time.monotonic() + REPORT_WAIT_S
    while not enough(answer := ask()) and time.monotonic() < deadline_s:
        time.sleep(REPORT_ASK_S)
    return answer


def analyse(client: Client, workload: Workload, fits: int) -> tuple[Answer, Run]:
    """The permutation test: one fit with the true labels, the others with shuffled ones."""
    began = time.monotonic()
    view = client.options(workload=workload, name="permutation test")
    job = view.array(demo.fit, range(demo.TRUE_LABELS, fits))
    futures = watched(job)
    wall_s = time.monotonic() - began
    scores = {future.index: future.result() for future in futures}
    true = scores.pop(demo.TRUE_LABELS)
    shuffled = list(scores.values())
    as_good = sum(score >= true for score in shuffled)
    answer = Answer(fits, true, statistics.fmean(shuffled), max(shuffled), (1 + as_good) / (1 + len(shuffled)))
    return answer, run_of(futures, wall_s)


def watched(job: Job) -> list[Future[Any]]:
    """All futures of the job, with a progress bar on stderr while they come."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True)) as progress:
        return list(progress.track(job.as_completed(), total=len(job), description="fits"))


def run_of(futures: list[Future[Any]], wall_s: float) -> Run:
    """What the accounts of all attempts say together."""
    usages = [future.usage() for future in futures]
    methods = [usage.start_method for usage in usages]
    return Run(
        wall_s=wall_s,
        fit_s=statistics.median(usage.wall_s for usage in usages),
        processes=len({(usage.node, usage.pid) for usage in usages}),
        start_methods={method: methods.count(method) for method in sorted(set(methods))},
    )


def reported_since_now(client: Client) -> list[NodeInfo]:
    """The nodes, once each has reported again after this call."""
    now = {node.facts.node: accounted_s(node) for node in client.nodes()}
    newer: dict[str, NodeInfo] = {}

    def all_newer(nodes: list[NodeInfo]) -> bool:
        newer.update((n.facts.node, n) for n in nodes if accounted_s(n) > now.get(n.facts.node, -1.0))
        return newer.keys() >= now.keys()

    last = ask_until(lambda: list(client.nodes()), all_newer)
    return [newer.get(node.facts.node, node) for node in last]


def accounted_s(node: NodeInfo) -> float:
    """All core-seconds of a node's last report; it grows with each report."""
    return sum(node.report.core_seconds.values()) if node.report else 0.0


def account(before: list[NodeInfo], after: list[NodeInfo]) -> tuple[NodeAccount, ...]:
    """What each node's cores did between two reports."""
    start = {node.facts.node: node.report.core_seconds if node.report else {} for node in before}
    return tuple(
        NodeAccount(
            node.facts.node,
            node.facts.cores,
            {
                state.value: node.report.core_seconds.get(state, 0.0) - start.get(node.facts.node, {}).get(state, 0.0)
                for state in CoreState
            },
        )
        for node in sorted(after, key=lambda node: node.facts.node)
        if node.report is not None
    )


def start_cost(client: Client, workload: Workload, tasks: int) -> StartCost:
    """Time empty tasks, one at a time, after one that is not counted (it may have to build a template)."""
    view = client.options(workload=workload, name="start cost")
    view.submit(demo.nothing).result()
    round_trips_s = []
    usages = []
    for _ in range(tasks):
        began = time.perf_counter()
        future = view.submit(demo.nothing)
        future.result()
        round_trips_s.append(time.perf_counter() - began)
        usages.append(future.usage())
    start_s = statistics.median(usage.start_s for usage in usages)
    return StartCost(usages[-1].start_method, tasks, start_s, statistics.median(round_trips_s))


def show(found: Demo) -> None:
    """All of it as text."""
    show_answer(found.answer, found.run)
    show_nodes(found.nodes)
    show_starts(found.starts)
    click.echo("Where children are forked, and why")
    print_workloads(found.workloads)
    for workload in found.workloads:
        if workload.name == "digits":
            node, report = min(workload.reports.items())
            print_audit("audit", node, report)
    click.echo(
        f"cluster up in {format_duration(found.cluster_start_s)}, analysis {format_duration(found.run.wall_s)}, "
        f"everything {format_duration(found.total_s)}"
    )


def show_answer(answer: Answer, run: Run) -> None:
    """The question, the answer, and how it was got."""
    verdict = "no: chance does as well" if answer.p_value > 0.05 else "yes"
    how = ", ".join(f"{count} by {method}" for method, count in run.start_methods.items())
    click.echo(
        f"\nCan a linear classifier tell handwritten digits apart?  {verdict} (p = {answer.p_value:.4f})\n"
        f"  true labels      {answer.accuracy:.1%} of the held-out images right\n"
        f"  shuffled labels  {answer.shuffled_mean:.1%} on average, {answer.shuffled_best:.1%} at best"
        f" ({answer.fits - 1} permutations)\n"
        f"{answer.fits} fits in {format_duration(run.wall_s)}, {format_duration(run.fit_s)} each,"
        f" in {run.processes} processes ({how})\n"
    )


def show_nodes(accounts: tuple[NodeAccount, ...]) -> None:
    """A line a node: its core-seconds by state, and the share that went to the tasks' own code."""
    states = [state.value for state in CoreState]
    columns = ("node", ">cores", *(f">{state.replace('_', ' ')}" for state in states), ">used")
    rows = [
        (
            each.node,
            str(each.cores),
            *(f"{each.core_seconds[state]:.1f}" for state in states),
            format_share(each.core_seconds["task"], sum(each.core_seconds.values()) - each.core_seconds["idle"]),
        )
        for each in accounts
    ]
    print_table(columns, rows, title="Core-seconds by what they went to (used: of those with work to do)")


def show_starts(starts: tuple[StartCost, ...]) -> None:
    """Fork against fresh."""
    rows = [(s.start_method, str(s.tasks), format_duration(s.start_s), format_duration(s.round_trip_s)) for s in starts]
    columns = ("started by", ">tasks", ">slot to code", ">round trip")
    print_table(columns, rows, title="Start of an empty task with the same preload and data (medians; fresh: cold)")
    if len(starts) == 2 and starts[0].start_method != starts[1].start_method and starts[0].round_trip_s > 0:
        ratio = starts[1].round_trip_s / starts[0].round_trip_s
        click.echo(f"a fresh interpreter takes {ratio:.0f} times as long\n")
