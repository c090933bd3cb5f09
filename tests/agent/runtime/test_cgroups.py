"""Control groups: on the machine's own ones where they may be written, in a folder of paper where only texts are read.

Whatever a test makes is below a private group of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from herder_agent.runtime import cgroups
from herder_agent.runtime.cgroups import Group, Groups, LegacyGroups, NoGroups, UnifiedGroups
from support.cgroups import private_group
from support.requirements import unmet

MIB = 1 << 20
#: A process that enters the groups in its arguments, then does as told on stdin.
INSIDE = """
import os, sys
for path in sys.argv[2:]:
    with open(path, "w") as file:
        file.write("0")
print("in", flush=True)
exec(sys.argv[1])
"""


@pytest.fixture
def groups() -> Iterator[Groups]:
    """Groups below a private one: the test's process is in that one meanwhile."""
    with private_group():
        found = cgroups.probe("auto")
        if isinstance(found, NoGroups):
            unmet(found.reason)
        yield found
        found.close()


def run_in(group: Group, code: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", INSIDE, code, *group.entrances],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    return process


def taken(groups: Groups, memory_bytes: int = 0, pids: int = 0) -> Group:
    group = groups.take(memory_bytes, pids)
    assert group is not None
    return group


@pytest.mark.slow
def test_memory_limit_kills_and_is_told_from_a_crash_with_the_peak(groups: Groups) -> None:
    group = taken(groups, memory_bytes=48 * MIB)
    process = run_in(group, "x = bytearray(100 << 20)")
    assert process.wait(20) == -signal.SIGKILL
    process.communicate()
    account = group.account()
    assert account.oom_kills >= 1
    assert account.peak_bytes == 48 * MIB
    groups.give_back(group)


@pytest.mark.slow
def test_group_used_again_counts_from_nothing(groups: Groups, tmp_path: Path) -> None:
    """Not what its last attempt left charged to it either: a file that it wrote."""
    write = f"with open({str(tmp_path / 'file')!r}, 'wb') as file: file.write(x * 2)"
    peaks = []
    for size in (40, 8):
        group = taken(groups, memory_bytes=200 * MIB)
        process = run_in(group, f"x = bytearray(b'x' * ({size} << 20))\n" + (write if size == 40 else ""))
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        account = group.account()
        assert account.oom_kills == 0
        peaks.append(account.peak_bytes / MIB)
        groups.give_back(group)
    assert 120 < peaks[0] < 200
    assert 8 < peaks[1] < 40


@pytest.mark.slow
def test_processes_are_bounded_by_the_kernel(groups: Groups) -> None:
    group = taken(groups, pids=4)
    code = "import os, time\nfor _ in range(9):\n    if os.fork() == 0: time.sleep(60)"
    process = run_in(group, code)
    assert process.wait(20) == 1
    assert len(group.processes()) == 3
    groups.give_back(group)
    assert "BlockingIOError" in process.communicate(timeout=60)[1]


def test_kill_gets_a_fork_bomb_and_a_daemon_of_its_own_session(groups: Groups) -> None:
    group = taken(groups, pids=60)
    bomb = (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\n"
        "while True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    )
    process = run_in(group, bomb)
    wait_until(lambda: len(group.processes()) > 40)
    groups.give_back(group)
    wait_until(lambda: not groups.settle())
    assert not group.processes()
    process.kill()
    process.communicate()


def test_what_is_left_in_a_group_holds_it_until_it_is_gone(groups: Groups) -> None:
    group = taken(groups, pids=10)
    process = run_in(group, "import time; time.sleep(60)")
    groups.give_back(group)
    assert process.wait(60) == -signal.SIGKILL
    process.communicate()
    assert groups.settle() == set()


def test_folders_are_gone_when_the_groups_are_closed(groups: Groups) -> None:
    group = taken(groups, memory_bytes=10 * MIB, pids=5)
    folders = [Path(entrance).parent for entrance in group.entrances]
    assert all(folder.is_dir() for folder in folders)
    groups.give_back(group)
    groups.close()
    assert not any(folder.exists() for folder in folders)


def test_groups_of_an_agent_that_is_gone_are_removed_by_the_next(groups: Groups) -> None:
    group = taken(groups, pids=5)
    base = Path(group.entrances[0]).parent.parent
    dead = subprocess.Popen(["true"])
    dead.wait()
    stale = base / f"herder-{dead.pid}-3"
    stale.mkdir()
    groups.give_back(group)
    if isinstance(groups, LegacyGroups):
        other: Groups = LegacyGroups({"memory": base} if (base / "memory.limit_in_bytes").exists() else {"pids": base})
        other.close()
    else:
        groups.close()
        cgroups.probe("auto").close()
    assert not stale.exists()


def test_off_and_a_folder_that_is_none_are_none_with_the_reason(tmp_path: Path) -> None:
    assert "configuration" in cgroups.probe("off").reason
    found = cgroups.probe(str(tmp_path))
    assert found.kind == "none"
    assert str(tmp_path) in found.reason
    assert "Delegate=yes" in found.reason
    assert found.take(MIB, 5) is None


def test_own_groups_are_found_through_the_mounts(tmp_path: Path) -> None:
    for name in ("v2/user/job", "mem/box", "both/x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "cgroup.procs").write_text("")
    cgroup = tmp_path / "cgroup"
    cgroup.write_text("5:memory:/docker/box\n4:cpu,pids:/x\n3:freezer:/gone\n0::/user/job\n")
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"30 1 0:1 / {tmp_path}/v2 rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
        f"31 1 0:2 /docker {tmp_path}/mem rw - cgroup cgroup rw,memory\n"
        f"32 1 0:3 / {tmp_path}/both rw - cgroup cgroup rw,cpu,pids\n"
        "33 1 0:4 / /proc rw - proc proc rw\n"
    )
    both = tmp_path / "both/x"
    expected = {"": tmp_path / "v2/user/job", "memory": tmp_path / "mem/box", "cpu": both, "pids": both}
    assert cgroups.own_folders(str(cgroup), str(mounts)) == expected


def test_io_of_all_devices_is_summed() -> None:
    text = b"8:16 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=0\n8:0 rbytes=100 wbytes=1 rios=9 wios=9\n"
    assert cgroups.io_bytes(text) == (1459300, 314773505)
    assert cgroups.io_bytes(b"") == (0, 0)


def test_version_two_that_is_not_delegated_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu\n")
    with pytest.raises(OSError, match="neither the memory nor the pids"):
        UnifiedGroups(tmp_path)


def wait_until(condition: object, timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline_s
        os.sched_yield()
