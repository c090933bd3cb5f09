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
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

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

#: A pool that does not answer for so long hangs. The fork context's does, on a busy machine more often than not: it
#: forks from a process which has the pool's own threads, and inherits a lock that one of them held.
LIMIT_S = 60.0
#: Fork's hangs too when it takes so many seconds and so many times what forkserver's took: it is the quicker one.
LIMIT_S_MIN = 5.0
LIMIT_TIMES = 5.0
#: How long a pool's processes may take to be gone when they are told to end.
END_S = 10.0


class PoolHangs(HerderError):
    """It did not answer in time."""


class Pool:
    """One pool, in a program of its own. Invariant: `hangs` is set from when it did not answer in time; it is not asked
    again."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.hangs = False

    def run(self, tasks: int, limit_s: float = LIMIT_S) -> float:
        """Seconds that so many tasks take.

        Raises:
            PoolHangs: more than the limit.
        """
        assert self._process.stdin is not None
        assert not self.hangs
        self._process.stdin.write(f"{tasks}\n")
        self._process.stdin.flush()
        return float(self.line(limit_s))

    def line(self, limit_s: float = LIMIT_S) -> str:
        """What it says next.

        Raises:
            PoolHangs: nothing within the limit.
        """
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], limit_s)[0]:
            self.hangs = True
            raise PoolHangs(f"multiprocessing's pool did not answer within {limit_s:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise HerderError(f"the pool's program ended with status {self._process.wait()}; its error is above")
        return line

    def end(self, patience_s: float) -> None:
        """End it and all that it started, by force after so long. Each of them has its stdout: the last one ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()  # at the end of its stdin it ends by itself, unless it hangs
        # Then all of its group; but its resource tracker ignores the first signal, and removes the semaphores.
        for number, wait_s in ((signal.SIGTERM, patience_s), (signal.SIGKILL, END_S)):
            if self._is_over(wait_s):
                return
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
        self._is_over(END_S)

    def _is_over(self, wait_s: float) -> bool:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        deadline_s = time.monotonic() + wait_s
        while select.select([fd], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
            if not os.read(fd, 4096):
                return True
        return False


@contextmanager
def pool_of(method: str, modules: Sequence[str], cores: int) -> Iterator[Pool]:
    """A pool by this start method; nothing of it is left after the block.

    Raises:
        PoolHangs: from its start.
    """
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
        is_done = False
        try:
            found.line()
            yield found
            is_done = not found.hangs
        finally:
            found.end(END_S if is_done else 0.0)


def measure(name: str, modules: Sequence[str], must: float, aim: float, conditions: Conditions) -> list[Figure]:
    """Against forkserver, which the figure is about, and fork as long as that does not hang."""
    import herder

    need_modules(*modules)
    nothing = no_op()
    workload = herder.Workload(f"bench-{name}", preload=tuple(modules), blas_threads=1)
    runs: dict[str, list[float]] = {each: [] for each in ("herder", "forkserver", "fork")}
    with ExitStack() as stack:
        by_forkserver = stack.enter_context(pool_of("forkserver", modules, conditions.cores))
        by_fork, hung = None, ""
        try:
            by_fork = stack.enter_context(pool_of("fork", modules, conditions.cores))
        except PoolHangs:
            hung = "; fork's hung at its start"
        _, client = stack.enter_context(cluster_of_one(conditions))
        view = client.options(workload=workload, name=name)

        def run(tasks: int) -> None:
            run_array(view, nothing, tasks)

        tasks = tasks_for(run, conditions.seconds)
        for number in range(1, RUNS + 1):
            took_s = by_forkserver.run(tasks)
            runs["forkserver"].append(tasks / took_s)
            if by_fork is not None:
                try:
                    runs["fork"].append(tasks / by_fork.run(tasks, LIMIT_S_MIN + LIMIT_TIMES * took_s))
                except PoolHangs:
                    by_fork, hung = None, f"; fork's hung in run {number}"
            runs["herder"].append(rate_of(run, tasks))
    ours = median(runs["herder"])
    return [
        Figure(
            f"{name} {method}",
            ours / median(runs[method]),
            "times",
            must if method == "forkserver" else None,
            aim if method == "forkserver" else None,
            detail=f"{ours:.0f}/s against {median(runs[method]):.0f}/s, {tasks} tasks a run{hung}",
            runs=tuple(each / peer for each, peer in zip(runs["herder"], runs[method], strict=False)),
        )
        for method in ("forkserver", "fork")
        if runs[method]
    ]


def plain(conditions: Conditions) -> list[Figure]:
    """No preload."""
    return measure("multiprocessing", (), 3.0, 5.0, conditions)


def with_stack(conditions: Conditions) -> list[Figure]:
    """With numpy, pandas and scikit-learn preloaded."""
    return measure("multiprocessing-sklearn", ("numpy", "pandas", "sklearn.ensemble"), 1.3, 1.8, conditions)
