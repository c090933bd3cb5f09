"""How much of the machine's own process rate is left when every task has a process and goes all the way?

A task here is submitted by a client, journalled, placed, sent to the agent, forked from the workload's template, run,
reaped, journalled again and reported back. The floor (`floor.py`) is what the kernel gives a bare loop with the same
preload, one loop for each core. Both run in turn, five times; the figure is the ratio of the medians. It can pass 1.0
with a heavy preload, as the floor forks a process that nobody prepared for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from herder.cli.bench import floor
from herder.cli.bench.figure import (
    RUN_TIMEOUT_S,
    RUNS,
    Conditions,
    Figure,
    cluster_of_one,
    median,
    need_modules,
    no_op,
    rate_of,
    run_array,
    tasks_for,
)
from herder_shared.errors import ConfigError

#: One thread a library, in the floor as in a template: a pool of threads would be forked into nothing.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Floor:
    """The loops, one process a core. Started once; each `rate()` runs all of them at the same time, for so many
    seconds."""

    def __init__(self, loops: Sequence[subprocess.Popen[str]]) -> None:
        self._loops = loops

    def await_ready(self) -> None:
        """Return when all have imported their modules.

        Raises:
            ConfigError: one could not.
        """
        for each in self._loops:
            self._line_of(each)

    def rate(self, seconds: float) -> float:
        """Processes per second of all loops together."""
        for each in self._loops:
            assert each.stdin is not None
            each.stdin.write(f"{seconds}\n")
            each.stdin.flush()
        answers = [self._line_of(each).split() for each in self._loops]
        return sum(int(count) / float(took_s) for count, took_s in answers)

    @staticmethod
    def _line_of(each: subprocess.Popen[str]) -> str:
        assert each.stdout is not None
        line = each.stdout.readline()
        if not line:
            raise ConfigError(f"the bare fork loop ended with status {each.wait()}; its error is above")
        return line


@contextmanager
def loops_of(commands: Sequence[Sequence[str]], environ: Mapping[str, str]) -> Iterator[Floor]:
    """Programs which speak as `floor.py` does; they end with the block, by the end of their stdin."""
    with ExitStack() as stack:
        loops = [
            stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
            )
            for command in commands
        ]
        found = Floor(loops)
        found.await_ready()
        yield found


@contextmanager
def floor_of(modules: Sequence[str], cores: int) -> Iterator[Floor]:
    """Bare fork loops with these modules imported, each pinned to a core."""
    cpus = sorted(os.sched_getaffinity(0))
    script = str(Path(floor.__file__))
    commands = [(sys.executable, "-P", script, str(cpus[core % len(cpus)]), *modules) for core in range(cores)]
    with loops_of(commands, {**os.environ, **ONE_THREAD}) as found:
        yield found


def measure(name: str, modules: Sequence[str], must: float, aim: float, conditions: Conditions) -> list[Figure]:
    """The ratio for one preload."""
    import herder

    need_modules(*modules)
    workload = herder.Workload(f"bench-{name}", preload=tuple(modules), blas_threads=1)
    nothing = no_op()
    with floor_of(modules, conditions.cores) as bare, cluster_of_one(conditions) as (_, client):
        view = client.options(workload=workload, name=name)

        def run(tasks: int) -> None:
            run_array(view, nothing, tasks)

        tasks = tasks_for(run, conditions.seconds)
        floors, rates = [], []
        for _ in range(RUNS):
            floors.append(bare.rate(conditions.seconds))
            rates.append(rate_of(run, tasks))
        probe = view.submit(nothing)
        probe.result(RUN_TIMEOUT_S)
        method = probe.usage().start_method
    ratio = median(rates) / median(floors)
    detail = f"{median(rates):.0f}/s of {median(floors):.0f}/s, by {method}"
    runs = tuple(rate / bare_rate for rate, bare_rate in zip(rates, floors, strict=True))
    return [Figure(name, ratio, "of the floor", must, aim, detail=detail, runs=runs)]


def plain(conditions: Conditions) -> list[Figure]:
    """No preload."""
    return measure("process-per-task", (), 0.35, 0.5, conditions)


def with_numpy(conditions: Conditions) -> list[Figure]:
    """With numpy preloaded."""
    return measure("process-per-task-numpy", ("numpy",), 0.45, 0.6, conditions)


def with_stack(conditions: Conditions) -> list[Figure]:
    """With numpy, pandas and scikit-learn preloaded."""
    return measure("process-per-task-sklearn", ("numpy", "pandas", "sklearn.ensemble"), 1.0, 1.3, conditions)
