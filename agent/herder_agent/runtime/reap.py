"""Processes, from the outside: what ended children left behind, how much memory a running one has, what the kernel
killed.

The agent is a child subreaper: what a task's process leaves behind when it dies becomes our child. Our own children
are known (templates, the spawner, a prologue's shell), so any other child of ours is such a leftover and is killed,
with all its descendants. Reading our list of children is one system call.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

from herder_agent.runtime.kernel_files import read_again, read_small

_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def become_subreaper() -> None:
    """Orphans among our descendants become our children.

    Raises:
        OSError: the kernel refuses.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def become_undumpable() -> None:
    """Other processes of our user cannot read our memory, descriptors or environment: keys are in there.

    Raises:
        OSError: the kernel refuses.
    """
    _prctl(_PR_SET_DUMPABLE, 0)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")


class Reaper:
    """Finds, kills and reaps what ended children left behind."""

    def __init__(self) -> None:
        pid = os.getpid()
        self._fd = os.open(f"/proc/{pid}/task/{pid}/children", os.O_RDONLY | os.O_CLOEXEC)
        #: Children of ours that are to live.
        self.known: set[int] = set()

    def sweep(self) -> set[int]:
        """Kill what does not belong to us; returns what is not gone yet."""
        strangers = self._children() - self.known
        if not strangers:
            return strangers
        left = set()
        for pid in strangers:
            if not _reap(pid):
                for each in (pid, *descendants(pid)):
                    _kill(each)
                if not _reap(pid):
                    left.add(pid)
        # What a killed one left behind is ours now, and is found when its parent is gone.
        return left | (self._children() - self.known)

    def close(self) -> None:
        """Close the list of children."""
        os.close(self._fd)

    def _children(self) -> set[int]:
        text = read_again(self._fd)
        return set(map(int, text.split())) if text else set()


def _reap(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, parents before children. Costs some 15 µs a process."""
    found: list[int] = []
    pending = [pid]
    while pending:
        parent = pending.pop()
        for child in _children_of(parent):
            found.append(child)
            pending.append(child)
    return found


def _children_of(pid: int) -> list[int]:
    """Children of all threads of `pid`."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        texts = [read_small(f"/proc/{pid}/task/{thread}/children") for thread in threads]
    except OSError:
        return []
    return [int(child) for text in texts for child in text.split()]


def anon_bytes(pid: int) -> int:
    """RssAnon of one process: resident pages that are neither of files nor shared. 0 when it is gone."""
    text = read_small(f"/proc/{pid}/statm")
    if not text:
        return 0
    fields = text.split(None, 3)
    return max(0, int(fields[1]) - int(fields[2])) * _PAGE_BYTES


def own_bytes(pid: int) -> int:
    """RssAnon and RssShmem of one process: all its resident memory but pages of files. 0 when it is gone."""
    kib = 0
    for line in read_small(f"/proc/{pid}/status").splitlines():
        if line.startswith((b"RssAnon:", b"RssShmem:")):
            kib += int(line.split()[1])
    return kib * 1024


def tree_of(pid: int) -> tuple[int, int]:
    """Of a process and its descendants: Σ RssAnon, and how many processes and threads they are."""
    tasks = 0
    anonymous = 0
    pending = [pid]
    while pending:
        each = pending.pop()
        anonymous += anon_bytes(each)
        try:
            threads = os.listdir(f"/proc/{each}/task")
        except OSError:
            continue
        tasks += len(threads)
        for thread in threads:
            pending.extend(int(child) for child in read_small(f"/proc/{each}/task/{thread}/children").split())
    return anonymous, tasks


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since it started, anywhere on the machine."""
    for line in read_small("/proc/vmstat").splitlines():
        if line.startswith(b"oom_kill "):
            return int(line.split()[1])
    return 0


def kill_stale(marker: str) -> int:
    """Kill what an earlier life of this agent left: processes of our user whose environment has `marker`.

    Returns how many there were. Those that are not ours to read are not ours to kill.
    """
    wanted = b"\0" + marker.encode() + b"\0"
    killed = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        if wanted in b"\0" + read_small(f"/proc/{entry.name}/environ") + b"\0":
            _kill(int(entry.name))
            killed += 1
    return killed


def shared_bytes(pid: int) -> int:
    """Resident pages of one process that are of files or shared. 0 when it is gone."""
    text = read_small(f"/proc/{pid}/statm")
    return int(text.split(None, 3)[2]) * _PAGE_BYTES if text else 0
