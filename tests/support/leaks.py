"""What a test left behind: processes, threads, descriptors, files.

Theory of operation. The test process makes itself a child subreaper, so that whatever a test started, at any depth,
either hangs below a process that was there before the test or becomes (or stays) a *direct* child of the test process:
a new direct child after the test is a leak, and nobody can get away by forking twice. What module- or session-wide
fixtures started was there before the test and is theirs. Ends take a moment (a killed process must be reaped, a thread
must return), so each check waits for its condition up to a deadline and only then complains.

At the end of the session one more net: every process inherits `SESSION_VARIABLE`, and a scan of `/proc/*/environ` finds
what escaped all the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: In the environment of everything that the tests start; unique for this run.
SESSION_VARIABLE = "TEST_SESSION_OF_HERDER"
#: How long what has been told to end may take to be gone, on a machine with several tests at a time.
SETTLE_S = 10.0
SHM = Path("/dev/shm")
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Become the parent of every orphan below this process."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def mark_session() -> str:
    """Give this run its mark, which all its processes inherit."""
    mark = uuid.uuid4().hex
    os.environ[SESSION_VARIABLE] = mark
    return mark


def direct_children() -> dict[int, str]:
    """Live (or unreaped) direct children of this process: pid to command line."""
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            pids.update(map(int, (task / "children").read_text().split()))
    return {pid: _command_of(pid) for pid in pids}


def open_descriptors() -> dict[int, str]:
    """Open descriptors of this process and what they are."""
    found: dict[int, str] = {}
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own descriptor is closed by now
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
    return found


@dataclass(frozen=True, slots=True)
class Footprint:
    """What this process owns at one moment."""

    children: frozenset[int]
    threads: frozenset[int]
    descriptors: frozenset[int]
    files: frozenset[str]


def footprint(private_tmp: Path, *, with_shm: bool) -> Footprint:
    """Look now. `/dev/shm` belongs to everybody: it is only looked at where this run has the machine for itself."""
    return Footprint(
        children=frozenset(direct_children()),
        threads=frozenset(thread.ident for thread in threading.enumerate() if thread.ident is not None),
        descriptors=frozenset(open_descriptors()),
        files=frozenset(_files(private_tmp)) | (shared_memory() if with_shm else frozenset()),
    )


def leaks_since(before: Footprint, private_tmp: Path, *, with_shm: bool) -> list[str]:
    """One line for each thing that is here now and was not before, after giving it `SETTLE_S` to go away."""

    def found() -> list[str]:
        return _differences(before, private_tmp, with_shm=with_shm)

    if not found():
        return []
    gc.collect()
    wait_until(lambda: not found(), SETTLE_S)
    return found()


def end_leaked_children(before: Footprint) -> None:
    """Kill the direct children that a failed check named, so that the next test starts clean."""
    for pid in set(direct_children()) - before.children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def stray_processes(mark: str) -> dict[int, str]:
    """Every other process of this machine which carries this run's mark: pid to command line."""
    needle = f"{SESSION_VARIABLE}={mark}".encode()
    found: dict[int, str] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if needle in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                found[int(entry)] = _command_of(int(entry))
    return found


def end_stray_processes(mark: str) -> list[str]:
    """One line for each process with this mark that does not end by itself within `SETTLE_S`; killed now."""
    if wait_until(lambda: not stray_processes(mark), SETTLE_S):
        return []
    strays = stray_processes(mark)
    for pid in strays:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"process {pid}: {command} (killed)" for pid, command in strays.items()]


def shared_memory() -> frozenset[str]:
    """What is in `/dev/shm`, whoever put it there."""
    return frozenset(_files(SHM))


def shared_memory_since(before: frozenset[str]) -> list[str]:
    """One line for each file there that is new and not another user's, after giving it `SETTLE_S` to go away."""

    def found() -> frozenset[str]:
        now = shared_memory()
        return now - before - _shared_memory_of_others(now)

    wait_until(lambda: not found(), SETTLE_S)
    return [f"file {name}" for name in sorted(found())]


def private_temporary_folder() -> Path:
    """A temporary folder of this process alone, set as the default for it and all it starts."""
    # Beside and not below that of the process which hands out tests: names of sockets have to stay short.
    root = os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix="herder-tests-", dir=root))
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = str(folder)
    return folder


def wait_until(condition: Callable[[], bool], timeout_s: float, poll_s: float = 0.01) -> bool:
    """Wait for what cannot be waited for by an event. False when the time is over and it still does not hold."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(poll_s)
    return True


def _differences(before: Footprint, private_tmp: Path, *, with_shm: bool) -> list[str]:
    _reap_adopted(before)
    children = direct_children()
    threads = {thread.ident: thread for thread in threading.enumerate() if thread.ident is not None}
    now = footprint(private_tmp, with_shm=with_shm)
    descriptors = open_descriptors()
    return [
        *(f"process {pid}: {children[pid]}" for pid in sorted(set(children) - before.children)),
        *(f"thread {threads[ident].name}" for ident in sorted(set(threads) - before.threads)),
        *(f"descriptor {fd}: {descriptors[fd]}" for fd in sorted(set(descriptors) - before.descriptors)),
        *(f"file {name}" for name in sorted(now.files - before.files - _shared_memory_of_others(now.files))),
    ]


def _shared_memory_of_others(files: frozenset[str]) -> set[str]:
    """Those in `/dev/shm` that are mapped by a process which this run has not started: another user of the machine."""
    candidates = {name for name in files if name.startswith(f"{SHM}/")}
    if not candidates:
        return set()
    mark = f"{SESSION_VARIABLE}={os.environ.get(SESSION_VARIABLE)}".encode()
    found: set[str] = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if mark not in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                maps = Path(f"/proc/{entry}/maps").read_text(errors="replace")
                found.update(name for name in candidates if name in maps)
    return found


def _reap_adopted(before: Footprint) -> None:
    """Orphans that have ended are this process's to wait for: it asked to adopt them."""
    for pid in set(direct_children()) - before.children:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _files(folder: Path) -> set[str]:
    return {str(entry) for entry in folder.iterdir()}


def _command_of(pid: int) -> str:
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return text or Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "(gone)"
