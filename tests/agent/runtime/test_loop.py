"""A real agent with real templates and children, under a coordinator in miniature."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from herder_shared.ids import WorkloadKey
from herder_shared.limits import BLOB_BYTES_MAX, LOG_HEAD_BYTES, LOG_TAIL_BYTES
from herder_shared.states import Cause, Outcome
from herder_shared.wire.messages import CommandSpec, TaskOptions, WorkloadSpec
from support.agent_peer import AgentProcess, Coordinator, running

pytestmark = [pytest.mark.module_state, pytest.mark.slow]


def workload(letter: str, **fields: object) -> WorkloadSpec:
    return WorkloadSpec(WorkloadKey(letter * 16), **fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Coordinator, AgentProcess]]:
    with running(tmp_path_factory.mktemp("agent")) as both:
        yield both


@pytest.fixture
def coordinator(pair: tuple[Coordinator, AgentProcess]) -> Coordinator:
    return pair[0]


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] != b"Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline_s, [pid for pid in pids if is_alive(pid)]
        time.sleep(0.01)


def test_forked_task_returns_its_value_usage_and_output(coordinator: Coordinator) -> None:
    def task(number: int) -> int:
        print("said")
        print("complained", file=sys.stderr)
        return number + 1

    attempt = coordinator.start(task, 41)
    assert coordinator.value_of(attempt) == 42
    end = coordinator.ends[attempt]
    assert end.outcome is Outcome.SUCCEEDED
    assert end.logs is not None
    assert (end.logs.stdout, end.logs.stderr, end.logs.truncated) == (b"said\n", b"complained\n", False)
    usage = end.usage
    assert (usage.node, usage.attempt, usage.start_method, usage.memory_source) == ("n1", 1, "fork", "sampled")
    assert 0 < usage.start_s < usage.core_s
    assert usage.cpu_user_s + usage.cpu_system_s > 0


def test_each_forked_task_has_a_process_of_its_own(coordinator: Coordinator) -> None:
    attempts = [coordinator.start(os.getpid) for _ in range(8)]
    assert len({coordinator.value_of(attempt) for attempt in attempts}) == 8


def test_fresh_task_runs_in_an_interpreter_that_was_not_forked_from_the_template(coordinator: Coordinator) -> None:
    def program() -> bytes:
        return Path("/proc/self/cmdline").read_bytes()

    attempt = coordinator.start(program, start="fresh")
    assert b"fresh.py" in coordinator.value_of(attempt)
    assert coordinator.ends[attempt].usage.start_method == "fresh"
    assert b"main.py" in coordinator.value_of(coordinator.start(program))


def test_children_are_reused_when_the_workload_allows_it(coordinator: Coordinator) -> None:
    def task(text: str) -> int:
        print(text)
        return os.getpid()

    reused = workload("r", max_tasks_per_child=0)
    pids = set()
    for number in range(6):
        attempt = coordinator.start(task, str(number), workload=reused)
        pids.add(coordinator.value_of(attempt))
        logs = coordinator.ends[attempt].logs
        assert logs is not None
        assert logs.stdout == f"{number}\n".encode()
    assert len(pids) == 1


def test_exception_comes_back_pickled_with_its_traceback(coordinator: Coordinator) -> None:
    def task() -> None:
        raise ValueError("no good")

    end = coordinator.end_of(coordinator.start(task))
    assert end.outcome is Outcome.FAILED
    assert end.failure is not None
    assert end.failure.cause is Cause.EXCEPTION
    assert end.failure.type_name.endswith("ValueError")
    assert end.failure.pickled
    assert "no good" in end.failure.traceback


def test_killed_child_is_a_crash_that_names_the_signal_and_shows_stderr(coordinator: Coordinator) -> None:
    def task() -> None:
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    end = coordinator.end_of(coordinator.start(task))
    assert end.outcome is Outcome.CRASHED
    assert end.failure is not None
    assert (end.failure.cause, end.failure.signal) == (Cause.SIGNAL, signal.SIGKILL)
    assert "last words" in end.failure.stderr_tail


def test_exit_without_an_answer_is_a_crash_with_its_status(coordinator: Coordinator) -> None:
    end = coordinator.end_of(coordinator.start(os._exit, 7))
    assert end.outcome is Outcome.CRASHED
    assert end.failure is not None
    assert (end.failure.cause, end.failure.exit_status) == (Cause.EXIT, 7)


def test_output_beyond_the_cap_keeps_head_and_tail_and_never_blocks_the_task(coordinator: Coordinator) -> None:
    def task() -> None:
        os.write(1, b"first")
        for _ in range(200):
            os.write(1, b"x" * 65536)
        os.write(1, b"last")

    end = coordinator.end_of(coordinator.start(task))
    assert end.outcome is Outcome.SUCCEEDED
    assert end.logs is not None
    assert end.logs.stdout.startswith(b"first")
    assert end.logs.stdout.endswith(b"last")
    assert len(end.logs.stdout) <= LOG_HEAD_BYTES + LOG_TAIL_BYTES
    assert end.logs.truncated


def test_timeout_ends_a_task_that_ignores_sigterm(coordinator: Coordinator) -> None:
    def task() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)

    end = coordinator.end_of(coordinator.start(task, options=TaskOptions(timeout_s=0.3)))
    assert end.outcome is Outcome.TIMED_OUT
    assert end.failure is not None
    assert end.failure.cause is Cause.TIMEOUT


def test_cancel_kills_descendants_and_daemons_with_the_task(coordinator: Coordinator, tmp_path: Path) -> None:
    def task(folder: str) -> None:
        sleeper = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"]
        pids = [subprocess.Popen(sleeper).pid, subprocess.Popen(sleeper, start_new_session=True).pid]
        read, write = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.write(write, b"%d" % os.getpid())
                time.sleep(60)
            os._exit(0)
        pids.append(int(os.read(read, 20)))
        Path(folder, "part").write_text(" ".join(map(str, pids)))
        Path(folder, "part").rename(Path(folder, "pids"))
        time.sleep(60)

    attempt = coordinator.start(task, str(tmp_path))
    coordinator.wait((tmp_path / "pids").exists)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(map(is_alive, pids))
    coordinator.cancel(attempt, grace_s=0.2)
    end = coordinator.end_of(attempt)
    assert end.outcome is Outcome.CANCELLED
    assert not any(map(is_alive, pids))


def test_daemon_left_by_a_finished_task_is_killed(coordinator: Coordinator) -> None:
    def task() -> int:
        read, write = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.write(write, b"%d" % os.getpid())
                time.sleep(60)
            os._exit(0)
        return int(os.read(read, 20))

    wait_until_gone([coordinator.value_of(coordinator.start(task))])


def test_scratch_folder_is_made_when_asked_for_and_is_gone_after_the_attempt(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    def task(die: bool, note: str) -> str:
        import herder

        folder = Path(str(herder.task().scratch))
        (folder / "file").write_text("x")
        Path(note).write_text(str(folder))
        if die:
            os.kill(os.getpid(), signal.SIGKILL)
        return str(folder)

    for die in (False, True):
        note = tmp_path / f"note-{die}"
        coordinator.end_of(coordinator.start(task, die, str(note)))
        folder = Path(note.read_text())
        assert folder.parent.name == "scratch"
        coordinator.wait(lambda folder=folder: not folder.exists())  # type: ignore[misc]


def test_queued_attempt_is_cancelled_at_once(coordinator: Coordinator) -> None:
    blockers = [coordinator.start(time.sleep, 60) for _ in range(2)]
    queued = coordinator.start(os.getpid)
    coordinator.wait(lambda: set(blockers) <= coordinator.started)
    coordinator.cancel(queued)
    assert coordinator.end_of(queued).outcome is Outcome.CANCELLED
    assert not coordinator.ends.keys() & set(blockers)
    coordinator.cancel(*blockers)
    assert {coordinator.end_of(attempt).outcome for attempt in blockers} == {Outcome.CANCELLED}


def test_memory_limit_kills_the_task_alone_and_tells_peak_and_limit(coordinator: Coordinator) -> None:
    def task() -> None:
        hog = []
        for _ in range(300):
            hog.append(bytearray(os.urandom(1 << 20)))
            time.sleep(0.01)

    end = coordinator.end_of(coordinator.start(task, options=TaskOptions(memory_bytes=40 << 20)))
    assert end.outcome is Outcome.OUT_OF_MEMORY
    assert end.failure is not None
    assert end.failure.limit_bytes == 40 << 20
    assert end.usage.peak_memory_bytes >= 40 << 20


def test_peak_memory_of_a_long_task_is_what_it_added(coordinator: Coordinator) -> None:
    def task() -> int:
        hog = os.urandom(64 << 20)
        time.sleep(0.7)
        return len(hog)

    end = coordinator.end_of(coordinator.start(task))
    assert 60 << 20 < end.usage.peak_memory_bytes < 90 << 20


def test_large_argument_and_result_travel_as_blobs(coordinator: Coordinator) -> None:
    def task(content: bytes) -> bytes:
        return content[::-1]

    content = os.urandom(1_500_000)
    attempt = coordinator.start(task, content, as_blob=True)
    assert coordinator.value_of(attempt) == content[::-1]
    result = coordinator.ends[attempt].result
    assert result is not None
    assert result.blob is not None
    assert result.size_bytes > 1_500_000


def test_command_gives_its_status_output_and_usage(coordinator: Coordinator) -> None:
    end = coordinator.end_of(coordinator.run(CommandSpec(shell="cat; echo err >&2", stdin=b"fed")))
    assert end.outcome is Outcome.SUCCEEDED
    assert end.result is not None
    assert b"fed" in end.result.inline
    assert end.usage.start_method == "command"
    failing = coordinator.end_of(coordinator.run(CommandSpec(argv=("sh", "-c", "exit 3"))))
    assert failing.outcome is Outcome.FAILED
    assert failing.failure is not None
    assert (failing.failure.cause, failing.failure.exit_status) == (Cause.COMMAND_EXIT, 3)
    unchecked = coordinator.end_of(coordinator.run(CommandSpec(argv=("sh", "-c", "exit 3"), check=False)))
    assert unchecked.outcome is Outcome.SUCCEEDED


def test_setup_that_raises_fails_its_tasks_with_the_traceback(coordinator: Coordinator) -> None:
    broken = workload("s", setup_import="no_such_module_anywhere:fn")
    end = coordinator.end_of(coordinator.start(os.getpid, workload=broken))
    assert end.outcome is Outcome.FAILED
    assert end.failure is not None
    assert end.failure.cause is Cause.SETUP_FAILED
    assert "no_such_module_anywhere" in end.failure.message + end.failure.traceback


def test_prologue_sets_the_environment_of_tasks(coordinator: Coordinator) -> None:
    told = workload("p", prologue="export FROM_PROLOGUE=yes; echo noise")
    assert coordinator.value_of(coordinator.start(os.getenv, "FROM_PROLOGUE", workload=told)) == "yes"
    wrong = workload("q", prologue="echo cannot load it >&2; exit 4")
    end = coordinator.end_of(coordinator.start(os.getpid, workload=wrong))
    assert end.failure is not None
    assert end.failure.cause is Cause.SETUP_FAILED
    assert "cannot load it" in end.failure.message


def test_core_seconds_sum_to_cores_times_time(coordinator: Coordinator) -> None:
    def account() -> tuple[float, float]:
        before = len(coordinator.heartbeats)
        coordinator.wait(lambda: len(coordinator.heartbeats) > before)
        report = coordinator.heartbeats[-1].report
        assert report is not None
        return time.monotonic(), sum(report.core_seconds.values())

    then_s, before = account()
    coordinator.end_of(coordinator.start(time.sleep, 0.5))
    now_s, after = account()
    assert after - before == pytest.approx(2 * (now_s - then_s), abs=0.3)


def test_exposition_passes_promtool(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.value_of(coordinator.start(os.getpid))
    text = coordinator.pull_metrics()
    for name in ("herder_core_seconds_total", "herder_node_cores", "herder_task_start_seconds_bucket"):
        assert name in text
    try:
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=text.encode(), capture_output=True, timeout=30, check=False
        )
    except FileNotFoundError:
        pytest.skip("promtool is not installed")
    assert checked.returncode == 0, checked
    assert checked.stdout + checked.stderr == b""


def test_result_beyond_the_largest_is_refused_before_it_is_copied(coordinator: Coordinator) -> None:
    def task() -> bytes:
        import _herder_template.task as own  # type: ignore[import-not-found]

        assert expected == own.RESULT_BYTES_MAX
        own.RESULT_BYTES_MAX = 1 << 20
        own.sealed_memfd = None
        return bytes(1 << 21)

    expected = BLOB_BYTES_MAX
    end = coordinator.end_of(coordinator.start(task))
    assert end.outcome is Outcome.FAILED
    assert end.failure is not None
    assert end.failure.cause is Cause.PAYLOAD_TOO_LARGE
    assert "write what is that large to a file" in end.failure.message


def test_memory_file_beyond_the_largest_result_is_not_taken(coordinator: Coordinator) -> None:
    def task() -> bytes:
        import _herder_template.task as own

        def sparse(_: bytes) -> int:
            fd = os.memfd_create("huge")
            os.truncate(fd, size_bytes)
            return fd

        own.sealed_memfd = sparse
        return bytes(1 << 20)

    size_bytes = BLOB_BYTES_MAX + 1
    end = coordinator.end_of(coordinator.start(task))
    assert end.outcome is Outcome.FAILED
    assert end.failure is not None
    assert end.failure.cause is Cause.PAYLOAD_TOO_LARGE
    assert coordinator.value_of(coordinator.start(os.getppid)) > 0
