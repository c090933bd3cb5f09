"""`herder bench [NAME...]`: run benchmarks one after the other, show each figure with what it must and should be."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from importlib import import_module

import click

from herder.cli.bench.figure import Conditions, Figure, LeftOut, machine_cores
from herder.cli.output import console, print_json, print_table
from herder.cli.session import json_option

#: Name → (the function that measures it, the question it answers).
BENCHMARKS: dict[str, tuple[str, str]] = {
    "process-per-task": (
        "process_per_task:plain",
        "A process per task, end to end: how much of the bare fork rate is left?",
    ),
    "process-per-task-numpy": ("process_per_task:with_numpy", "The same with numpy preloaded."),
    "process-per-task-sklearn": (
        "process_per_task:with_stack",
        "The same with numpy, pandas and scikit-learn preloaded.",
    ),
    "fork-sealed": (
        "fork_sealed:measure",
        "The same stack: a bare fork of Herder's template against one of a process that only imported it?",
    ),
    "fork-with-data": ("fork_sealed:with_data", "A fork with 8 GB of arrays from setup, against one without?"),
    "multiprocessing": (
        "against_pool:plain",
        "A process per task, against multiprocessing.Pool(maxtasksperchild=1) with forkserver?",
    ),
    "multiprocessing-sklearn": (
        "against_pool:with_stack",
        "The same with numpy, pandas and scikit-learn preloaded by both.",
    ),
    "forked-against-reused": (
        "round_trip:compare",
        "How much longer does a task in a process of its own take than in a reused one, one at a time?",
    ),
    "warm-pool": (
        "warm_pool:measure",
        "A fresh interpreter with scikit-learn from the warm pool, against a cold start?",
    ),
    "shared-memory": (
        "shared_memory:measure",
        "8 tasks read 1 GB of arrays and 300 MB of Python objects from setup: how much memory beyond one copy?",
    ),
    "agent-cpu": ("agent_cpu:measure", "What does a forked task cost the agent and its template in processor time?"),
    "round-trip-forked": ("round_trip:forked", "How long does one empty task take, in a process of its own?"),
    "round-trip-reused": ("round_trip:reused", "How long does one empty task take, in a reused process?"),
    "one-by-one": ("throughput:one_by_one", "Submitted one by one, processes reused: how many tasks a second?"),
    "array": ("throughput:array", "As an array job, processes reused: how many tasks a second?"),
    "journal-cost": ("journal_cost:measure", "What does the journal cost: with it on a disk, against on a tmpfs?"),
    "idle": ("idle:measure", "What do coordinator and agent cost with nothing to do?"),
}


def list_benchmarks(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Answer `--list`."""
    if value and not ctx.resilient_parsing:
        print_table(("name", "question"), [(name, question) for name, (_, question) in BENCHMARKS.items()])
        ctx.exit()


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)), metavar="[NAME]...")
@click.option("--seconds", type=click.FloatRange(min=0.05, max=60), default=1.0, show_default=True, help="Of each run.")
@click.option("--cores", type=click.IntRange(min=1), help="Cores to use.  [default: this machine's]")
@click.option(
    "--data-gib", type=click.FloatRange(min=0.01), help="Of data, where data is used.  [default: the figure's own]"
)
@click.option("--python", metavar="EXE", help="For shared-memory: Python 3.12 or newer with numpy.  [default: found]")
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=list_benchmarks, help="List them.")
@json_option
def command(  # noqa: PLR0917
    names: tuple[str, ...],
    seconds: float,
    cores: int | None,
    data_gib: float | None,
    python: str | None,
    as_json: bool,
) -> None:
    """The built-in benchmarks, as ratios in one run on this machine.

    Takes some minutes. Each has a cluster of its own: a coordinator and one agent with all cores.
    """
    conditions = Conditions(seconds, cores or machine_cores(), data_gib, python)
    figures = measure(names or tuple(BENCHMARKS), conditions)
    if as_json:
        print_json({"machine": machine(conditions), "figures": figures})
        return
    columns = ("benchmark", ">figure", "", ">must", ">aim", "reaches", "measured")
    print_table(columns, map(figure_row, figures), title=machine(conditions))


def measure(names: Sequence[str], conditions: Conditions) -> list[Figure]:
    """Run these benchmarks, saying on stderr which."""
    screen = console(stderr=True)
    figures: list[Figure] = []
    for name in names:
        screen.print(f"{name}: {BENCHMARKS[name][1]}")
        try:
            figures += benchmark(name)(conditions)
        except LeftOut as reason:
            screen.print(f"{name}: left out, {reason}")
    return figures


def benchmark(name: str) -> Callable[[Conditions], list[Figure]]:
    """The function that measures it; modules are imported when they are run."""
    module, _, function = BENCHMARKS[name][0].partition(":")
    found: Callable[[Conditions], list[Figure]] = getattr(import_module(f"herder.cli.bench.{module}"), function)
    return found


def machine(conditions: Conditions) -> str:
    """Where and when this was measured."""
    return (
        f"{conditions.cores} cores, Linux {platform.release()} {platform.machine()}, "
        f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
    )


def figure_row(figure: Figure) -> tuple[str, ...]:
    """One line of the table."""
    return (
        figure.name,
        number(figure.value),
        figure.unit,
        number(figure.must),
        number(figure.aim),
        figure.verdict,
        figure.detail,
    )


def number(value: float | None) -> str:
    """Three digits; thousands as whole numbers."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
