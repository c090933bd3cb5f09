"""Small files of the kernel: whole, however many reads it takes, and those that are not there any more."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from herder_agent.runtime.kernel_files import READ_BYTES_MAX, read_again, read_small


def test_all_that_is_in_it_up_to_a_bound(tmp_path: Path) -> None:
    assert read_small("/proc/self/comm") == Path("/proc/self/comm").read_bytes()
    (tmp_path / "long").write_bytes(bytes(READ_BYTES_MAX + 1))
    assert read_small(tmp_path / "long") == bytes(READ_BYTES_MAX)


def test_a_file_that_is_read_a_page_at_a_time_is_read_to_its_end() -> None:
    fd = os.open("/proc/self/smaps", os.O_RDONLY)
    try:
        first = os.read(fd, READ_BYTES_MAX)
        assert len(first) <= os.sysconf("SC_PAGE_SIZE")
        assert len(read_again(fd)) > 2 * len(first)
    finally:
        os.close(fd)


def test_what_cannot_be_read_is_empty(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
        assert read_small(f"/proc/{process.pid}/statm") == b""
    assert read_small(tmp_path / "missing") == b""
    assert read_small(tmp_path) == b""  # opens, and cannot be read
