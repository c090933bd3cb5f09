"""Open descriptors of this process, each judged: a child may have it, must not share it, or has it closed."""

from __future__ import annotations

import _socket
import os
import stat

from .findings import FRESH, IN_TASK, NOTE, Finding

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri")
_EVENTS = tuple(f"anon_inode:{kind}" for kind in ("[eventpoll]", "[eventfd]", "[timerfd]", "[signalfd]", "inotify"))
#: Shared memory on purpose.
_SHARED = ("/memfd:", "/dev/shm/")
_HARMLESS_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/pts/")


class Descriptor:
    """One that is open. `finding` is None where children may have it."""

    __slots__ = ("fd", "finding")

    def __init__(self, fd: int, finding: Finding | None) -> None:
        self.fd = fd
        self.finding = finding


def judged(own: Iterable[int]) -> list[Descriptor]:
    """All open descriptors but the template's `own`, lowest first."""
    found = []
    for fd in sorted(map(int, os.listdir("/proc/self/fd"))):
        if fd in own:
            continue
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
            mode = os.fstat(fd).st_mode
        except OSError:
            continue  # the listing's own
        found.append(Descriptor(fd, _judge(fd, target, mode)))
    return found


def _judge(fd: int, target: str, mode: int) -> Finding | None:
    if target.startswith(_DEVICES):
        return Finding("R5", f"{target} is open", "a GPU's context does not survive a fork", IN_TASK)
    if stat.S_ISSOCK(mode):
        return _judge_socket(fd)
    if "io_uring" in target or "userfaultfd" in target:
        return Finding("R6", f"{target} is open", "parent and children would use one queue", IN_TASK)
    if target.startswith(_EVENTS):
        return Finding("R7", f"{target} (descriptor {fd})", "closed in the children", verdict=NOTE)
    if stat.S_ISFIFO(mode):
        return Finding("R7", f"a pipe (descriptor {fd})", "closed in the children", verdict=NOTE)
    if target.startswith(_SHARED) or target.startswith(_HARMLESS_DEVICES):
        return None
    if stat.S_ISREG(mode):
        return _judge_file(fd, target)
    return (
        None
        if stat.S_ISDIR(mode)
        else Finding("R7", f"{target} (descriptor {fd})", "closed in the children", verdict=NOTE)
    )


def _judge_socket(fd: int) -> Finding:
    copy = _socket.socket(fileno=os.dup(fd))
    try:
        peer = copy.getpeername()
    except OSError:
        peer = None
    finally:
        copy.close()
    if peer in (None, "", b""):
        return Finding("R7", f"a socket (descriptor {fd})", "closed in the children", verdict=NOTE)
    shown = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) and len(peer) > 1 else str(peer)
    reason = "parent and children would speak on one connection and mix their messages"
    return Finding(
        "R6", f"a connection to {shown}", reason, f"close it at the end of setup and connect in the tasks, {FRESH}"
    )


def _judge_file(fd: int, target: str) -> Finding | None:
    cure = f"close it at the end of setup and open it in the tasks, {FRESH}"
    try:
        magic = os.pread(fd, 16, 0)
    except OSError:
        magic = b""
    if magic.startswith(b"SQLite format 3\0"):
        return Finding(
            "R6", f"{target}: an open SQLite database", "SQLite forbids carrying a connection across a fork", cure
        )
    if magic.startswith(b"\x89HDF\r\n\x1a\n"):
        return Finding(
            "R6", f"{target}: an open HDF5 file", "parent and children would share its offset, locks and caches", cure
        )
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii", errors="replace") as file:
        information = file.read()
    flags = next((int(line.split()[1], 8) for line in information.splitlines() if line.startswith("flags:")), 0)
    if "lock:" in information:
        return Finding("R6", f"{target} is locked", "a forked child would hold, or drop, the same lock", cure)
    if flags & os.O_ACCMODE != os.O_RDONLY:
        return Finding(
            "R6",
            f"{target} is open for writing",
            "parent and children would share its offset and overwrite each other",
            cure,
        )
    return None
