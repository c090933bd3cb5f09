"""Limits and accounts of attempts, by control groups (where this machine has them) and by the watcher alone.

A real agent with real templates and children, under a coordinator in miniature.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest

from herder_shared.ids import WorkloadKey
from herder_shared.states import Cause, Outcome
from herder_shared.wire.messages import AttemptEnd, CommandSpec, TaskOptions, WorkloadSpec
from support.agent_peer import Coordinator, running
from support.cgroups import group_for_an_agent
from support.requirements import unmet

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [pytest.mark.module_state, pytest.mark.slow]

MIB = 1 << 20
LIMITED = TaskOptions(memory_bytes=60 * MIB)


def workload(letter: str, **fields: object) -> WorkloadSpec:
    return WorkloadSpec(WorkloadKey(letter * 16), **fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["groups", "watcher"])
def coordinator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    """Of an agent with one core."""
    with group_for_an_agent() as flags:
        chosen = ("--cgroup", "off") if request.param == "watcher" else flags
        with running(tmp_path_factory.mktemp("agent"), 1, *chosen, "--pids", "100") as (found, _):
            assert found.hello is not None
            assert found.hello.node is not None
            limits = found.hello.node.limits
            if request.param == "groups" and not limits.startswith("control groups v"):
                unmet(limits)
            yield found


@pytest.fixture
def has_groups(request: pytest.FixtureRequest) -> bool:
    return "groups" in request.node.callspec.id


def hog(size_bytes: int) -> int:
    """Touch so much, over some time."""
    kept = []
    for _ in range(size_bytes // MIB):
        kept.append(bytearray(b"x" * MIB))
        time.sleep(0.005)
    return len(kept)


def hog_below(size_bytes: int) -> int:
    """As `hog`, in a process of its own."""
    code = f"import time\nkept = []\nfor _ in range({size_bytes // MIB}): kept.append(b'x' * {MIB}); time.sleep(0.005)"
    return subprocess.run([sys.executable, "-c", code], check=True).returncode


def assert_over_the_limit(end: AttemptEnd, has_groups: bool) -> None:
    assert end.outcome is Outcome.OUT_OF_MEMORY, end
    assert end.failure is not None
    assert end.failure.limit_bytes == 60 * MIB
    assert str(60 * MIB) in end.failure.message
    assert end.usage.peak_memory_bytes >= 60 * MIB
    assert end.usage.memory_source == ("cgroup" if has_groups else "sampled")


@pytest.mark.parametrize("start", ["fork", "fresh"])
def test_too_much_memory_is_told_with_peak_and_limit(coordinator: Coordinator, has_groups: bool, start: str) -> None:
    spec = workload("f", start="fresh") if start == "fresh" else None
    end = coordinator.end_of(coordinator.start(hog, 300 * MIB, workload=spec, options=LIMITED))
    assert_over_the_limit(end, has_groups)
    assert end.usage.start_method == start


def test_too_much_memory_of_a_process_below_counts(coordinator: Coordinator, has_groups: bool) -> None:
    assert_over_the_limit(coordinator.end_of(coordinator.start(hog_below, 300 * MIB, options=LIMITED)), has_groups)


def test_too_much_memory_of_a_command_counts(coordinator: Coordinator, has_groups: bool) -> None:
    code = f"import time\nkept = []\nwhile True: kept.append(b'x' * {MIB}); time.sleep(0.005)"
    end = coordinator.end_of(coordinator.run(CommandSpec(argv=(sys.executable, "-c", code)), LIMITED))
    assert_over_the_limit(end, has_groups)


def test_death_by_its_own_hand_is_a_crash_although_there_is_a_limit(coordinator: Coordinator) -> None:
    end = coordinator.end_of(coordinator.start(lambda: os.kill(os.getpid(), signal.SIGKILL), options=LIMITED))
    assert end.outcome is Outcome.CRASHED
    assert end.failure is not None
    assert (end.failure.cause, end.failure.signal) == (Cause.SIGNAL, signal.SIGKILL)


def test_memory_error_of_the_tasks_own_stays_its_exception(coordinator: Coordinator) -> None:
    end = coordinator.end_of(coordinator.start(lambda: bytearray(1 << 62), options=LIMITED))
    assert end.outcome is Outcome.FAILED
    assert end.failure is not None
    assert (end.failure.cause, end.failure.type_name) == (Cause.EXCEPTION, "MemoryError")


def test_each_task_of_one_child_has_its_own_peak(coordinator: Coordinator, has_groups: bool) -> None:
    """A child's second task does not inherit the first one's."""
    reused = workload("r", max_tasks_per_child=0)

    def task(size: int) -> int:
        kept = b"x" * size
        time.sleep(0.6)
        return len(kept) and os.getpid()

    options = TaskOptions(memory_bytes=200 * MIB)
    attempts = [coordinator.start(task, size * MIB, workload=reused, options=options) for size in (50, 1)]
    assert coordinator.value_of(attempts[0]) == coordinator.value_of(attempts[1])
    peaks = [coordinator.ends[attempt].usage.peak_memory_bytes / MIB for attempt in attempts]
    assert 50 <= peaks[0] < 80
    assert peaks[1] < 30
    source = coordinator.ends[attempts[1]].usage.memory_source
    assert source == ("cgroup" if has_groups else "sampled")


def spread_out(count: int) -> int:
    """Leave so many daemons, each of its own session and with no parent here."""
    for _ in range(count):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(60)
            os._exit(0)
        time.sleep(0.005)
    time.sleep(30)
    return count


def test_too_many_processes_are_refused_or_end_the_attempt_and_none_is_left(
    coordinator: Coordinator, has_groups: bool
) -> None:
    attempt = coordinator.start(spread_out, 40, workload=workload("n", pids=20))
    end = coordinator.end_of(attempt)
    assert end.failure is not None
    if has_groups:
        assert (end.outcome, end.failure.type_name) == (Outcome.FAILED, "BlockingIOError")
    else:
        assert end.outcome is Outcome.CRASHED
        assert "its limit (pids) is 20" in end.failure.message
    # The one slot there is is free only when they are gone.
    assert coordinator.value_of(coordinator.start(processes_of, str(attempt_mark(attempt)))) == []


def test_node_bounds_the_processes_of_who_does_not_say(coordinator: Coordinator) -> None:
    attempt = coordinator.start(spread_out, 150)
    end = coordinator.end_of(attempt)
    assert end.outcome is Outcome.CRASHED
    assert end.failure is not None
    assert "its limit (pids) is 100" in end.failure.message
    assert coordinator.value_of(coordinator.start(processes_of, attempt_mark(attempt))) == []


def leave_a_daemon() -> int:
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(write, str(os.getpid()).encode())
            os.closerange(0, 64)
            time.sleep(60)
        os._exit(0)
    return int(os.read(read, 100))


@pytest.mark.parametrize("options", [TaskOptions(), LIMITED], ids=["free", "limited"])
def test_daemon_is_gone_before_the_slot_is_free(coordinator: Coordinator, options: TaskOptions) -> None:
    daemon = coordinator.value_of(coordinator.start(leave_a_daemon, options=options))
    assert coordinator.value_of(coordinator.start(os.path.exists, f"/proc/{daemon}")) is False


def attempt_mark(attempt: object) -> str:
    epoch, n = attempt.epoch, attempt.n  # type: ignore[attr-defined]
    return f"{epoch}.{n}"


def processes_of(mark: str) -> list[int]:
    """Processes which that attempt started; called in a task."""
    ending = f"/{mark}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                environ = (entry / "environ").read_bytes()
            except OSError:
                continue
            if b"HERDER_ATTEMPT=" in environ and ending in environ:
                found.append(int(entry.name))
    return found


def test_what_goes_to_storage_is_accounted_and_what_does_not_is_not(coordinator: Coordinator, tmp_path: Path) -> None:
    def task(folder: str, size: int) -> None:
        with open(f"{folder}/file", "wb") as file:
            file.write(b"x" * size)
            file.flush()
            os.fsync(file.fileno())
        subprocess.run(["sh", "-c", f"cat {folder}/file > {folder}/copy; sync {folder}/copy"], check=True)

    usage = coordinator.end_of(coordinator.start(task, str(tmp_path), 4 * MIB)).usage
    assert 8 * MIB <= usage.write_bytes < 16 * MIB
    assert coordinator.end_of(coordinator.start(len, "abc")).usage.write_bytes == 0


def test_processor_time_of_processes_below_is_accounted(coordinator: Coordinator) -> None:
    code = "import time\nwhile time.process_time() < 0.3: pass"
    usage = coordinator.end_of(
        coordinator.start(lambda: subprocess.run([sys.executable, "-c", code], check=True) and None)
    )
    assert 0.3 <= usage.usage.cpu_user_s + usage.usage.cpu_system_s < 3


def grow() -> None:
    hog(160 * MIB)


@pytest.mark.parametrize("start", ["fork", "fresh"])
def test_setup_over_the_workloads_own_limit_fails_with_limit_and_size(coordinator: Coordinator, start: str) -> None:
    letter = {"fork": "g", "fresh": "h"}[start]
    spec = workload(letter, setup=cloudpickle.dumps(grow), memory_bytes=80 * MIB, start=start)
    end = coordinator.end_of(coordinator.start(os.getpid, workload=spec))
    assert end.outcome is Outcome.FAILED
    assert end.failure is not None
    assert end.failure.cause is Cause.SETUP_FAILED
    assert f"its limit is {80 * MIB}" in end.failure.message
    assert "while it was set up" in end.failure.message


def test_limit_of_the_workload_is_not_its_tasks(coordinator: Coordinator) -> None:
    spec = workload("j", memory_bytes=100 * MIB)
    assert coordinator.value_of(coordinator.start(hog, 150 * MIB, workload=spec)) == 150


@pytest.mark.parametrize(("threads", "expected"), [("cores", "1"), (3, "3")])
def test_numerical_libraries_get_the_threads_of_the_slot_or_as_said(
    coordinator: Coordinator, threads: int | str, expected: str
) -> None:
    def task() -> tuple[str | None, set[int]]:
        import numpy as np  # noqa: F401 - brings its BLAS in
        import threadpoolctl

        counts = {each["num_threads"] for each in threadpoolctl.threadpool_info() if each["user_api"] == "blas"}
        return os.environ.get("OPENBLAS_NUM_THREADS"), counts

    for number, start in enumerate(("fork", "fresh")):
        spec = workload(f"{number}" if threads == 3 else f"{number + 2}", blas_threads=threads, start=start)
        spec = WorkloadSpec(
            **{f: getattr(spec, f) for f in spec.__struct_fields__ if f != "preload"}, preload=("numpy",)
        )
        assert coordinator.value_of(coordinator.start(task, workload=spec)) == (expected, {int(expected)})


def test_command_is_told_the_threads_of_its_slot(coordinator: Coordinator) -> None:
    end = coordinator.end_of(coordinator.run(CommandSpec(shell="echo $OMP_NUM_THREADS")))
    assert end.logs is not None
    assert end.logs.stdout == b"1\n"
