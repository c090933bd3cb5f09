"""Eight tasks read all of `setup`'s value at the same time: how much memory beyond one copy of it?

The value is 1 GB of arrays and 300 MB of Python objects (tuples of mixed objects). Each task sums every array and reads
every object, then stays, until all have. The measure is taken with all eight there, less with none: over the agent and
everything below it the sum of Pss of anonymous and file pages (each page divided by the number of processes that map
it, so that none is counted twice) and of page tables, and the kernel's Shmem, where each page of a memory file is
counted once, mapped or not: one copy of the value is in both, and goes. The fall of the kernel's own MemAvailable
stands beside it. Both include what a process costs anyway. Divided by the size of one copy.

Needs Python 3.12 or newer, where objects can be made immortal, with numpy: `--python`, else this interpreter, else one
on `PATH` or below pyenv.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from herder.cli.bench.data import FOLDER, NAME, OBJECTS_VARIABLE, SIZE_VARIABLE, by_bare_name
from herder.cli.bench.figure import RUN_TIMEOUT_S, Conditions, Figure, LeftOut, data_bytes
from herder_shared.errors import HerderError

TASKS = 8
ARRAY_GIB = 1.0
#: Of objects for each byte of arrays.
OBJECT_SHARE = 0.3
#: Idle children, and the memory of the run before, are gone or settled.
SETTLE_S = 1.0
_FITS = "import sys, numpy; sys.exit(sys.version_info < (3, 12))"


def measure(conditions: Conditions) -> list[Figure]:
    """Extra memory in per cent of one copy."""
    import herder

    python = conditions.python or find_python()
    size = data_bytes(ARRAY_GIB, conditions, 0.2)
    environ = {SIZE_VARIABLE: str(size), OBJECTS_VARIABLE: str(int(size * OBJECT_SHARE)), "PYTHONPATH": str(FOLDER)}
    in_tasks = by_bare_name()
    workload = herder.Workload(
        "bench-shared-memory", python=python, preload=("numpy",), setup=f"{NAME}:arrays_and_objects", env=environ
    )
    with (
        tempfile.TemporaryDirectory(prefix="herder-bench-") as folder,
        herder.LocalCluster(cores=TASKS) as cluster,
        cluster.client(workload=workload) as client,
    ):
        agent = next(process.pid for name, process in cluster.processes.items() if name != "coordinator")
        array_bytes, object_bytes = client.submit(in_tasks.sizes).result()
        time.sleep(SETTLE_S)
        base, free_before = tree_bytes(agent) + shared_bytes(), available_bytes()
        futures = [client.submit(in_tasks.read_all, folder, index) for index in range(TASKS)]
        _await_readers(folder)
        extra, fallen = tree_bytes(agent) + shared_bytes() - base, free_before - available_bytes()
        Path(folder, "gate").touch()
        answers = {future.result(RUN_TIMEOUT_S) for future in futures}
        method = futures[0].usage().start_method
        report = next(r for w in client.workloads() for r in w.reports.values() if w.name == workload.name)
    if len(answers) != 1:
        raise HerderError(f"tasks which read the same data found {answers}")
    copy = array_bytes + object_bytes
    immortal = f"{report.immortal_objects:,} objects immortal" if report.immortal_objects else report.immortal_off
    of = f"{array_bytes / 1e6:.0f} + {object_bytes / 1e6:.0f} MB"
    detail = (
        f"{extra / 1e6:.0f} MB for {TASKS} tasks over {of}, by {method}, "
        f"Python {report.python.partition('/')[0]}; {immortal}".rstrip("; ")
    )
    beside = f"{fallen / 1e6:.0f} MB, with whatever else this machine does"
    return [
        Figure("shared-memory", 100 * extra / copy, "% of one copy", 10.0, 3.0, best_is_low=True, detail=detail),
        Figure("shared-memory MemAvailable", 100 * fallen / copy, "% of one copy", best_is_low=True, detail=beside),
    ]


def find_python() -> str:
    """An interpreter of 3.12 or newer with numpy.

    Raises:
        LeftOut: there is none.
    """
    pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    candidates = [os.environ.get("HERDER_BENCH_PYTHON"), sys.executable]
    candidates += [shutil.which(f"python3.{minor}") for minor in (13, 12)]
    candidates += sorted(glob.glob(f"{pyenv}/versions/3.1[23]*/bin/python"), reverse=True)
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "-c", _FITS], capture_output=True, check=False).returncode == 0:
            return candidate
    raise LeftOut("no Python 3.12 or newer with numpy was found; name one with --python or HERDER_BENCH_PYTHON")


def tree_bytes(pid: int) -> int:
    """Pss of all but memory files, and page tables, of this process and of all below it."""
    return sum(_process_bytes(each) for each in (pid, *descendants(pid)))


def descendants(pid: int) -> list[int]:
    """The processes below this one."""
    found: list[int] = []
    queue = [pid]
    while queue:
        parent = queue.pop()
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                children = Path(f"/proc/{parent}/task/{task}/children").read_text().split()
                found += map(int, children)
                queue += map(int, children)
        except OSError:
            continue  # it has ended
    return found


def _process_bytes(pid: int) -> int:
    try:
        pss = sum(_kib(f"/proc/{pid}/smaps_rollup", f"Pss_{kind}:") for kind in ("Anon", "File"))
        return 1024 * (pss + _kib(f"/proc/{pid}/status", "VmPTE:"))
    except OSError:
        return 0  # it has ended


def shared_bytes() -> int:
    """All memory files and the like on this machine."""
    return 1024 * _kib("/proc/meminfo", "Shmem:")


def available_bytes() -> int:
    """What the kernel could still give without swapping."""
    return 1024 * _kib("/proc/meminfo", "MemAvailable:")


def _kib(path: str, field: str) -> int:
    with open(path, encoding="ascii", errors="replace") as file:
        return next((int(line.split()[1]) for line in file if line.startswith(field)), 0)


def _await_readers(folder: str) -> None:
    ends = time.monotonic() + RUN_TIMEOUT_S
    while len(os.listdir(folder)) < TASKS:
        if time.monotonic() > ends:
            raise HerderError(f"{TASKS} tasks did not read their data in {RUN_TIMEOUT_S:g} s")
        time.sleep(0.05)
