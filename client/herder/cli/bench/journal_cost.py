"""What does the journal cost: how many empty tasks a second with it on a disk, of those with it on a tmpfs?

Two clusters, equal but for where their state folders are, run in turn; both sync as they do everywhere. On a tmpfs a
sync costs nothing, so the ratio is what waiting for the disk costs (a journal's processor time is in both).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from herder.cli.bench.figure import RUNS, Conditions, Figure, LeftOut, median, no_op, rate_of, run_array, tasks_for

_MEMORY = Path("/dev/shm")
_DISK = Path("/var/tmp")


def measure(conditions: Conditions) -> list[Figure]:
    """As an array, and one by one."""
    figures: list[Figure] = []
    nothing = no_op()
    with _client_on(_MEMORY, "tmpfs", conditions) as in_memory, _client_on(_DISK, None, conditions) as on_disk:

        def array(view: Any, tasks: int) -> None:
            run_array(view, nothing, tasks)

        def one_by_one(view: Any, tasks: int) -> None:
            for future in [view.submit(nothing) for _ in range(tasks)]:
                future.result()

        for name, run in (("array", array), ("one by one", one_by_one)):
            figures.append(_compare(name, partial(run, on_disk), partial(run, in_memory), conditions))
    return figures


def _compare(
    name: str, on_disk: Callable[[int], object], in_memory: Callable[[int], object], conditions: Conditions
) -> Figure:
    tasks = tasks_for(in_memory, conditions.seconds)
    on_disk(tasks // 4)
    pairs = [(rate_of(on_disk, tasks), rate_of(in_memory, tasks)) for _ in range(RUNS)]
    disk, memory = median([rate for rate, _ in pairs]), median([rate for _, rate in pairs])
    ratios = tuple(slow / fast for slow, fast in pairs)
    detail = f"{disk:,.0f} against {memory:,.0f} tasks/s, {tasks} tasks a run, in turn"
    return Figure(f"journal-cost: {name}", median(ratios), "times", 0.8, None, detail=detail, runs=ratios)


@contextlib.contextmanager
def _client_on(parent: Path, kind: str | None, conditions: Conditions) -> Iterator[Any]:
    """A view of a cluster whose state is below `parent`, which must (`kind`), or must not, be a tmpfs."""
    import herder

    found = file_system_of(parent)
    if (found == "tmpfs") != (kind == "tmpfs"):
        raise LeftOut(f"{parent} is {'no tmpfs' if kind else 'a tmpfs'} here ({found or 'not there'})")
    workload = herder.Workload("bench-journal", max_tasks_per_child=None)
    with (
        tempfile.TemporaryDirectory(prefix="herder-bench-", dir=parent) as folder,
        herder.LocalCluster(cores=conditions.cores, agents=1, state_dir=folder) as cluster,
        cluster.client() as client,
    ):
        yield client.options(workload=workload, name="journal-cost")


def file_system_of(folder: Path) -> str:
    """The kind of file system that is mounted nearest above this folder; "" when it cannot be told."""
    found, kind = "", ""
    path = os.path.realpath(folder)
    for line in Path("/proc/self/mounts").read_text(errors="replace").splitlines():
        _, point, name, *_ = line.split(" ")
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(found):
            found, kind = point, name
    return kind
