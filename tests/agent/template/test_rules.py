"""Each rule of the audit, on the real thing where it can be had, else on the smallest thing that looks like it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from agent.template import driver
from herder_agent.template import rules
from support.requirements import require_program, unmet

# Nobody but this process can import a test module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "fork_safety.md"


def _found(running: driver.Template, step: str = "setup") -> list[driver.Head]:
    """What the audit found after a step, but for mere notes."""
    report = next(each for each in running.steps if each["step"] == step)
    return [finding for finding in report["findings"] if finding["verdict"] != "note"]


def _only(running: driver.Template, rule: str) -> driver.Head:
    """The one unsafe finding, which also moved the fork point and says why and what to do."""
    unsafe = [finding for finding in _found(running) if finding["verdict"] == "unsafe"]
    assert [finding["rule"] for finding in unsafe] == [rule]
    assert unsafe[0]["reason"]
    assert unsafe[0]["cure"]
    # With "setup" it is another process's setup, whose value is mapped.
    assert running.ready["fork_point"] != "setup" or running.ready["setup_mode"] == "mapped"
    assert unsafe[0]["seen"] in running.ready["reason"]
    assert unsafe[0]["cure"] in running.ready["reason"]
    return unsafe[0]


def _compile(folder: Path, name: str, source: str) -> str:
    compiler = require_program("gcc", "gcc")
    (folder / "it.c").write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / name, folder / "it.c"], check=True)
    return str(folder / name)


def test_rules_are_told_in_the_guide_as_they_are_in_the_code() -> None:
    assert rules.table() in GUIDE.read_text(), f"put this table into {GUIDE}:\n{rules.table()}"
    assert len({rule.id for rule in rules.RULES}) == len(rules.RULES)


# --- R1: Python threads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fed", [False, True], ids=["empty", "with its feeder thread"])
def test_multiprocessing_queue_is_not_carried_across_a_fork(fed: bool) -> None:
    def setup() -> Any:
        import multiprocessing

        queue: Any = multiprocessing.Queue()
        if fed:
            queue.put(1)
        return queue

    with driver.ready(setup) as running:
        assert running.ready["fork_point"] == "start"
        found = {finding["rule"]: finding for finding in _found(running)}
        assert found.keys() == ({"R1", "R6"} if fed else {"R6"})
        if fed:
            assert "QueueFeederThread" in found["R1"]["seen"]
            assert "join_thread" in found["R1"]["cure"]


def test_executor_that_was_shut_down_and_queue_that_was_closed_are_safe() -> None:
    def setup() -> None:
        import multiprocessing
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(abs, range(4))) == [0, 1, 2, 3]
        queue: Any = multiprocessing.Queue()
        queue.put(1)
        assert queue.get() == 1
        queue.close()
        queue.join_thread()

    with driver.ready(setup) as running:
        assert running.ready["fork_point"] == "setup", running.ready


# --- R2, R3: native threads ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_polars_used_in_setup_is_used_in_another_process_and_works_in_children() -> None:
    pytest.importorskip("polars")

    def query() -> Any:
        import polars

        return polars.DataFrame({"a": range(1000)}).group_by("a").agg(polars.len()).height

    with driver.ready(query, preload=["polars"]) as running:
        assert (running.ready["fork_point"], running.ready["setup_mode"]) == ("setup", "mapped")
        assert all(finding["rule"] in ("R2", "R3") for finding in _found(running))
        assert any("'polars-0'" in finding["seen"] for finding in _found(running))
        assert running.fork().run(query, threads=2) == 1000


@pytest.mark.slow
def test_arrow_used_in_setup_is_safe_and_works_in_children() -> None:
    pytest.importorskip("pyarrow")

    def sums() -> Any:
        import pyarrow

        table = pyarrow.table({"key": [n % 7 for n in range(1000)]})
        return table.group_by("key").aggregate([("key", "sum")]).num_rows

    with driver.ready(sums, preload=["pyarrow"]) as running:
        assert running.ready["fork_point"] == "setup"
        assert running.fork().run(sums, threads=2) == 7


@pytest.mark.slow
def test_open_grpc_channel_is_unsafe_and_a_closed_one_is_not() -> None:
    pytest.importorskip("grpc")

    def setup() -> Any:
        import grpc

        return grpc.insecure_channel("127.0.0.1:1")

    def setup_and_close() -> None:
        import grpc

        grpc.insecure_channel("127.0.0.1:1").close()

    with driver.ready(setup, preload=["grpc"]) as running:
        assert running.ready["fork_point"] == "import grpc"
        found = [finding for finding in _found(running) if finding["verdict"] == "unsafe"]
        assert {finding["rule"] for finding in found} == {"R2"}
        assert all("cygrpc" in finding["seen"] and "close channels" in finding["cure"] for finding in found)
        assert running.fork().run(lambda: 1) == 1
    with driver.ready(setup_and_close, preload=["grpc"]) as running:
        assert running.ready["fork_point"] == "setup"


# --- R4: threads of nobody known -----------------------------------------------------------------------------------

_THREAD = """
#include <pthread.h>
#include <unistd.h>
static void *wait_for_ever(void *unused) { for (;;) pause(); }
void begin(void) { pthread_t made; pthread_create(&made, 0, wait_for_ever, 0); pthread_setname_np(made, "lonely"); }
"""


def test_thread_of_an_unknown_library_is_decided_by_the_canary_or_allowed_by_name(tmp_path: Path) -> None:
    path = _compile(tmp_path, "libnobody_knows.so", _THREAD)

    def setup() -> None:
        import ctypes

        ctypes.CDLL(path).begin()

    with driver.ready(setup) as running:
        (finding,) = _found(running)
        assert (finding["rule"], finding["verdict"]) == ("R4", "unknown")
        assert finding["seen"] == "thread 'lonely' of libnobody_knows.so"
        assert 'allow_threads=("lonely",)' in finding["cure"]
        assert running.ready["fork_point"] == "setup"
    with driver.ready(setup, allow_threads=["lone*"]) as running:
        (finding,) = _found(running)
        assert (finding["rule"], finding["verdict"]) == ("R3", "allowed")
        assert "allow_threads" in finding["reason"]


# --- R5: GPUs ------------------------------------------------------------------------------------------------------

_CUDA = """
static int ready;
int cuInit(unsigned flags) { ready = 1; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return ready ? 0 : 3; }
"""


@pytest.mark.parametrize("initialised", [False, True])
def test_cuda_is_unsafe_once_it_is_initialised(initialised: bool, tmp_path: Path) -> None:
    path = _compile(tmp_path, "libcuda.so.1", _CUDA)

    def setup() -> None:
        import ctypes

        library = ctypes.CDLL(path)
        if initialised:
            library.cuInit(0)

    with driver.ready(setup) as running:
        if initialised:
            assert "libcuda.so.1 is initialised" in _only(running, "R5")["seen"]
        else:
            assert not _found(running)
            assert running.ready["fork_point"] == "setup"


# --- R6: descriptors -----------------------------------------------------------------------------------------------


def test_io_uring_is_unsafe() -> None:
    def setup() -> Any:
        import ctypes

        fd = ctypes.CDLL(None, use_errno=True).syscall(425, 4, ctypes.create_string_buffer(120))
        return fd if fd >= 0 else ctypes.get_errno()

    fd = setup()
    if not Path(f"/proc/self/fd/{fd}").exists() or fd < 3:
        unmet(f"this kernel gives no io_uring (errno {fd})")
    import os

    os.close(fd)
    with driver.ready(setup) as running:
        assert "io_uring" in _only(running, "R6")["seen"]


# --- R7: event loops -----------------------------------------------------------------------------------------------


def test_open_event_loop_is_unsafe_and_one_that_was_closed_is_not() -> None:
    def leave_open() -> Any:
        import asyncio

        loop = asyncio.new_event_loop()
        loop.run_until_complete(asyncio.sleep(0))
        return loop

    def close() -> Any:
        import asyncio

        asyncio.run(asyncio.sleep(0))

    def use() -> bool:
        import asyncio

        import herder

        done: bool = herder.shared().run_until_complete(asyncio.sleep(0, True))
        return done

    with driver.ready(leave_open) as running:
        assert "event loop" in _only(running, "R7")["seen"]
        # In a child which made its own it works.
        assert running.fork().run(use) is True
    with driver.ready(close) as running:
        assert running.ready["fork_point"] == "setup"
        assert not _found(running)


def test_loop_that_is_garbage_does_not_count() -> None:
    def setup() -> None:
        import asyncio

        loop: Any = asyncio.new_event_loop()
        loop.itself = loop
        loop._selector.close()
        loop._ssock.close()
        loop._csock.close()

    with driver.ready(setup) as running:
        assert running.ready["fork_point"] == "setup", running.ready


# --- R8: locks -----------------------------------------------------------------------------------------------------


def test_lock_left_held_is_unsafe_and_its_place_is_told() -> None:
    def setup() -> Any:
        import json
        import threading

        json.left_held = threading.Lock()  # type: ignore[attr-defined]
        json.left_held.acquire()  # type: ignore[attr-defined]

    with driver.ready(setup) as running:
        assert "json.left_held" in _only(running, "R8")["seen"]


def test_recursive_lock_is_unsafe_when_a_thread_that_is_gone_holds_it_and_safe_in_the_main_threads_hand() -> None:
    def gone() -> Any:
        import threading

        lock = threading.RLock()
        thread = threading.Thread(target=lock.acquire)
        thread.start()
        thread.join()
        return lock

    def own() -> Any:
        import threading

        lock = threading.RLock()
        lock.acquire()
        return lock

    def take() -> bool:
        import herder

        taken: bool = herder.shared().acquire(timeout=0.01)
        return taken

    with driver.ready(gone) as running:
        assert "a lock is held" in _only(running, "R8")["seen"]
    with driver.ready(own) as running:
        assert running.ready["fork_point"] == "setup"
        assert running.fork().run(take) is True


def test_lock_of_logging_held_by_a_thread_that_is_gone_is_unsafe() -> None:
    def setup() -> Any:
        import logging
        import threading

        handler = logging.StreamHandler()
        thread = threading.Thread(target=handler.acquire)
        thread.start()
        thread.join()
        logging.getLogger("of the user").addHandler(handler)

    with driver.ready(setup) as running:
        assert "logging.StreamHandler" in _only(running, "R8")["seen"]


# --- R9: numba's OpenMP layer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["omppool", "workqueue"])
def test_numbas_openmp_layer_is_unsafe_beside_gnu_openmp(layer: str, tmp_path: Path) -> None:
    # Only the names count: a module of numba's, and a library loaded as libgomp.
    path = _compile(tmp_path, "libgomp.so.1", "int of_no_use;")

    def setup() -> None:
        import ctypes
        import sys
        import types

        ctypes.CDLL(path)
        sys.modules[f"numba.np.ufunc.{layer}"] = types.ModuleType(layer)

    with driver.ready(setup) as running:
        if layer == "omppool":
            assert "NUMBA_THREADING_LAYER" in _only(running, "R9")["cure"]
        else:
            assert running.ready["fork_point"] == "setup"


# --- R10: MPI ------------------------------------------------------------------------------------------------------

_MPI = """
static int begun, ended;
int MPI_Init(void *a, void *b) { begun = 1; return 0; }
int MPI_Finalize(void) { ended = 1; return 0; }
int MPI_Initialized(int *flag) { *flag = begun; return 0; }
int MPI_Finalized(int *flag) { *flag = ended; return 0; }
"""


@pytest.mark.parametrize("calls", [(), ("MPI_Init",), ("MPI_Init", "MPI_Finalize")], ids=["loaded", "begun", "ended"])
def test_mpi_is_unsafe_between_init_and_finalize(calls: tuple[str, ...], tmp_path: Path) -> None:
    path = _compile(tmp_path, "libmpi.so.40", _MPI)

    def setup() -> None:
        import ctypes

        library = ctypes.CDLL(path)
        for name in calls:
            getattr(library, name)(None, None) if name == "MPI_Init" else getattr(library, name)()

    with driver.ready(setup) as running:
        if calls == ("MPI_Init",):
            assert "libmpi.so.40 is initialised" in _only(running, "R10")["seen"]
        else:
            assert running.ready["fork_point"] == "setup"
