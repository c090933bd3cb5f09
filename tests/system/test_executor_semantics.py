"""`herder.Client` behaves as the standard library documents executors and futures: a real cluster, point by point."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import herder
from support.leaks import wait_until

# The nodes cannot import the tests' modules, which lean on pytest's path: their functions travel by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [pytest.mark.slow, pytest.mark.module_state]


@pytest.fixture(scope="module")
def cluster() -> Iterator[herder.LocalCluster]:
    with herder.LocalCluster(cores=4, agents=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: herder.LocalCluster) -> Iterator[herder.Client]:
    with cluster.client() as client:
        yield client


def square(x: int) -> int:
    return x * x


def own_pid(*_: object) -> int:
    return os.getpid()


def wait_for_file(path: str) -> str:
    deadline_s = time.monotonic() + 30
    while not os.path.exists(path):
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    return path


def touch_and_sleep(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


def until_exists(path: Path) -> None:
    assert wait_until(path.exists, 20)


# --- submit, results, exceptions -------------------------------------------------------------------------------------


def test_each_task_has_a_process_of_its_own(client: herder.Client) -> None:
    pids = list(client.map(own_pid, range(10)))
    assert len(set(pids)) == 10
    assert os.getpid() not in pids


def test_lambdas_closures_and_local_classes_travel(client: herder.Client) -> None:
    factor = 7

    class Local:
        def __init__(self, x: int) -> None:
            self.x = x

    assert client.submit(lambda x: x * factor, 6).result(30) == 42
    assert client.submit(lambda it: it.x, Local(3)).result(30) == 3
    assert client.submit(lambda: Local(4)).result(30).x == 4


def test_a_changed_closure_is_never_stale(client: herder.Client) -> None:
    value = 0

    def read() -> int:
        return value

    futures = []
    for _ in range(3):
        futures.append(client.submit(read))
        value += 1
    assert [each.result(30) for each in futures] == [0, 1, 2]


def test_exception_is_raised_as_itself_with_the_remote_traceback(client: herder.Client) -> None:
    def divide(x: int) -> float:
        return 1 / x

    with pytest.raises(ZeroDivisionError) as caught:
        client.submit(divide, 0).result(30)
    assert "in divide" in str(caught.value.__cause__)
    future = client.submit(divide, 0)
    assert isinstance(future.exception(30), ZeroDivisionError)
    assert future.usage().attempt == 1


def test_unpicklable_result_names_the_task(client: herder.Client) -> None:
    with pytest.raises(herder.NotSerializable) as caught:
        client.submit(threading.Lock).result(30)
    assert caught.value.task_id


def test_unpicklable_exception_comes_as_text(client: herder.Client) -> None:
    def raise_odd() -> None:
        class Odd(Exception):
            def __init__(self) -> None:
                super().__init__("odd one")
                self.lock = threading.Lock()

        raise Odd

    with pytest.raises(herder.RemoteError, match="odd one") as caught:
        client.submit(raise_odd).result(30)
    assert "raise_odd" in caught.value.remote_traceback


def test_crashes_tell_signal_and_last_words(client: herder.Client) -> None:
    def crash() -> None:
        os.write(2, b"last words\n")
        os.kill(os.getpid(), signal.SIGSEGV)

    future = client.options(idempotent=False).submit(crash)
    with pytest.raises(herder.TaskCrashed) as caught:
        future.result(30)
    assert caught.value.signal == signal.SIGSEGV
    assert "last words" in str(caught.value)
    assert caught.value.node
    assert client.submit(square, 2).result(30) == 4


def test_timeout_of_a_task_is_a_task_timeout(client: herder.Client) -> None:
    with pytest.raises(herder.TaskTimeout):
        client.options(timeout=0.3).submit(time.sleep, 60).result(30)


def test_retries_run_the_task_again(client: herder.Client, tmp_path: Path) -> None:
    marker = tmp_path / "tried"

    def fail_once(path: str) -> str:
        if not os.path.exists(path):
            Path(path).touch()
            raise OSError("not yet")
        return "done"

    future = client.options(retries=1).submit(fail_once, str(marker))
    assert future.result(30) == "done"
    assert future.usage().attempt == 2


def test_result_waits_no_longer_than_its_timeout(client: herder.Client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    future = client.submit(wait_for_file, str(gate))
    with pytest.raises(TimeoutError):
        future.result(0.05)
    gate.touch()
    assert future.result(30) == str(gate)


def test_logs_are_the_tasks_output(client: herder.Client) -> None:
    def say() -> None:
        print("to stdout", flush=True)
        print("to stderr", file=sys.stderr, flush=True)

    future = client.submit(say)
    future.result(30)
    logs = future.logs()
    assert (logs.stdout, logs.stderr, logs.truncated) == (b"to stdout\n", b"to stderr\n", False)


def test_large_arguments_and_results(client: herder.Client) -> None:
    content = os.urandom(3_000_000)
    future = client.submit(bytes.__add__, content, b"x")
    assert future.result(60) == content + b"x"
    assert client.submit(len, future).result(60) == len(content) + 1


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_wait_and_as_completed_mixed_with_threads(client: herder.Client) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        futures: list[concurrent.futures.Future[Any]] = [client.submit(square, 3), pool.submit(square, 4)]
        assert {each.result() for each in concurrent.futures.as_completed(futures, 30)} == {9, 16}
        done, pending = concurrent.futures.wait(futures, 30)
        assert (len(done), len(pending)) == (2, 0)


def test_first_completed_and_first_exception(client: herder.Client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow: concurrent.futures.Future[Any] = client.submit(wait_for_file, str(gate))
    fast: concurrent.futures.Future[Any] = client.submit(square, 1)
    done, pending = concurrent.futures.wait([slow, fast], 30, return_when=concurrent.futures.FIRST_COMPLETED)
    assert (done, pending) == ({fast}, {slow})
    failing: concurrent.futures.Future[Any] = client.submit(int, "x")
    done, _ = concurrent.futures.wait([slow, failing], 30, return_when=concurrent.futures.FIRST_EXCEPTION)
    assert done == {failing}
    gate.touch()
    slow.result(30)


def test_callbacks_get_the_future_once(client: herder.Client) -> None:
    called: list[object] = []
    future = client.submit(square, 2)
    future.add_done_callback(called.append)
    future.result(30)
    assert wait_until(lambda: called == [future], 10)


def test_futures_work_in_asyncio(client: herder.Client) -> None:
    async def compute() -> list[Any]:
        loop = asyncio.get_running_loop()
        return [await loop.run_in_executor(client, square, 5), *await client.gather(client.submit(square, 6))]

    assert asyncio.run(compute()) == [25, 36]


# --- cancelling ------------------------------------------------------------------------------------------------------


def test_cancel_ends_a_running_task_and_its_descendants(client: herder.Client, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    def start_child_and_sleep(path: str) -> None:
        child = subprocess.Popen(["sleep", "60"])
        Path(path).write_text(f"{os.getpid()} {child.pid}")
        child.wait()

    future = client.submit(start_child_and_sleep, str(pid_file))
    assert wait_until(lambda: pid_file.exists() and len(pid_file.read_text().split()) == 2, 20)
    assert wait_until(future.running, 10)
    pids = [int(pid) for pid in pid_file.read_text().split()]
    assert future.cancel()
    assert future.cancelled()
    with pytest.raises(CancelledError):
        future.result()
    assert wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), 20)


def test_cancel_of_a_waiting_task_keeps_it_from_running(client: herder.Client, tmp_path: Path) -> None:
    gate, ran = tmp_path / "gate", tmp_path / "ran"
    blocker = client.submit(wait_for_file, str(gate))
    waiting = client.submit(lambda _, path: Path(path).touch(), blocker, str(ran))
    assert waiting.cancel()
    gate.touch()
    blocker.result(30)
    waiting.usage(30)
    assert not ran.exists()


def test_wait_for_kills_the_task_on_timeout(client: herder.Client, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    async def give_up() -> None:
        loop = asyncio.get_running_loop()
        task = loop.run_in_executor(client, touch_and_sleep, str(pid_file))
        while not pid_file.exists():  # noqa: ASYNC110 - a file of another process
            await asyncio.sleep(0.01)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(task, 0.05)

    asyncio.run(give_up())
    assert wait_until(lambda: bool(pid_file.read_text()), 10)
    pid = int(pid_file.read_text())
    assert wait_until(lambda: not os.path.exists(f"/proc/{pid}"), 20)


# --- dependencies ----------------------------------------------------------------------------------------------------


def test_dependencies_carry_values(client: herder.Client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    first = client.submit(wait_for_file, str(gate))
    second = client.submit(lambda d: d["path"][0] + "!", {"path": [first]})
    box = [second]
    third = client.submit(lambda: "".join(str(each) for each in box).upper())  # in a closure, as its value
    gate.touch()
    assert third.result(30) == str(gate).upper() + "!"


def test_failed_dependency_is_told_with_its_root(client: herder.Client) -> None:
    failed = client.submit(int, "x")
    dependant = client.submit(square, failed)
    with pytest.raises(herder.DependencyFailed) as caught:
        client.submit(square, dependant).result(30)
    assert caught.value.task_id == failed.task_id
    assert isinstance(caught.value.__cause__, ValueError)


def test_cancelled_dependency_cancels(client: herder.Client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    first = client.submit(wait_for_file, str(gate))
    second = client.submit(str, first)
    first.cancel()
    with pytest.raises(CancelledError):
        second.result(30)


# --- map and array ---------------------------------------------------------------------------------------------------


def test_map_is_lazy_with_a_buffersize_and_times_out(client: herder.Client, tmp_path: Path) -> None:
    assert list(client.map(square, range(20), buffersize=4)) == [i * i for i in range(20)]
    gate = tmp_path / "gate"
    results = client.map(wait_for_file, [str(gate)], timeout=0.1)
    with pytest.raises(TimeoutError):
        next(results)
    gate.touch()


def test_array_of_thousands(client: herder.Client) -> None:
    view = client.options(workload=herder.Workload(max_tasks_per_child=None))
    job = view.array(square, range(2_000))
    assert job.wait(100)
    assert list(job.results()) == [i * i for i in range(2_000)]
    assert job.status().tasks == 2_000


def test_commands_run(client: herder.Client) -> None:
    completed = client.command(["cat"], stdin=b"hello").result(30)
    assert (completed.returncode, completed.stdout) == (0, b"hello")
    with pytest.raises(herder.CommandFailed) as caught:
        client.command("echo no >&2; exit 3").result(30)
    assert caught.value.completed.returncode == 3
    assert caught.value.completed.stderr == b"no\n"
    assert client.command("exit 4", check=False).result(30).returncode == 4
    job = client.command_array([["echo", str(i)] for i in range(5)])
    assert [each.text() for each in job.results(30)] == [f"{i}\n" for i in range(5)]


# --- workloads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["fork", "fresh"])
def test_shared_value_of_setup_reaches_the_tasks(client: herder.Client, start: Any) -> None:
    offset = 100
    workload = herder.Workload(f"shared-{start}", start=start, setup=lambda: {"offset": offset})

    def add(x: int) -> tuple[int, int]:
        shared = herder.shared()
        return shared["offset"] + x, herder.task().attempt

    view = client.options(workload=workload)
    assert [value for value, _ in view.map(add, range(3))] == [100, 101, 102]
    assert view.submit(square, 2).usage(30).start_method == start


def test_setup_that_raises_fails_its_tasks(client: herder.Client) -> None:
    def broken() -> None:
        raise RuntimeError("no data here")

    view = client.options(workload=herder.Workload("broken", setup=broken))
    with pytest.raises(herder.SetupFailed, match="no data here"):
        view.submit(square, 1).result(60)


def test_reused_children_run_many_tasks(client: herder.Client) -> None:
    view = client.options(workload=herder.Workload(max_tasks_per_child=None))
    assert len(set(view.map(own_pid, range(50)))) < 50


def test_request_that_no_node_can_meet_is_unschedulable(client: herder.Client) -> None:
    with pytest.raises(herder.Unschedulable, match="900"):
        client.options(cores=900).submit(square, 1).result(30)


def test_outside_a_task_there_is_nothing_shared() -> None:
    with pytest.raises(RuntimeError, match="inside a task"):
        herder.shared()
    with pytest.raises(RuntimeError, match="inside a task"):
        herder.task()


# --- programs --------------------------------------------------------------------------------------------------------


def run_script(text: str, cluster: herder.LocalCluster, folder: Path, timeout_s: float = 60) -> str:
    """Run a program that uses the cluster. Its output, when it succeeded."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(text))
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env={**os.environ, **cluster.environ},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_interpreter_exit_waits_for_pending_work(cluster: herder.LocalCluster, tmp_path: Path) -> None:
    script = """
        import herder, os, pathlib, time
        def work(path):
            time.sleep(0.3)
            pathlib.Path(path).touch()
        client = herder.Client()
        future = client.submit(work, os.path.abspath("done"))
        future.add_done_callback(lambda future: print("called back", future.exception()))
    """
    assert run_script(script, cluster, tmp_path) == "called back None\n"
    assert (tmp_path / "done").exists()


def test_module_beside_the_script_and_main_functions_work(cluster: herder.LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("def triple(x):\n    return 3 * x\n")
    script = """
        import herder
        from beside import triple
        FACTOR = 2
        def both(x):
            return FACTOR * triple(x)
        with herder.Client() as client:
            print(client.submit(both, 5).result(30), client.submit(triple, 5).result(30))
    """
    assert run_script(script, cluster, tmp_path) == "30 15\n"


def test_forked_child_is_told_to_make_a_new_client(cluster: herder.LocalCluster, tmp_path: Path) -> None:
    script = """
        import herder, os, sys
        client = herder.Client()
        future = client.submit(abs, -3)
        assert future.result(30) == 3
        pid = os.fork()
        if pid == 0:
            for call in (lambda: client.submit(abs, 1), lambda: client.map(abs, [1]), client.nodes, client.shutdown):
                try:
                    call()
                except herder.HerderError as error:
                    assert "made before a fork; make a new Client" in str(error), error
                else:
                    os._exit(2)
            with herder.Client() as own:
                assert own.submit(abs, -4).result(30) == 4
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        print(client.submit(abs, -5).result(30))
    """
    assert run_script(script, cluster, tmp_path) == "5\n"


def test_ctrl_c_cancels_and_leaves_nothing(cluster: herder.LocalCluster, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import herder, os, pathlib, time
            def work(path):
                pathlib.Path(path).write_text(str(os.getpid()))
                time.sleep(60)
            with herder.Client() as client:
                client.submit(work, os.path.abspath("pid")).result()
            """
        )
    )
    program = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, **cluster.environ},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert wait_until(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()), 30)
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=30)
    finally:
        program.kill()
        program.wait()
    assert "KeyboardInterrupt" in errors
    pid = int((tmp_path / "pid").read_text())
    assert wait_until(lambda: not os.path.exists(f"/proc/{pid}"), 20)


# --- shutdown --------------------------------------------------------------------------------------------------------


def test_shutdown_waits_and_refuses(cluster: herder.LocalCluster) -> None:
    client = cluster.client()
    future = client.submit(time.sleep, 0.2)
    client.shutdown()
    assert future.done()
    with pytest.raises(RuntimeError, match="after shutdown"):
        client.submit(square, 1)


def test_shutdown_without_wait_returns_at_once(cluster: herder.LocalCluster, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    client = cluster.client()
    future = client.submit(wait_for_file, str(gate))
    client.shutdown(wait=False)
    assert not future.done()
    gate.touch()
    assert future.result(30) == str(gate)


def test_shutdown_cancels_what_waits_and_never_kills_what_runs(cluster: herder.LocalCluster, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    client = cluster.client(cores=2)
    running = [client.submit(wait_for_file, str(gate)) for _ in range(2)]
    assert wait_until(lambda: all(each.running() for each in running), 30)
    waiting = [client.submit(str, i) for i in range(10)]

    def open_gate_once_cancelled() -> None:
        if wait_until(lambda: all(each.cancelled() for each in waiting), 30):
            gate.touch()

    thread = threading.Thread(target=open_gate_once_cancelled)
    thread.start()
    client.shutdown(wait=True, cancel_futures=True)
    thread.join()
    assert [each.result(0) for each in running] == [str(gate)] * 2
    assert all(each.cancelled() for each in waiting)


def test_who_looks_for_his_own_job_still_gets_his_results(client: herder.Client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    future, array = client.submit(wait_for_file, str(gate)), client.array(wait_for_file, [str(gate)])
    shown = [client.job(each).status().tasks for each in (future.job_id, array.id) for _ in range(2)]
    assert min(shown) >= 1
    again = client.job(array.id)
    gate.touch()
    expected = future.result(60)
    assert list(array.results(60)) == list(again.results(60)) == [expected]


def test_job_is_found_by_another_client(cluster: herder.LocalCluster, client: herder.Client) -> None:
    job = client.array(square, range(4), name="found")
    assert job.wait(30)
    with cluster.client() as other:
        assert [each.name for each in other.jobs() if each.job == job.id] == ["found"]
        assert other.job(job.id).status().tasks == 4
        with pytest.raises(herder.JobNotFound):
            other.job("f" * 16)
