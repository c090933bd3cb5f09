"""Real libraries, used in `setup` and again in tasks under `start="auto"`: right results, no hang, the fork point that
is right for each. For all libraries, and more of each, there is `make fork-table`."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import pytest

import herder

# The nodes cannot import the tests' modules: their functions travel by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [pytest.mark.slow, pytest.mark.module_state]

TASKS = 12
#: For all of them, under a loaded machine; a hang is for ever.
LIMIT_S = 90.0


class Library(NamedTuple):
    """`fork_points`: where the template may fork from after `use`; `work` gets its value and the task's number.

    "setup" also where `use` is not safe to fork after: then it ran in another process, and its value is mapped.
    """

    preload: tuple[str, ...]
    use: Callable[[], Any]
    work: Callable[[Any, int], Any]
    expected: Callable[[int], Any]
    fork_points: tuple[str, ...]


def use_numpy() -> Any:
    import numpy

    matrix = numpy.arange(90_000.0).reshape(300, 300)
    return matrix @ matrix


def work_numpy(product: Any, index: int) -> float:
    import numpy

    product[0, 0] = index  # ordinary and writeable, and of this task alone
    assert product[0, 0] == index
    return float((numpy.full((300, 300), 1.0) @ numpy.full((300, 300), index))[1, 1])


def use_sklearn() -> Any:
    import numpy
    from sklearn.ensemble import HistGradientBoostingClassifier

    table = numpy.random.default_rng(1).random((400, 4))
    return HistGradientBoostingClassifier(max_iter=3, random_state=1).fit(table, table[:, 0] > 0.5)


def work_sklearn(model: Any, index: int) -> bool:
    import numpy
    from sklearn.ensemble import HistGradientBoostingClassifier

    table = numpy.random.default_rng(index).random((200, 4))
    truth = table[:, 0] > 0.5
    own = HistGradientBoostingClassifier(max_iter=3, random_state=1).fit(table, truth)
    return bool((own.predict(table) == truth).mean() > 0.9 and (model.predict(table) == truth).mean() > 0.9)


def use_polars() -> Any:
    import polars

    frame = polars.DataFrame({"key": [n % 3 for n in range(3_000)], "value": range(3_000)})
    frame.lazy().group_by("key").agg(polars.col("value").sum()).collect()
    return frame


def work_polars(frame: Any, index: int) -> int:
    import polars

    sums = frame.lazy().group_by("key").agg((polars.col("value") * index).sum()).collect()
    return int(sums["value"].sum())


def use_pyarrow() -> Any:
    import pyarrow
    import pyarrow.compute

    table = pyarrow.table({"key": [n % 3 for n in range(3_000)], "value": list(range(3_000))})
    table.group_by("key").aggregate([("value", "sum")])
    return table


def work_pyarrow(table: Any, index: int) -> int:
    import pyarrow.compute

    sums = table.group_by("key").aggregate([("value", "sum")])["value_sum"]
    return int(pyarrow.compute.sum(sums).as_py()) + index


def call_grpc() -> bytes:
    """A server and a channel of its own, and one call."""
    import tempfile
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        handler = grpc.unary_unary_rpc_method_handler(lambda content, _context: content)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("api", {"echo": handler}),))
        server.add_insecure_port(f"unix:{folder}/socket")
        server.start()
        with grpc.insecure_channel(f"unix:{folder}/socket") as channel:
            answer: bytes = channel.unary_unary("/api/echo")(b"hello", timeout=30)
        server.stop(None).wait()
    return answer


def use_executor() -> Any:
    from concurrent.futures import ThreadPoolExecutor

    executor = ThreadPoolExecutor(1)
    assert executor.submit(pow, 2, 10).result() == 1024
    return executor


LIBRARIES = {
    "numpy": Library(("numpy",), use_numpy, work_numpy, lambda index: 300.0 * index, ("setup",)),
    "scikit-learn": Library(("sklearn.ensemble",), use_sklearn, work_sklearn, lambda index: True, ("setup",)),
    "polars": Library(("polars",), use_polars, work_polars, lambda index: index * sum(range(3_000)), ("setup",)),
    "pyarrow": Library(
        ("pyarrow",), use_pyarrow, work_pyarrow, lambda index: index + sum(range(3_000)), ("setup", "import pyarrow")
    ),
    "grpcio": Library(
        ("grpc",),
        call_grpc,
        lambda value, index: (value, call_grpc()),
        lambda index: (b"hello", b"hello"),
        ("setup", "import grpc"),
    ),
    # It cannot be pickled either: `setup` runs in each child.
    "executor": Library(
        ("concurrent.futures.thread",),
        use_executor,
        lambda executor, index: executor.submit(pow, index, 2).result(),
        lambda index: index**2,
        ("import concurrent.futures.thread",),
    ),
}


@pytest.fixture(scope="module")
def client() -> Iterator[herder.Client]:
    with herder.LocalCluster(cores=2) as cluster, cluster.client() as found:
        yield found


def run(name: str, index: int) -> Any:
    return LIBRARIES[name].work(herder.shared(), index)


@pytest.mark.parametrize("name", LIBRARIES)
def test_used_in_setup_and_in_tasks(client: herder.Client, name: str) -> None:
    library = LIBRARIES[name]
    workload = herder.Workload(f"library-{name}", preload=library.preload, setup=library.use)
    futures = [client.options(workload=workload).submit(run, name, index) for index in range(TASKS)]
    results = [future.result(LIMIT_S) for future in futures]
    assert results == [library.expected(index) for index in range(TASKS)]
    reports = [each for found in client.workloads() if found.name == workload.name for each in found.reports.values()]
    assert [each.start_method for each in reports] == ["fork"]
    assert reports[0].fork_point in library.fork_points
    assert not reports[0].demoted
    assert {future.usage().start_method for future in futures} == {"fork"}


NAIVE = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_libraries as t
library = t.LIBRARIES[sys.argv[1]]
shared = library.use()
pid = os.fork()
if pid == 0:
    library.work(shared, 1)
    os._exit(0)
print(pid, flush=True)
os.waitpid(pid, 0)
os._exit(0)
"""


@pytest.mark.parametrize(("name", "hangs"), [("numpy", False), ("polars", True), ("executor", True)])
def test_a_naive_fork_after_the_same_use(name: str, hangs: bool) -> None:
    """What `auto` protects from is real: the same work in a plain fork of the same process never ends."""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", NAIVE, name], stdout=subprocess.PIPE, text=True, env=environ
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        pidfd = os.pidfd_open(parent.pid)
        try:
            ended, _, _ = select.select([pidfd], [], [], 2.0 if hangs else 30.0)
            assert bool(ended) is not hangs
        finally:
            os.close(pidfd)
            if not ended:
                os.kill(pid, signal.SIGKILL)  # not reaped: its parent waits for it still
