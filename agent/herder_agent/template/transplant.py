"""Moves a template's private memory into a memory file, so that a fork has next to nothing to copy.

A fork copies the page tables of every mapping that holds private pages, and keeps a list entry for each: in a template
with many libraries that is most of its price (0.14 µs a page, 3 µs a mapping). The kernel skips mappings of files
without private pages. So what is private here (data segments of libraries, Python's arenas) is written into one
memfd, and its pages are mapped from there, privately and at the same addresses: a page is copied when somebody writes
to it, as before. Neighbours become one mapping.

Nothing may change between the copy of a page and its new mapping, and Python changes pages whatever it does. So the
system calls are run by some forty machine instructions which use the stack and registers alone; the stack stays.

Left alone is the memory of other allocators: `MADV_DONTNEED` means "zeroes" to them, and would bring back what was here
when the template was sealed. Python's arenas, which are only ever unmapped whole, are recognised by their pools'
headers. The C heap stays too: it lies in one piece and is folded into huge pages, which is as good.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys

from . import system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_PWRITE, _MMAP = 18, 9
_COPIED_AT_ONCE = 1 << 30
_MAP_PRIVATE_FIXED = 0x12
_PROTECTIONS = {"r--p": 1, "rw-p": 3}
#: Mappings with these flags are special: locked, not copied or wiped at a fork, of devices.
_SPECIAL_FLAGS = {"lo", "dc", "wf", "io", "pf", "ht", "dd", "um", "uw", "gd", "sh", "mt"}
_PAGE = 4096
_POOL = 16 << 10
_ARENA = 1 << 20
#: Fewer pools than this of one arena are not believed to be an arena.
_POOLS_MIN = 4
_PT_LOAD, _PF_W = 1, 2

#: For each record of eight words (system call's number, six arguments, expected result) at `rdi`, `rsi` in number: make
#: the call; stop at another result. Returns how many went as expected.
_RUN = bytes.fromhex(
    "53 4154 4155"  # push rbx, r12, r13
    "4889fb 4989f4 4531ed"  # rbx = rdi; r12 = rsi; r13d = 0
    "4d39e5 732c"  # next: if r13 >= r12, to the end
    "488b03 488b7b08 488b7310 488b5318"  # rax, rdi, rsi, rdx = rbx[0..3]
    "4c8b5320 4c8b4328 4c8b4b30 0f05"  # r10, r8, r9 = rbx[4..6]; syscall
    "483b4338 7509"  # if rax != rbx[7], to the end
    "4883c340 49ffc5 ebcf"  # rbx += 64; r13 += 1; to next
    "4c89e8 415d 415c 5b c3"  # rax = r13; pop; return
)


class Region:
    """Pages that may move: all of one mapping, or a part of it."""

    __slots__ = ("end", "kind", "permissions", "start")

    def __init__(self, start: int, end: int, permissions: str, kind: str) -> None:
        self.start = start
        self.end = end
        self.permissions = permissions
        self.kind = kind


def unavailable() -> str:
    """Why memory cannot be moved here; "" where it can."""
    machine = os.uname().machine
    if machine != "x86_64" or sys.maxsize < 1 << 32 or sys.implementation.name != "cpython":
        return f"only CPython on x86_64 is known, not {sys.implementation.name} on {machine}"
    if len(system.thread_ids()) != 1:
        return "another thread runs"
    return ""


def transplant() -> int:
    """Move the private memory of this process of one thread. Returns the bytes moved; 0 where that is not possible."""
    if unavailable():
        return 0
    try:
        fd = os.memfd_create("herder-template", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return 0
    try:
        return _move(fd)
    finally:
        os.close(fd)


def _move(fd: int) -> int:
    # In mappings of files, which never become one with an arena.
    code = _map_file(_RUN, _PAGE, 5)
    records_max = 2 * len(system.mappings()) + 4096
    page = _map_file(b"", records_max * 64, 3)
    if not code or not page:
        return 0
    run = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p, ctypes.c_long)(code)
    records = (ctypes.c_uint64 * (8 * records_max)).from_address(page)
    count = size = 0
    for region in regions():
        for start in range(region.start, region.end, _COPIED_AT_ONCE):
            length = min(_COPIED_AT_ONCE, region.end - start)
            if count + 2 > records_max:
                break
            records[8 * count : 8 * count + 8] = [_PWRITE, fd, start, length, size, 0, 0, length]
            protection = _PROTECTIONS[region.permissions]
            mapped: list[ctypes.c_uint64 | int] = [
                _MMAP,
                start,
                length,
                protection,
                _MAP_PRIVATE_FIXED,
                fd,
                size,
                start,
            ]
            records[8 * count + 8 : 8 * count + 16] = mapped
            count += 2
            size += length
    os.ftruncate(fd, size)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    done = run(page, count)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    moved = sum(records[8 * index + 3] for index in range(0, done - 1, 2))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    system.unmap_pages(page, records_max * 64)
    system.unmap_pages(code, _PAGE)
    return moved


def _map_file(content: bytes, length: int, protection: int) -> int:
    """Pages of a file of their own, with this content; the code's are never writable. 0 where that is forbidden."""
    fd = os.memfd_create("herder-code", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        os.ftruncate(fd, length)
        return system.map_pages(fd, length, protection)
    except OSError:
        return 0
    finally:
        os.close(fd)


def regions() -> list[Region]:
    """What may move, by address."""
    writable = _library_data()
    found: list[Region] = []
    for mapping, anonymous, _, flags in system.described_mappings():
        if not anonymous or flags & _SPECIAL_FLAGS or mapping.permissions not in _PROTECTIONS:
            continue
        if not mapping.path or mapping.path.startswith("/"):
            found += _parts(mapping, anonymous, writable)
    return found


def _parts(mapping: system.Mapping, anonymous: int, writable: list[tuple[int, int]]) -> list[Region]:
    """A mapping's library data and Python's arenas: the kernel joins neighbours of both kinds."""
    parts: list[Region] = []
    free = mapping.start
    for low, high in writable:
        start, end = max(low, mapping.start), min(high, mapping.end)
        if start >= end:
            continue
        # Large and hardly used: it costs a fork little, and would cost memory.
        if (end - start) <= 8 * anonymous + (256 << 10):
            parts.append(Region(start, end, mapping.permissions, "library"))
        free = end
    if not mapping.path and mapping.permissions == "rw-p" and anonymous >= _POOLS_MIN * _POOL:
        parts.extend(Region(start, end, "rw-p", "arena") for start, end in _arenas(free, mapping.end))
    return _without_slack(mapping, parts)


def _without_slack(mapping: system.Mapping, parts: list[Region]) -> list[Region]:
    """What an arena loses to its pools' alignment goes with it, so that its neighbours become one mapping."""
    last = mapping.start
    for part in parts:
        if part.kind == "arena" and part.start - last < _POOL:
            part.start = last
        last = part.end
    if parts and parts[-1].kind == "arena" and mapping.end - last < _POOL:
        parts[-1].end = mapping.end
    return parts


def private_memory() -> Iterator[tuple[system.Mapping, int, int]]:
    """Mappings that a fork copies, with the bytes of private pages in each, and of those in huge ones."""
    for mapping, anonymous, huge, flags in system.described_mappings():
        if "dc" not in flags:
            yield mapping, anonymous, huge


class _Segment(ctypes.Structure):
    """`Elf64_Phdr`."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("physical", ctypes.c_uint64),
        ("file_bytes", ctypes.c_uint64),
        ("memory_bytes", ctypes.c_uint64),
        ("alignment", ctypes.c_uint64),
    )


class _Library(ctypes.Structure):
    """The head of `struct dl_phdr_info`."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("segments", ctypes.POINTER(_Segment)),
        ("count", ctypes.c_uint16),
    )


def _library_data() -> list[tuple[int, int]]:
    """The writable segments of all loaded libraries and of the program, in whole pages."""
    found: list[tuple[int, int]] = []

    def look(library: Any, _size: int, _data: int | None) -> int:
        each = library.contents
        for index in range(each.count):
            segment = each.segments[index]
            if segment.type == _PT_LOAD and segment.flags & _PF_W:
                start = each.base + segment.address
                found.append((start // _PAGE * _PAGE, -(-(start + segment.memory_bytes) // _PAGE) * _PAGE))
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Library), ctypes.c_size_t, ctypes.c_void_p)
    ctypes.CDLL(None).dl_iterate_phdr(callback(look), None)
    return sorted(found)


def _arenas(start: int, end: int) -> list[tuple[int, int]]:
    """From the first to the last pool in use of each of Python's arenas within these pages."""
    start = -(-start // _POOL) * _POOL
    words = system.address_space()
    if end - start > 16 * _ARENA:
        probes = range(start, end - _POOL, _ARENA + 7 * _POOL)
        if sum(_arena_index(words, probe) is not None for probe in probes) * 10 < len(probes):
            return []
    spans: dict[int, list[int]] = {}
    for pool in range(start, end - _POOL + 1, _POOL):
        index = _arena_index(words, pool)
        if index is not None:
            spans.setdefault(index, []).append(pool)
    return [
        (pools[0], pools[-1] + _POOL)
        for pools in spans.values()
        if len(pools) >= _POOLS_MIN and pools[-1] + _POOL - pools[0] <= _ARENA
    ]


def _arena_index(words: memoryview, pool: int) -> int | None:
    """The arena to which the pool at this address belongs; None if there is no pool in use."""
    at = pool >> 2
    size_class, last = words[at + 9], words[at + 11]
    if size_class >= 32 or last != _POOL - 16 * (size_class + 1) or not 0 < words[at] <= _POOL // 16:
        return None
    free = words[at + 2] | words[at + 3] << 32
    return words[at + 8] if not free or pool < free < pool + _POOL else None
