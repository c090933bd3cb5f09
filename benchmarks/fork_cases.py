"""What `make fork-table` does with each library: how it is used in `setup`, and the work that a task then does with it.

Two users. Tasks and templates import this module by name (so that any interpreter can, also one of another minor
version than Herder's), and `fork_table.py` runs it by path for the naive fork: `fork_cases.py NAME FORKS LIMIT_S`
imports the libraries, uses them, forks that many children at once, each of which does the task's work, and prints as
JSON how each of them ended. `fork_cases.py --serve` is the server, outside all of these processes, that sessions and
channels are connected to. Standard library only until a case asks for more.

A work function gets the task's number and `setup`'s value (None without `setup`). It raises when a result is wrong.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

#: Where the servers are (`--serve`), and the folder of this row's files.
URL_VARIABLE = "FORK_TABLE_URL"
GRPC_VARIABLE = "FORK_TABLE_GRPC"
FOLDER_VARIABLE = "FORK_TABLE_FOLDER"


class Case(NamedTuple):
    """One row. `setup` and `work` are functions of this module; `state` says in words what the template has done."""

    name: str
    library: str
    preload: tuple[str, ...]
    state: str
    work: Callable[[int, Any], None]
    setup: Callable[[], Any] | None = None
    env: tuple[tuple[str, str], ...] = ()


# --- numpy, scipy, pandas, scikit-learn -------------------------------------------------------------------------------


def numpy_use() -> Any:
    import numpy

    matrix = numpy.random.default_rng(1).random((600, 600))
    assert (matrix @ matrix).shape == (600, 600)
    return numpy.linalg.inv(matrix)


def numpy_work(index: int, inverse: Any) -> None:
    import numpy

    matrix = numpy.eye(200) * (index + 1)
    assert numpy.allclose(numpy.linalg.solve(matrix, matrix @ matrix), matrix)
    if inverse is not None:
        assert numpy.isfinite(inverse[:200] @ inverse[:, :200]).all()


def scipy_use() -> Any:
    import numpy
    import scipy.fft
    import scipy.linalg

    matrix = numpy.random.default_rng(1).random((256, 256))
    scipy.linalg.lu(matrix)
    return scipy.fft.fft2(matrix, workers=2)


def scipy_work(index: int, _shared: Any) -> None:
    import numpy
    import scipy.fft
    import scipy.linalg

    matrix = numpy.random.default_rng(index).random((64, 64))
    assert numpy.allclose(scipy.fft.ifft2(scipy.fft.fft2(matrix, workers=2), workers=2).real, matrix)
    assert numpy.allclose(scipy.linalg.expm(numpy.zeros((8, 8))), numpy.eye(8))


def pandas_use() -> Any:
    import pandas

    frame = pandas.DataFrame({"key": [n % 7 for n in range(50_000)], "value": range(50_000)})
    again = pandas.read_csv(io.StringIO(frame.to_csv(index=False)))
    assert again.groupby("key").value.sum().sum() == frame.value.sum()
    return frame


def pandas_work(index: int, frame: Any) -> None:
    import pandas

    mine = pandas.DataFrame({"key": ["a", "b"] * 50, "value": range(index, index + 100)})
    assert mine.groupby("key").value.sum().sum() == sum(range(index, index + 100))
    if frame is not None:
        assert frame.groupby("key").value.count().sum() == 50_000


def sklearn_use() -> Any:
    import numpy
    from sklearn.cluster import KMeans
    from sklearn.ensemble import HistGradientBoostingClassifier

    table = numpy.random.default_rng(1).random((2_000, 8))
    KMeans(4, n_init=1, random_state=1).fit(table)
    return HistGradientBoostingClassifier(max_iter=5, random_state=1).fit(table, table[:, 0] > 0.5)


def sklearn_work(index: int, model: Any) -> None:
    import numpy
    from sklearn.cluster import KMeans
    from sklearn.ensemble import HistGradientBoostingClassifier

    table = numpy.random.default_rng(index).random((300, 8))
    truth = table[:, 0] > 0.5
    model = model or HistGradientBoostingClassifier(max_iter=3, random_state=1).fit(table, truth)
    assert (model.predict(table) == truth).mean() > 0.9
    assert KMeans(2, n_init=1, random_state=1).fit(table).inertia_ > 0


# --- data frames and files --------------------------------------------------------------------------------------------


def polars_use() -> Any:
    import polars

    frame = polars.DataFrame({"key": [n % 7 for n in range(50_000)], "value": range(50_000)})
    frame.lazy().group_by("key").agg(polars.col("value").sum()).collect()
    return frame


def polars_work(index: int, frame: Any) -> None:
    import polars

    if frame is None:
        frame = polars.DataFrame({"key": [n % 7 for n in range(1_000)], "value": range(1_000)})
    total = frame.lazy().group_by("key").agg((polars.col("value") + index).sum()).collect()["value"].sum()
    assert total == sum(range(frame.height)) + index * frame.height


def pyarrow_use() -> Any:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"key": [n % 7 for n in range(50_000)], "value": list(range(50_000))})
    table.group_by("key").aggregate([("value", "sum")])
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return pyarrow.parquet.read_table(io.BytesIO(sink.getvalue()))


def pyarrow_work(index: int, table: Any) -> None:
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    if table is None:
        table = pyarrow.table({"key": [n % 7 for n in range(1_000)], "value": list(range(1_000))})
    sums = table.group_by("key").aggregate([("value", "sum")])["value_sum"]
    assert pyarrow.compute.sum(sums).as_py() == sum(range(len(table)))
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table.slice(index % 10, 100), sink)
    assert len(pyarrow.parquet.read_table(io.BytesIO(sink.getvalue()))) == 100


def h5py_use() -> Any:
    import h5py

    path = _own_file(f"{os.getpid()}.h5")  # setup may run in each child
    with h5py.File(path, "w") as file:
        file["values"] = list(range(1_000))
    return h5py.File(path, "r")


def h5py_closed() -> str:
    file = h5py_use()
    path: str = file.filename
    file.close()
    return path


def h5py_work(index: int, shared: Any) -> None:
    import h5py

    if shared is None:
        with h5py.File(f"task-{index}", "w", driver="core", backing_store=False) as file:
            file["values"] = [index] * 10
            assert file["values"][:].sum() == 10 * index
        return
    file = h5py.File(shared, "r") if isinstance(shared, str) else shared
    at = index % 1_000
    assert file["values"][at] == at


def duckdb_use() -> Any:
    import duckdb

    connection = duckdb.connect()
    connection.execute("create table numbers as select range as n from range(200000)")
    connection.execute("select n % 7, sum(n) from numbers group by 1").fetchall()
    return connection


def duckdb_work(index: int, connection: Any) -> None:
    import duckdb

    if connection is None:
        connection = duckdb.connect()
        connection.execute("create table numbers as select range as n from range(1000)")
    rows = connection.execute("select count(*), sum(n) from numbers").fetchall()
    assert rows[0][1] == sum(range(rows[0][0]))
    assert connection.execute("select ? + 1", [index]).fetchall() == [(index + 1,)]


def sqlite_use() -> Any:
    import sqlite3

    connection = sqlite3.connect(_own_file(f"{os.getpid()}.sqlite"), check_same_thread=False)
    connection.execute("create table numbers(n)")
    connection.executemany("insert into numbers values (?)", [(n,) for n in range(1_000)])
    connection.commit()
    return connection


def sqlite_closed() -> str:
    connection = sqlite_use()
    path: str = connection.execute("pragma database_list").fetchone()[2]
    connection.close()
    return path


def sqlite_work(index: int, shared: Any) -> None:
    import sqlite3

    if shared is None:
        shared = sqlite3.connect(":memory:")
        shared.execute("create table numbers(n)")
        shared.executemany("insert into numbers values (?)", [(n,) for n in range(1_000)])
    connection = sqlite3.connect(f"file:{shared}?mode=ro", uri=True) if isinstance(shared, str) else shared
    assert connection.execute("select sum(n) from numbers where n < ?", (index % 1000 + 1,)).fetchone()[0] == sum(
        range(index % 1_000 + 1)
    )


# --- compute and pictures ---------------------------------------------------------------------------------------------


def torch_use() -> Any:
    import torch

    weights = torch.rand(300, 300, requires_grad=True)
    (weights @ weights).relu().sum().backward()
    return weights.detach()


def torch_work(index: int, weights: Any) -> None:
    import torch

    mine = torch.full((200, 200), float(index + 1), requires_grad=True)
    (mine * 2).sum().backward()
    assert mine.grad is not None
    assert float(mine.grad.sum()) == 80_000.0
    product = (weights if weights is not None else torch.ones(300, 300)) @ torch.ones(300, 300)
    assert bool(torch.isfinite(product.sort().values).all())


def opencv_use() -> Any:
    import cv2
    import numpy

    image = numpy.random.default_rng(1).integers(0, 255, (480, 640, 3), dtype=numpy.uint8)
    return cv2.GaussianBlur(image, (9, 9), 2)


def opencv_work(index: int, image: Any) -> None:
    import cv2
    import numpy

    if image is None:
        image = numpy.full((240, 320, 3), index % 255, dtype=numpy.uint8)
    blurred = cv2.GaussianBlur(image, (9, 9), 2)
    assert cv2.resize(blurred, (64, 48)).shape == (48, 64, 3)
    assert cv2.imdecode(cv2.imencode(".png", blurred)[1], cv2.IMREAD_COLOR).shape == image.shape


def matplotlib_use() -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([1, 2, 3])
    figure.savefig(io.BytesIO(), format="png")
    return figure


def matplotlib_work(index: int, figure: Any) -> None:
    from matplotlib.figure import Figure

    figure = figure or Figure(figsize=(3, 2))
    figure.subplots().plot([index, index + 1])
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=40)
    assert sink.getvalue().startswith(b"\x89PNG")


def numba_use() -> Any:
    return _numba_sum()(_ones())


def numba_work(index: int, _shared: Any) -> None:
    assert _numba_sum()(_ones() * index) == 10_000 * index


def _numba_sum() -> Any:
    global _compiled, numba  # compiled in setup, and then inherited; else read from this row's cache
    if _compiled is None:
        import numba

        numba.config.CACHE_DIR = _own_file("numba")
        _compiled = numba.njit(parallel=True, cache=True)(_total)
    return _compiled


_compiled: Any = None
numba: Any = None


def _total(values: Any) -> float:
    found = 0.0
    for n in numba.prange(len(values)):
        found += values[n]
    return found


def _ones() -> Any:
    import numpy

    return numpy.ones(10_000)


def lightgbm_use() -> Any:
    import numpy

    table = numpy.random.default_rng(1).random((500, 8))
    return _lightgbm(table)


def lightgbm_work(index: int, model: Any) -> None:
    import numpy

    table = numpy.random.default_rng(index).random((500, 8))
    own = _lightgbm(table)
    assert ((own.predict(table) > 0.5) == (table[:, 0] > 0.5)).mean() > 0.9
    if model is not None:
        assert numpy.isfinite(model.predict(table)).all()


def _lightgbm(table: Any) -> Any:
    import lightgbm

    data = lightgbm.Dataset(table, label=table[:, 0] > 0.5)
    return lightgbm.train({"objective": "binary", "verbose": -1, "num_leaves": 7}, data, num_boost_round=5)


# --- connections, loops, executors ------------------------------------------------------------------------------------


class _Echo:
    """A gRPC server on a local socket which returns what it is sent; ours, so that no network is needed."""

    def __init__(self, name: str) -> None:
        from concurrent.futures import ThreadPoolExecutor

        import grpc

        self.address = f"unix:{_own_file(name)}"
        self._server = grpc.server(ThreadPoolExecutor(1))
        echo = grpc.unary_unary_rpc_method_handler(lambda content, _context: content)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("api", {"echo": echo}),))
        self._server.add_insecure_port(self.address)
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()


def _call(channel: Any, content: bytes) -> None:
    assert channel.unary_unary("/api/echo")(content, timeout=20) == content


def grpc_closed() -> None:
    import grpc

    server = _Echo(f"setup-{os.getpid()}.sock")
    with grpc.insecure_channel(server.address) as channel:
        _call(channel, b"hello")
    server.stop()


def grpc_open() -> Any:
    import grpc

    channel = grpc.insecure_channel(os.environ[GRPC_VARIABLE])
    _call(channel, b"hello")
    return channel


def grpc_work(index: int, channel: Any) -> None:
    import grpc

    content = str(index).encode()
    if channel is not None:
        _call(channel, content)
        return
    server = _Echo(f"task-{os.getpid()}.sock")
    with grpc.insecure_channel(server.address) as own:
        _call(own, content)
    server.stop()


def requests_use() -> Any:
    import requests

    session = requests.Session()
    session.trust_env = False
    assert session.get(os.environ[URL_VARIABLE] + "/hello", timeout=20).text == "/hello"
    return session


def requests_closed() -> None:
    requests_use().close()


def requests_work(index: int, session: Any) -> None:
    import requests

    if session is None:
        session = requests.Session()
        session.trust_env = False
    for turn in range(3):
        path = f"/{os.getpid()}-{index}-{turn}"
        assert session.get(os.environ[URL_VARIABLE] + path, timeout=20).text == path, "an answer to another's question"


def asyncio_use() -> Any:
    import asyncio

    loop = asyncio.new_event_loop()
    loop.run_until_complete(asyncio.sleep(0))
    return loop


def asyncio_executor() -> Any:
    loop = asyncio_use()
    assert loop.run_until_complete(loop.run_in_executor(None, pow, 2, 10)) == 1024
    return loop


def asyncio_closed() -> None:
    import asyncio

    loop = asyncio_executor()
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    asyncio.run(asyncio.sleep(0))


def asyncio_work(index: int, loop: Any) -> None:
    import asyncio

    async def both() -> tuple[int, int]:
        running = asyncio.get_running_loop()
        await asyncio.sleep(0)
        return index, await running.run_in_executor(None, pow, index, 2)

    answer = asyncio.run(both()) if loop is None else loop.run_until_complete(both())
    assert answer == (index, index**2)


def executor_use() -> Any:
    from concurrent.futures import ThreadPoolExecutor

    executor = ThreadPoolExecutor(1)  # every thread is there: the next task is queued to it
    assert executor.submit(pow, 2, 10).result() == 1024
    return executor


def executor_closed() -> None:
    executor_use().shutdown(wait=True)


def executor_work(index: int, executor: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    if executor is None:
        with ThreadPoolExecutor(2) as own:
            assert list(own.map(pow, (index, index), (2, 3))) == [index**2, index**3]
    else:
        assert executor.submit(pow, index, 2).result() == index**2


def _own_file(name: str) -> str:
    """A path in this row's own folder."""
    return os.path.join(os.environ.get(FOLDER_VARIABLE) or tempfile.gettempdir(), name)


_SKLEARN = ("sklearn.ensemble", "sklearn.cluster")
_GRPC_IN_USE = "an open channel, used"

CASES: tuple[Case, ...] = (
    Case("numpy", "numpy", ("numpy",), "imported", numpy_work),
    Case("numpy-used", "numpy", ("numpy",), "matmul, inv", numpy_work, numpy_use),
    Case("scipy", "scipy", ("scipy.fft", "scipy.linalg"), "imported", scipy_work),
    Case("scipy-used", "scipy", ("scipy.fft", "scipy.linalg"), "lu, fft2(workers=2)", scipy_work, scipy_use),
    Case("pandas", "pandas", ("pandas",), "imported", pandas_work),
    Case("pandas-used", "pandas", ("pandas",), "read_csv, groupby", pandas_work, pandas_use),
    Case("sklearn", "scikit-learn", _SKLEARN, "imported", sklearn_work),
    Case("sklearn-used", "scikit-learn", _SKLEARN, "KMeans and HistGradientBoosting fit", sklearn_work, sklearn_use),
    Case("polars", "polars", ("polars",), "imported", polars_work),
    Case("polars-used", "polars", ("polars",), "lazy group_by collected", polars_work, polars_use),
    Case("pyarrow", "pyarrow", ("pyarrow.parquet",), "imported", pyarrow_work),
    Case("pyarrow-used", "pyarrow", ("pyarrow.parquet",), "group_by, Parquet", pyarrow_work, pyarrow_use),
    Case("grpc", "grpcio", ("grpc",), "imported", grpc_work),
    Case("grpc-closed", "grpcio", ("grpc",), "server and channel used, closed", grpc_work, grpc_closed),
    Case("grpc-open", "grpcio", ("grpc",), _GRPC_IN_USE, grpc_work, grpc_open),
    Case(
        "grpc-open-no-support",
        "grpcio",
        ("grpc",),
        f"{_GRPC_IN_USE}, GRPC_ENABLE_FORK_SUPPORT=0",
        grpc_work,
        grpc_open,
        (("GRPC_ENABLE_FORK_SUPPORT", "0"),),
    ),
    Case("torch", "torch", ("torch",), "imported", torch_work),
    Case("torch-used", "torch", ("torch",), "matmul, backward", torch_work, torch_use),
    Case("opencv", "opencv-python-headless", ("cv2",), "imported", opencv_work),
    Case("opencv-used", "opencv-python-headless", ("cv2",), "GaussianBlur", opencv_work, opencv_use),
    Case("matplotlib", "matplotlib", ("matplotlib.figure",), "imported", matplotlib_work),
    Case("matplotlib-used", "matplotlib", ("matplotlib.figure",), "a figure saved", matplotlib_work, matplotlib_use),
    Case("h5py", "h5py", ("h5py",), "imported", h5py_work),
    Case("h5py-closed", "h5py", ("h5py",), "a file read and closed", h5py_work, h5py_closed),
    Case("h5py-open", "h5py", ("h5py",), "a file left open", h5py_work, h5py_use),
    Case("duckdb", "duckdb", ("duckdb",), "imported", duckdb_work),
    Case("duckdb-used", "duckdb", ("duckdb",), "an open connection, queried", duckdb_work, duckdb_use),
    Case("sqlite", "sqlite3", ("sqlite3",), "imported", sqlite_work),
    Case("sqlite-closed", "sqlite3", ("sqlite3",), "a connection used, closed", sqlite_work, sqlite_closed),
    Case("sqlite-open", "sqlite3", ("sqlite3",), "an open connection", sqlite_work, sqlite_use),
    Case("requests", "requests", ("requests",), "imported", requests_work),
    Case("requests-closed", "requests", ("requests",), "a session used, closed", requests_work, requests_closed),
    Case("requests-open", "requests", ("requests",), "a session with a kept connection", requests_work, requests_use),
    Case("asyncio", "asyncio", ("asyncio",), "imported", asyncio_work),
    Case("asyncio-closed", "asyncio", ("asyncio",), "run_in_executor used, loop closed", asyncio_work, asyncio_closed),
    Case("asyncio-loop", "asyncio", ("asyncio",), "an open loop, idle", asyncio_work, asyncio_use),
    Case("asyncio-executor", "asyncio", ("asyncio",), "an open loop with executor", asyncio_work, asyncio_executor),
    Case("executor-closed", "ThreadPoolExecutor", (), "used, shut down", executor_work, executor_closed),
    Case("executor-open", "ThreadPoolExecutor", (), "used, left open", executor_work, executor_use),
    Case("numba", "numba", ("numba", "numpy"), "imported", numba_work),
    Case("numba-used", "numba", ("numba", "numpy"), "prange, default layer", numba_work, numba_use),
    Case(
        "numba-omp",
        "numba",
        ("numba", "numpy"),
        "prange, OpenMP layer",
        numba_work,
        numba_use,
        (("NUMBA_THREADING_LAYER", "omp"),),
    ),
    Case("lightgbm", "lightgbm", ("lightgbm",), "imported", lightgbm_work),
    Case("lightgbm-used", "lightgbm", ("lightgbm",), "trained", lightgbm_work, lightgbm_use),
)  # fmt: skip


def task(name: str, index: int) -> int:
    """What each task runs under Herder."""
    import herder

    find(name).work(index, herder.shared())
    return index


def find(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)


# --- the naive fork ---------------------------------------------------------------------------------------------------


def fork_naively(case: Case, forks: int, limit_s: float) -> list[str]:
    """Import, use, fork so many at once. Each child's end: "ok", "hang", "signal N" or the exception's name."""
    for module in case.preload:
        importlib.import_module(module)
    shared = case.setup() if case.setup is not None else None
    children = {}
    for index in range(forks):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            _work_and_leave(case, index, shared, write)
        os.close(write)
        children[pid] = read
    statuses = _await_all(list(children), limit_s)
    return [_end_of(statuses[pid], pipe) for pid, pipe in children.items()]


def _await_all(pids: list[int], limit_s: float) -> dict[int, int | None]:
    """Wait status of each; None for those which used no processor time for `limit_s`, or never ended: they are
    killed."""
    statuses: dict[int, int | None] = {}
    ends_s = time.monotonic() + 10 * limit_s
    seen = dict.fromkeys(pids, (-1, 0.0))
    while len(statuses) < len(pids):
        for pid in pids:
            if pid in statuses:
                continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            used, since_s = _cpu_ticks(pid), time.monotonic()
            if used == seen[pid][0]:
                since_s = seen[pid][1]
            seen[pid] = used, since_s
            if ended:
                statuses[pid] = status
            elif time.monotonic() > min(since_s + limit_s, ends_s):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                statuses[pid] = None
        time.sleep(0.02)
    return statuses


def _cpu_ticks(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return -1
    return int(fields[11]) + int(fields[12])


def _work_and_leave(case: Case, index: int, shared: Any, pipe: int) -> None:
    try:
        case.work(index, shared)
        os.write(pipe, b"ok")
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the answer
        os.write(pipe, type(error).__name__.encode())
    finally:
        os._exit(0)


def _end_of(status: int | None, pipe: int) -> str:
    # Else a hung grandchild could hold the other end.
    os.set_blocking(pipe, False)
    try:
        said = os.read(pipe, 100).decode()
    except BlockingIOError:
        said = ""
    os.close(pipe)
    if status is None:
        return "hang"
    code = os.waitstatus_to_exitcode(status)
    return f"killed by {signal.Signals(-code).name}" if code < 0 else said or f"exit status {code}"


def serve() -> None:
    """Answer until stdin ends: gRPC with what it is sent, HTTP with the path that is asked for. Prints where."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept

        def do_GET(self) -> None:
            content = self.path.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    grpc_server = _Echo("server.sock")
    http_server = Server(("127.0.0.1", 0), Answer)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{http_server.server_port}"
    print(json.dumps({GRPC_VARIABLE: grpc_server.address, URL_VARIABLE: url}), flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve()
    print(json.dumps(fork_naively(find(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))), flush=True)
    os._exit(0)  # what was used may not let a process end
