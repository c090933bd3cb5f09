"""The kernel's small files (`/proc`, control groups): what they tell of may be gone at any moment.

One read gives a page at most of those that are made line by line (fs/seq_file.c): of mounts, children, a group's
processes. So they are read to their end.
"""

from __future__ import annotations

import os
from pathlib import Path

#: No such file that we read is longer, but lists of ten thousand processes: they are told of in part.
READ_BYTES_MAX = 64 * 1024


def read_small(path: str | Path) -> bytes:
    """What is in it; nothing when it is not there, may not be read, or what it tells of is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return read_again(fd)
    finally:
        os.close(fd)


def read_again(fd: int) -> bytes:
    """The same of one that is kept open, from its beginning."""
    content = b""
    try:
        while len(content) < READ_BYTES_MAX and (piece := os.pread(fd, READ_BYTES_MAX - len(content), len(content))):
            content += piece
    except OSError:
        return b""
    return content
