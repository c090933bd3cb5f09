"""Pages that children need come with the fork."""

from __future__ import annotations

import ctypes
import os
import sys
import textwrap

import pytest

from agent.template import driver
from support import interpreters

#: A child of a bare template takes some 380 faults in its life when nothing comes with the fork.
FAULTS_WITHOUT = 250


def can_pin() -> bool:
    libc = ctypes.CDLL(None)
    ring = libc.syscall(425, 1, ctypes.create_string_buffer(120))
    if ring < 0:
        return False
    os.close(ring)
    return True


def test_life_of_a_child_takes_few_faults(bare: driver.Template) -> None:
    if not can_pin():
        pytest.skip("io_uring is not allowed here (kernel.io_uring_disabled, or a container's filter)")
    seal = next(step for step in bare.steps if step["step"] == "seal")
    assert any("copied at the fork" in what for what in seal["applied"])
    child = bare.fork()
    assert child.run(len, "abc") == 3
    assert child.exited()["minflt"] < FAULTS_WITHOUT


def test_pinned_page_is_a_private_copy_in_each_child() -> None:
    def setup() -> bytearray:
        return bytearray(1 << 12)

    def write(value: int) -> tuple[int, int]:
        import herder

        shared = herder.shared()
        before = shared[0]
        shared[:] = bytes([value]) * len(shared)
        return before, shared[-1]

    with driver.ready(setup) as running:
        assert [running.fork().run(write, value) for value in (1, 2, 3)] == [(0, 1), (0, 2), (0, 3)]


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_other_interpreters_too(version: str) -> None:
    if not can_pin():
        pytest.skip("io_uring is not allowed here (kernel.io_uring_disabled, or a container's filter)")
    python = interpreters.require(version)
    with driver.template(python=str(python)) as running:
        running.open()
        child = running.fork()
        assert child.run(len, "abc") == 3
        assert child.exited()["minflt"] < FAULTS_WITHOUT


_HUGE = textwrap.dedent(
    """
    import ctypes, mmap, sys
    package = type(sys)("_herder_template")
    package.__path__ = [sys.argv[1]]
    sys.modules["_herder_template"] = package
    from _herder_template import pages, system, transplant
    size = 4 << 20
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    start = -(-address // system.HUGE_PAGE_BYTES) * system.HUGE_PAGE_BYTES
    room[:] = bytes([7]) * size
    if system._madvise(start, system.HUGE_PAGE_BYTES, system.MADV_COLLAPSE) != 0:
        print("none")
        raise SystemExit
    page = system.SMALL_PAGE_BYTES
    few = [start + 64 * page]
    assert pages._outside_huge_pages(few) == [], "a huge page would be pinned as a whole"
    many = [start + index * page for index in range(pages.SPLIT_PARTS_MIN)]
    assert pages._outside_huge_pages(many) == many
    assert not [m for m, _, huge in transplant.private_memory() if huge and m.start <= start < m.end]
    assert room[:] == bytes([7]) * size
    print("done")
    """
)


def test_huge_page_is_split_only_where_many_of_its_parts_are_written_to() -> None:
    import subprocess

    folder = driver.FOLDER
    run = subprocess.run(
        [sys.executable, "-c", _HUGE, str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    if run.stdout.strip() == "none":
        pytest.skip("the kernel gave no huge page (MADV_COLLAPSE, Linux 6.1)")
    assert run.stdout.strip() == "done"
