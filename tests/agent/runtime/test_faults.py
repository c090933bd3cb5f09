"""What an agent survives, and what it leaves behind when it does not."""

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

from herder_shared.ids import AttemptId, WorkloadKey
from herder_shared.states import Cause, Outcome
from herder_shared.wire.messages import AckAttempts, WorkloadSpec
from support.agent_peer import Coordinator, running, start_agent
from support.requirements import require_root

pytestmark = pytest.mark.slow

# Children cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def sleep_after_telling(folder: str, name: str, seconds: float) -> str:
    Path(folder, f".{name}").write_text(f"{os.getpid()} {os.getppid()}")
    Path(folder, f".{name}").rename(Path(folder, name))
    time.sleep(seconds)
    return name


def pids_of(coordinator: Coordinator, file: Path) -> tuple[int, int]:
    coordinator.wait(file.exists)
    pid, parent = map(int, file.read_text().split())
    return pid, parent


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1] != b"Z"
    except OSError:
        return False


def wait_gone(*pids: int, timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline_s, [pid for pid in pids if is_alive(pid)]
        time.sleep(0.01)


def test_template_killed_loses_its_tasks_unblamed_and_is_rebuilt(tmp_path: Path) -> None:
    with running(tmp_path) as (coordinator, _):
        attempt = coordinator.start(sleep_after_telling, str(tmp_path), "one", 60.0)
        pid, template = pids_of(coordinator, tmp_path / "one")
        os.kill(template, signal.SIGKILL)
        end = coordinator.end_of(attempt)
        assert end.outcome is Outcome.LOST
        assert end.failure is not None
        assert end.failure.cause is Cause.TEMPLATE_LOST
        assert not is_alive(pid)
        assert coordinator.value_of(coordinator.start(os.getppid)) != template


def test_spawner_killed_is_replaced(tmp_path: Path) -> None:
    with running(tmp_path) as (coordinator, _):
        attempt = coordinator.start(sleep_after_telling, str(tmp_path), "one", 60.0, start="fresh")
        _, spawner = pids_of(coordinator, tmp_path / "one")
        os.kill(spawner, signal.SIGKILL)
        assert coordinator.end_of(attempt).outcome is Outcome.LOST
        assert coordinator.value_of(coordinator.start(os.getppid, start="fresh")) != spawner


def test_killed_agent_leaves_no_process(tmp_path: Path) -> None:
    with running(tmp_path) as (coordinator, agent):
        coordinator.start(sleep_after_telling, str(tmp_path), "one", 60.0)
        coordinator.start(sleep_after_telling, str(tmp_path), "two", 60.0, start="fresh")
        pids = (*pids_of(coordinator, tmp_path / "one"), *pids_of(coordinator, tmp_path / "two"))
        agent.process.kill()
        agent.process.wait()
        wait_gone(*pids)


def test_agent_that_is_told_to_end_says_what_ends_with_it(tmp_path: Path) -> None:
    with running(tmp_path) as (coordinator, agent):
        attempt = coordinator.start(sleep_after_telling, str(tmp_path), "one", 60.0)
        pids = pids_of(coordinator, tmp_path / "one")
        agent.process.terminate()
        end = coordinator.end_of(attempt)
        assert end.failure is not None
        assert (end.outcome, end.failure.cause, end.usage.start_method) == (Outcome.LOST, Cause.NODE_LOST, "fork")
        assert "SIGTERM" in end.failure.message
        wait_gone(*pids)
        coordinator.wait(lambda: agent.process.poll() is not None)


def test_next_agent_kills_what_an_earlier_one_left(tmp_path: Path) -> None:
    def leave(folder: str) -> None:
        read, write = os.pipe()
        if os.fork() == 0:
            os.setsid()
            os.write(write, b"%d" % os.getpid())
            time.sleep(60)
        Path(folder, "left").write_text(os.read(read, 20).decode())
        time.sleep(60)

    with running(tmp_path) as (coordinator, agent):
        coordinator.start(leave, str(tmp_path))
        coordinator.wait(lambda: (tmp_path / "left").exists() and bool((tmp_path / "left").read_text()))
        left = int((tmp_path / "left").read_text())
        agent.process.kill()
        agent.process.wait()
        coordinator.wait(lambda: coordinator.link is None)
        second = start_agent(coordinator, tmp_path)
        try:
            coordinator.wait_linked()
            assert not is_alive(left)
            second.process.terminate()
            assert second.process.wait(60.0) == 0
        finally:
            second.process.kill()
            second.process.wait()


def test_task_goes_on_while_the_coordinator_is_away_and_its_end_is_told_again_until_acknowledged(
    tmp_path: Path,
) -> None:
    with running(tmp_path) as (coordinator, _):
        coordinator.acknowledges = False
        short = coordinator.start(sleep_after_telling, str(tmp_path), "short", 0.0)
        assert coordinator.value_of(short) == "short"
        attempt = coordinator.start(sleep_after_telling, str(tmp_path), "long", 0.3)
        pid, _parent = pids_of(coordinator, tmp_path / "long")
        assert coordinator.link is not None
        coordinator.ends.clear()
        coordinator.link.close()
        coordinator.wait(lambda: len(coordinator.syncs) == 2)
        listed = {each.attempt for each in coordinator.syncs[1].running}
        listed |= {each.attempt for each in coordinator.syncs[1].ended}
        assert listed == {short, attempt}
        assert coordinator.value_of(attempt) == "long"
        coordinator.send(AckAttempts((short, attempt)))
        coordinator.link.close()
        coordinator.wait(lambda: len(coordinator.syncs) == 3)
        assert coordinator.syncs[2].running == ()
        assert coordinator.syncs[2].ended == ()
        assert not is_alive(pid)


def test_order_of_another_session_is_not_obeyed(tmp_path: Path) -> None:
    with running(tmp_path) as (coordinator, _):
        assert coordinator.link is not None
        link, session = coordinator.link, coordinator.link.session
        coordinator.link = type("Old", (), {"session": session - 1, "send": staticmethod(link.send)})()
        old = coordinator.start(os.getpid)
        coordinator.link = link
        coordinator._known.clear()
        assert coordinator.value_of(coordinator.start(os.getpid)) > 0
        assert old not in coordinator.ends


def test_coordinator_of_a_lower_epoch_is_left(tmp_path: Path) -> None:
    with running(tmp_path) as (coordinator, agent):
        coordinator.epoch = 5
        assert coordinator.link is not None
        coordinator.link.close()
        coordinator.wait(lambda: len(coordinator.syncs) == 2)
        assert (agent.state_dir / "epoch").read_text() == "5\n"
        coordinator.epoch = 4
        assert coordinator.link is not None
        coordinator.link.close()
        coordinator.wait(lambda: coordinator.sessions >= 4)
        assert len(coordinator.syncs) == 2
        coordinator.epoch = 5
        coordinator.wait(lambda: len(coordinator.syncs) == 3)


def test_running_attempt_that_is_acknowledged_is_stopped_and_not_reported(tmp_path: Path) -> None:
    with running(tmp_path) as (coordinator, _):
        attempt = coordinator.start(sleep_after_telling, str(tmp_path), "one", 60.0)
        pid, _parent = pids_of(coordinator, tmp_path / "one")
        coordinator.send(AckAttempts((attempt,)))
        coordinator.wait(lambda: not is_alive(pid))
        assert coordinator.value_of(coordinator.start(os.getpid)) != pid
        assert attempt not in coordinator.ends


def test_end_of_the_lifeline_ends_everything(tmp_path: Path) -> None:
    with running(tmp_path) as (coordinator, first):
        first.process.terminate()
        assert first.process.wait(60.0) == 0
        coordinator.wait(lambda: coordinator.link is None)
        read, write = os.pipe()
        os.set_inheritable(read, True)
        hello_read, hello_write = os.pipe()
        os.set_inheritable(hello_write, True)
        host, port = coordinator.address
        command = [sys.executable, "-m", "herder_agent", "--identity", str(tmp_path / "agent"), "--cores", "1"]
        command += ["--state-dir", str(tmp_path / "state"), "--coordinator", f"{host}:{port}", "--no-pin"]
        command += ["--lifeline-fd", str(read), "--hello-fd", str(hello_write)]
        with (tmp_path / "second.log").open("wb") as log:
            process = subprocess.Popen(command, pass_fds=(read, hello_write), stdout=log, stderr=log)
        os.close(read)
        os.close(hello_write)
        try:
            coordinator.wait_linked()
            hello = os.read(hello_read, 4096)
            assert b'"node": "n1"' in hello
            assert os.read(hello_read, 1) == b""
            coordinator.start(sleep_after_telling, str(tmp_path), "one", 60.0)
            pids = pids_of(coordinator, tmp_path / "one")
            os.close(write)
            assert process.wait(60.0) == 0, (tmp_path / "second.log").read_text()
            wait_gone(*pids, timeout_s=1.0)
        finally:
            process.kill()
            process.wait()
            os.close(hello_read)


def test_second_agent_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    with running(tmp_path) as (coordinator, agent):
        second = start_agent(coordinator, tmp_path)
        assert second.process.wait(60.0) == 2
        assert f"pid {agent.pid}" in second.log.read_text()


def test_idle_agent_uses_no_processor_time_to_speak_of(tmp_path: Path) -> None:
    def seconds(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    with running(tmp_path) as (coordinator, agent):
        coordinator.value_of(coordinator.start(os.getpid))
        before = seconds(agent.pid)
        beats = len(coordinator.heartbeats)
        # Heartbeats are ten times as frequent as in production.
        coordinator.wait(lambda: len(coordinator.heartbeats) >= beats + 10)
        assert seconds(agent.pid) - before <= 0.05


def test_broken_workload_does_not_disturb_another(tmp_path: Path) -> None:
    broken = WorkloadSpec(WorkloadKey("b" * 16), setup_import="os:_exit_")
    with running(tmp_path) as (coordinator, _):
        failing: list[AttemptId] = [coordinator.start(os.getpid, workload=broken) for _ in range(4)]
        assert coordinator.value_of(coordinator.start(os.getpid)) > 0
        assert {coordinator.end_of(attempt).outcome for attempt in failing} == {Outcome.FAILED}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The agent's folder, on a file system of its own with 4 MiB."""
    require_root()
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_full_disk_costs_no_result_and_is_said_until_it_has_room(small_disk: Path, tmp_path: Path) -> None:
    def large() -> bytes:
        return b"x" * 3_000_000

    with running(tmp_path) as (coordinator, _):
        filler = small_disk / "filler"
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(bytes(8 << 20))
        coordinator.wait(lambda: "disk is full" in coordinator.fault())
        attempt = coordinator.start(large)
        assert coordinator.value_of(attempt) == large()
        filler.unlink()
        coordinator.wait(lambda: not coordinator.fault())
        assert coordinator.value_of(coordinator.start(large)) == large()
