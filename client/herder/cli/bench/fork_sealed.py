"""What does a bare fork cost in a process that Herder has prepared for it?

`measure`: the same stack, numpy, pandas and scikit-learn, imported by a process that does nothing else (the floor) and
by one which Herder's own template code has built and sealed (`sealed.py`, with the agent's command line and
environment). Both run the same loop of `fork`, `_exit`, `waitpid` on the same core, in turn; the figure is the median
time of the sealed one over that of the naive one.

`with_data`: a template with arrays from `setup` against one without, both sealed: first the bare fork, as above, then
the latency of one forked task at a time on a cluster, in turn. Private memory would make both grow with the data.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from herder.cli.bench import sealed
from herder.cli.bench.data import SIZE_VARIABLE, setup_path
from herder.cli.bench.figure import (
    RUNS,
    Conditions,
    Figure,
    cluster_of_one,
    data_bytes,
    median,
    need_modules,
    no_op,
    times_in_turn,
)
from herder.cli.bench.process_per_task import Floor, floor_of, loops_of
from herder_shared.limits import GIB

STACK = ("numpy", "pandas", "sklearn.ensemble")
#: Prints the command line and the environment that the agent gives to a template; run as a program of its own because
#: the client knows no agent.
_ASK_THE_AGENT = (
    "import json, os, sys\n"
    "from herder_agent.launch.forkserver import interpreter\n"
    "from herder_agent.runtime.host import template_environment\n"
    "print(json.dumps([interpreter(sys.executable), template_environment(os.environ, None, {})]))"
)


def measure(conditions: Conditions) -> list[Figure]:
    """Sealed against naive."""
    need_modules(*STACK)
    with floor_of(STACK, 1) as naive, sealed_loop(STACK) as ours:
        return [ratio_of("fork-sealed", naive, ours, 0.5, conditions, "naive")]


def with_data(conditions: Conditions) -> list[Figure]:
    """With arrays in `setup` against without."""
    need_modules("numpy")
    size = data_bytes(8, conditions, 0.5)
    what = f"with {size / GIB:.1f} GiB of arrays"
    # One after the other: there is not room for two templates with so much.
    with sealed_loop(("numpy",)) as without, sealed_loop(("numpy",), size) as ours:
        fork = ratio_of("fork-with-data fork", without, ours, 1.1, conditions, "without", what)
    return [fork, _task_latency(size, what, conditions)]


def _task_latency(size: int, what: str, conditions: Conditions) -> Figure:
    import herder

    nothing = no_op()
    with_arrays = herder.Workload(
        "bench-with-data", preload=("numpy",), setup=setup_path("arrays"), env={SIZE_VARIABLE: str(size)}
    )
    workloads = [herder.Workload("bench-without-data", preload=("numpy",)), with_arrays]
    with cluster_of_one(conditions) as (_, client):
        views = [client.options(workload=each, name=str(each.name)) for each in workloads]
        calls = [lambda view=view: view.submit(nothing).result() for view in views]
        without_s, with_s = times_in_turn(calls, 4 * conditions.seconds)
        probe = views[1].submit(nothing)
        probe.result()
        method = probe.usage().start_method
    detail = f"{1e3 * median(with_s):.2f} ms {what}, {1e3 * median(without_s):.2f} ms without, by {method}"
    ratio = median(with_s) / median(without_s)
    return Figure("fork-with-data task", ratio, "times", 1.1, best_is_low=True, detail=detail)


def ratio_of(  # noqa: PLR0917
    name: str, base: Floor, ours: Floor, must: float, conditions: Conditions, of_base: str, what: str = "sealed"
) -> Figure:
    """Time of a fork over that of the base, both loops in turn."""
    ours_s, base_s = [], []
    for _ in range(RUNS):
        base_s.append(1 / base.rate(conditions.seconds))
        ours_s.append(1 / ours.rate(conditions.seconds))
    detail = f"{1e3 * median(ours_s):.2f} ms {what}, {1e3 * median(base_s):.2f} ms {of_base}, one core"
    runs = tuple(ours / base for ours, base in zip(ours_s, base_s, strict=True))
    return Figure(name, median(ours_s) / median(base_s), "times", must, best_is_low=True, detail=detail, runs=runs)


@contextmanager
def sealed_loop(modules: Sequence[str], size: int = 0) -> Iterator[Floor]:
    """A sealed template with this preload, and with arrays of so many bytes from `setup`, which forks in a loop."""
    done = subprocess.run([sys.executable, "-c", _ASK_THE_AGENT], stdout=subprocess.PIPE, text=True, check=True)
    interpreter, environ = json.loads(done.stdout)
    workload: dict[str, object] = {"key": "bench", "name": "bench", "start": "fork", "preload": list(modules)}
    workload |= {"max_tasks_per_child": 1, "blas_threads": 1, "immortal": True, "setup_name": "setup"}
    if size:
        workload["setup_import"] = setup_path("arrays")
    cpu = min(os.sched_getaffinity(0))
    command = (*interpreter, str(Path(sealed.__file__)), str(cpu), json.dumps(workload))
    with loops_of([command], {**environ, SIZE_VARIABLE: str(size)}) as found:
        yield found
