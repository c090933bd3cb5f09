"""A process that really cannot be killed: one in a frozen group of version 1, where SIGKILL waits for the thaw.

(Version 2's frozen processes can be killed; so can a parent that waits for its vfork, and whoever waits for a file
system in user space, which the kernel gives up as its server dies.)
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest

from herder_shared.states import Outcome
from support.agent_peer import running
from support.leaks import wait_until

pytestmark = [pytest.mark.module_state, pytest.mark.slow]
# The children cannot import the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def freezer() -> Iterator[Path]:
    """A group of our own in which processes can be frozen."""
    folder = Path("/sys/fs/cgroup/freezer") / f"test-of-herder-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no freezer of control groups version 1 to be had: {error}")
    yield folder
    (folder / "freezer.state").write_text("THAWED")
    for pid in (folder / "cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    assert wait_until(lambda: not (folder / "cgroup.procs").read_text().strip(), 10)
    folder.rmdir()


def leave_a_daemon(folder: str) -> str:
    """A process that is nobody's child; this task ends when the test has dealt with it."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            Path(folder, "half").write_text(str(os.getpid()))
            Path(folder, "half").rename(Path(folder, "daemon"))
            time.sleep(60)
        os._exit(0)
    os.wait()
    deadline_s = time.monotonic() + 30
    while not Path(folder, "go").exists() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return "done"


def test_what_cannot_be_killed_keeps_its_slot_and_is_said_until_it_is_gone(tmp_path: Path, freezer: Path) -> None:
    with running(tmp_path / "agent", 1) as (coordinator, agent):
        first = coordinator.start(leave_a_daemon, str(tmp_path))
        coordinator.wait((tmp_path / "daemon").exists)
        pid = (tmp_path / "daemon").read_text()
        (freezer / "cgroup.procs").write_text(pid)
        (freezer / "freezer.state").write_text("FROZEN")
        assert wait_until(lambda: (freezer / "freezer.state").read_text() == "FROZEN\n", 10)
        (tmp_path / "go").touch()
        assert coordinator.value_of(first) == "done"
        second = coordinator.start(pow, 2, 5)
        coordinator.wait(lambda: pid in coordinator.fault())
        assert "cannot be killed" in coordinator.fault()
        assert f"cannot be killed: [{pid}]" in agent.log.read_text()
        # Two more heartbeats: the slot stays taken, and what came next still waits.
        beats = len(coordinator.heartbeats)
        coordinator.wait(lambda: len(coordinator.heartbeats) >= beats + 2)
        report = coordinator.heartbeats[-1].report
        assert report is not None
        assert (report.slots_used, report.queued, second in coordinator.ends) == (1.0, 1, False)
        (freezer / "freezer.state").write_text("THAWED")
        assert coordinator.value_of(second) == 32
        coordinator.wait(lambda: coordinator.fault() == "")
        assert not Path(f"/proc/{pid}").exists()


#: An agent as it is shipped, but less patient with what does not die.
IMPATIENT = (
    "import sys; from herder_agent.core import attempts; attempts.DEATH_LIMIT_S = 0.3\n"
    "from herder_agent.main import command; command(sys.argv[4:])"
)


def say_who_and_wait(folder: str) -> None:
    Path(folder, "half").write_text(str(os.getpid()))
    Path(folder, "half").rename(Path(folder, "child"))
    time.sleep(60)


def test_a_task_that_cannot_be_killed_is_reported_and_keeps_its_slot(tmp_path: Path, freezer: Path) -> None:
    with running(tmp_path / "agent", 1, under=(sys.executable, "-c", IMPATIENT)) as (coordinator, _):
        first = coordinator.start(say_who_and_wait, str(tmp_path))
        coordinator.wait((tmp_path / "child").exists)
        pid = (tmp_path / "child").read_text()
        (freezer / "cgroup.procs").write_text(pid)
        (freezer / "freezer.state").write_text("FROZEN")
        assert wait_until(lambda: (freezer / "freezer.state").read_text() == "FROZEN\n", 10)
        coordinator.cancel(first, grace_s=0.1)
        second = coordinator.start(pow, 2, 5)
        assert coordinator.end_of(first).outcome is Outcome.CANCELLED
        coordinator.wait(lambda: f"cannot be killed: [{pid}]" in coordinator.fault())
        assert second not in coordinator.ends
        (freezer / "freezer.state").write_text("THAWED")
        assert coordinator.value_of(second) == 32
        coordinator.wait(lambda: coordinator.fault() == "")
        assert coordinator.end_count == 2
