"""The folder in which a journal lives: made private, held by one coordinator at a time, fit for a database at all."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

from herder_coordinator.journal.interface import JournalError, JournalLocked

#: File systems on which locks or syncs of a database cannot be relied on (SQLite: "How To Corrupt", 2.1).
NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "ncpfs"}
    | {"fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.rclone"}
)
_LOCK_NAME = "journal.lock"


def prepare(folder: Path) -> None:
    """Make the folder if it is missing (0700) and refuse one that cannot serve.

    Raises:
        JournalError: it lies on a network file system, or cannot be made or written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise JournalError(f"the state folder {folder} cannot be made: {error.strerror}") from error
    kind = file_system_of(folder, Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape"))
    if kind in NETWORK_FILE_SYSTEMS:
        raise JournalError(
            f"the state folder {folder} lies on a network file system ({kind}), where a journal is not safe: "
            "name a folder on a local disk (--state-dir, or HERDER_STATE)"
        )


def file_system_of(folder: Path, mountinfo: str) -> str:
    """The type of the file system that holds `folder`, by the lines of /proc/self/mountinfo; "" if it is not there."""
    path = os.path.realpath(folder)
    found, kind = "", ""
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        if "-" not in fields[6:]:
            continue
        place = (
            fields[4].encode("utf-8", "surrogateescape").decode("unicode_escape") if "\\" in fields[4] else fields[4]
        )
        is_above = path == place or path.startswith(place.rstrip("/") + "/")
        if is_above and len(place) >= len(found):
            found, kind = place, fields[fields.index("-", 6) + 1]
    return kind


def lock(folder: Path) -> int:
    """Take the folder. Returns the descriptor that holds it: the caller closes it when it is done, or dies.

    Raises:
        JournalLocked: another coordinator has it; the message names its pid and host.
        JournalError: the folder cannot be written.
    """
    path = folder / _LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        reason = "read-only file system" if error.errno == errno.EROFS else error.strerror
        raise JournalError(f"the state folder {folder} cannot be written: {reason}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "unknown"
        os.close(descriptor)
        if error.errno not in {errno.EWOULDBLOCK, errno.EACCES}:
            raise JournalError(f"the state folder {folder} cannot be locked: {error.strerror}") from error
        raise JournalLocked(
            f"another coordinator holds the state folder {folder}: {holder}. Stop it, or name another folder"
        ) from None
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)
    except OSError:
        # A full disk: the lock itself holds, and only its holder's name is missing.
        os.ftruncate(descriptor, 0)
    return descriptor


def sync(folder: Path) -> None:
    """Make the names in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
