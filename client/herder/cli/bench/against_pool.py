"""A process per task, against what the standard library has for it with the same preload.

Its side: `multiprocessing.Pool(cores, maxtasksperchild=1)` in the forkserver context with `set_forkserver_preload`,
and beside it in the fork context, of which no safety is asked; `pool.map` of a built-in function with `chunksize=1`.
Ours: an array of empty tasks, by client, coordinator and agent. All three run in turn, five times, on the same cores;
the figures are ratios of the median rates.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from herder.cli.bench.figure import (
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
from herder.cli.bench.process_per_task import ONE_THREAD
from herder_shared.errors import HerderError

#: A pool that does not answer for so long hangs. The fork context's does, now and then: it forks from a process which
#: has the pool's own threads, and inherits a lock that one of them held.
LIMIT_S = 60.0


class Pool:
    """One pool, in a program of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, tasks: int) -> float:
        """Seconds that so many tasks take."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{tasks}\n")
        self._process.stdin.flush()
        return float(self.line())

    def line(self) -> str:
        """What it says next.

        Raises:
            TimeoutError: nothing.
        """
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], LIMIT_S)[0]:
            raise TimeoutError
        line = self._process.stdout.readline()
        if not line:
            raise HerderError(f"the pool's program ended with status {self._process.wait()}; its error is above")
        return line


@contextmanager
def pool_of(method: str, modules: Sequence[str], cores: int) -> Iterator[Pool]:
    """A pool by this start method; it ends with the block."""
    code = "from herder.cli.bench import pool; pool.main()"
    command = [sys.executable, "-P", "-c", code, method, str(cores), *modules]
    with (
        # Where the forkserver's socket is: it is killed and removes nothing itself.
        tempfile.TemporaryDirectory(prefix="herder-bench-") as folder,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ONE_THREAD, "TMPDIR": folder},
            start_new_session=True,
        ) as process,
    ):
        found = Pool(process)
        try:
            found.line()
            yield found
            # At the end of its stdin it ends, and removes its semaphores.
            assert process.stdin is not None
            process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(LIMIT_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a pool that hangs would leave its processes behind


def measure(name: str, modules: Sequence[str], must: float, aim: float, conditions: Conditions) -> list[Figure]:
    """Against forkserver, which the figure is about, and fork."""
    import herder

    need_modules(*modules)
    nothing = no_op()
    workload = herder.Workload(f"bench-{name}", preload=tuple(modules), blas_threads=1)
    methods = ("forkserver", "fork")
    with (
        pool_of("forkserver", modules, conditions.cores) as by_forkserver,
        pool_of("fork", modules, conditions.cores) as by_fork,
        cluster_of_one(conditions) as (_, client),
    ):
        view = client.options(workload=workload, name=name)

        def run(tasks: int) -> None:
            run_array(view, nothing, tasks)

        tasks = tasks_for(run, conditions.seconds)
        runs: dict[str, list[float]] = {each: [] for each in ("herder", *methods)}
        hung = ""
        for _ in range(RUNS):
            runs["forkserver"].append(tasks / by_forkserver.run(tasks))
            if not hung:
                try:
                    runs["fork"].append(tasks / by_fork.run(tasks))
                except TimeoutError:
                    hung = f"; it hung in run {len(runs['fork']) + 1}"
            runs["herder"].append(rate_of(run, tasks))
    ours = median(runs["herder"])
    ends = {"forkserver": "", "fork": hung}
    return [
        Figure(
            f"{name} {method}",
            ours / median(runs[method]),
            "times",
            must if method == "forkserver" else None,
            aim if method == "forkserver" else None,
            detail=f"{ours:.0f}/s against {median(runs[method]):.0f}/s, {tasks} tasks a run{ends[method]}",
            runs=tuple(each / peer for each, peer in zip(runs["herder"], runs[method], strict=False)),
        )
        for method in methods
        if runs[method]
    ]


def plain(conditions: Conditions) -> list[Figure]:
    """No preload."""
    return measure("multiprocessing", (), 3.0, 5.0, conditions)


def with_stack(conditions: Conditions) -> list[Figure]:
    """With numpy, pandas and scikit-learn preloaded."""
    return measure("multiprocessing-sklearn", ("numpy", "pandas", "sklearn.ensemble"), 1.3, 1.8, conditions)
