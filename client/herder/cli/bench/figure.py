"""What a benchmark gives, and the few things that all of them need."""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from herder_shared.errors import HerderError
from herder_shared.limits import GIB

if TYPE_CHECKING:
    from herder import Client, LocalCluster
    from herder.client import View

#: Runs of each side, one after the other in turn, of which the median counts.
RUNS = 5
#: Tasks of a run: enough to have a rate, not so many that a slow machine takes for ever.
TASKS_MIN = 100
TASKS_MAX = 200_000
#: No run of tasks may take longer, whatever is wrong.
RUN_TIMEOUT_S = 120.0


class Figure(msgspec.Struct, frozen=True):
    """One line of the result. `must` and `aim` are those of docs/PERFORMANCE.md; None where none is set.

    `best_is_low` says which way is better. `runs` are the single values behind `value`, their median.
    """

    name: str
    value: float
    unit: str
    must: float | None = None
    aim: float | None = None
    best_is_low: bool = False
    detail: str = ""
    runs: tuple[float, ...] = ()

    @property
    def verdict(self) -> str:
        """`aim`, `must` or `below`: the best that it reaches; empty where nothing is set."""
        if self.must is None:
            return ""
        if self.aim is not None and self._reaches(self.aim):
            return "aim"
        return "must" if self._reaches(self.must) else "below"

    def _reaches(self, limit: float) -> bool:
        return self.value <= limit if self.best_is_low else self.value >= limit


class Conditions(msgspec.Struct, frozen=True):
    """How to measure: seconds of a run, the cores to use, GiB of data (None: as the figure says, if the machine has so
    much), an interpreter for benchmarks which need a newer one."""

    seconds: float
    cores: int
    data_gib: float | None = None
    python: str | None = None


class LeftOut(HerderError):
    """This machine lacks what the benchmark needs; the message says what."""


def need_modules(*modules: str) -> None:
    """Raises LeftOut unless all are installed here."""
    missing = [name for name in modules if importlib.util.find_spec(name.partition(".")[0]) is None]
    if missing:
        raise LeftOut(f"not installed: {', '.join(missing)}")


def data_bytes(wanted_gib: float, conditions: Conditions, least_gib: float) -> int:
    """How many bytes of data to use: what is asked for, else the figure's own if it fits into 40 % of the free memory.

    Raises:
        LeftOut: that would be less than `least_gib`.
    """
    if conditions.data_gib is not None:
        return int(conditions.data_gib * GIB)
    text = Path("/proc/meminfo").read_text()
    free_kib = next(int(line.split()[1]) for line in text.splitlines() if line.startswith("MemAvailable:"))
    fits = 0.4 * free_kib * 1024
    if fits < least_gib * GIB:
        raise LeftOut(f"it needs {least_gib / 0.4:.1f} GiB of free memory")
    return int(min(wanted_gib * GIB, fits))


def machine_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def cluster_of_one(conditions: Conditions) -> Iterator[tuple[LocalCluster, Client]]:
    """A coordinator and one agent with all the cores, with a client."""
    import herder

    with herder.LocalCluster(cores=conditions.cores, agents=1) as cluster, cluster.client() as client:
        yield cluster, client


def no_op() -> Callable[..., None]:
    """A function that does nothing, made here so that it is pickled by value, as a script's functions are."""

    def nothing(*_: Any) -> None:
        return None

    return nothing


def too_slow(tasks: int) -> HerderError:
    """A run did not end in `RUN_TIMEOUT_S`: something is wrong, and no figure would mean anything."""
    return HerderError(f"{tasks} empty tasks did not end in {RUN_TIMEOUT_S:g} s: is the machine busy otherwise?")


def times_in_turn(calls: Sequence[Callable[[], object]], seconds: float, warm_ups: int = 10) -> list[list[float]]:
    """Seconds of each call, one at a time and in turn, for about this long and at least 50 times each."""
    for _ in range(warm_ups):
        for call in calls:
            call()
    times: list[list[float]] = [[] for _ in calls]
    ends = time.perf_counter() + seconds
    while len(times[0]) < 50 or time.perf_counter() < ends:
        for call, taken in zip(calls, times, strict=True):
            taken.append(timed(call))
    return times


def run_array(view: View, function: Callable[..., None], tasks: int) -> None:
    """Run an array of empty tasks to its end.

    Raises:
        HerderError: it took too long, or a task failed; then it is the first failure.
    """
    job = view.array(function, range(tasks))
    if not job.wait(RUN_TIMEOUT_S):
        raise too_slow(tasks)
    if job.progress().succeeded != tasks:
        failures = job.failures()
        raise failures[min(failures)]


def timed(call: Callable[[], object]) -> float:
    """Seconds that the call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def rate_of(run: Callable[[int], object], tasks: int) -> float:
    """Tasks per second of one run of this many."""
    return tasks / timed(lambda: run(tasks))


def tasks_for(run: Callable[[int], object], seconds: float) -> int:
    """How many tasks take about this long: warms up with a few, then tries more until the guess is a good one."""
    run(TASKS_MIN)
    tasks = TASKS_MIN
    while True:
        took_s = tasks / rate_of(run, tasks)
        wanted = max(TASKS_MIN, min(TASKS_MAX, int(tasks * seconds / took_s)))
        if took_s > seconds / 4 or wanted <= 2 * tasks:
            return wanted
        tasks = min(wanted, 10 * tasks)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which this many percent lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def median(values: Sequence[float]) -> float:
    """The median, as a float."""
    return float(statistics.median(values))
