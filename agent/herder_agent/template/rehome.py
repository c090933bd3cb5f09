"""Makes a fork's price independent of large data: moves large blocks of memory into a sealed memory file, in place.

Theory of operation. A fork copies the page tables of anonymous memory (36 ms per GB of small pages) but not those of a
file mapping that this process has not written to since. So each large block is copied into a memfd, and the memfd is
mapped over the *same addresses*, privately and writeable. No pointer changes: arrays, their views and flags, what
libraries hold in C, module globals are all as before, nothing has to pickle, and a child that writes gets its own copy
of the page, as before. The memfd is sealed, so nobody can change it under the mappings, and its descriptor closed.

Which blocks. Mapping a file over memory is seen by an allocator only if it gives pages back in between and expects
zeros (MADV_DONTNEED). glibc never does this to a block that it mapped alone: such a block is unmapped or moved as a
whole, and where the move fails (it now spans several mappings) glibc allocates, copies and unmaps. Therefore exactly
these blocks are taken, whoever asked for them: numpy, Arrow's system pool, a forest's nodes in C++. They are found by
their headers at the head of pages of anonymous memory, and this is believed only if number and size of all that were
found equal what glibc itself has counted (`mallinfo`). `prepare` makes glibc map every block of 1 MiB or more alone.

What is left as it was: heaps of other allocators (jemalloc, mimalloc, Python's own arenas), smaller blocks, and blocks
whose pages are locked, kept from children or watched by somebody. Sources: glibc malloc/malloc.c (sysmalloc_mmap,
munmap_chunk, mremap_chunk), linux mm/memory.c (vma_needs_copy). See docs/decisions/0010.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

from . import canary, system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

#: Blocks below this are left: three more mappings cost a fork as much as copying the page tables of half a megabyte.
BLOCK_BYTES_MIN = 1 << 20
#: ... and no more blocks than these, the largest: each makes every fork a few microseconds dearer.
BLOCKS_MAX = 2_000
#: Moved at a time: so much more memory is needed for a moment.
CHUNK_BYTES = 32 << 20
#: What glibc itself would have come to: above it, a task's temporary arrays are mapped and unmapped each time.
TASK_MMAP_BYTES = 32 << 20
PAGE_BYTES = mmap.PAGESIZE
_PAGE_WORDS = PAGE_BYTES // 8
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value
#: Last bits of a header's size: mapped alone; and neither "previous in use" nor "not of the main arena".
_FLAGS, _MAPPED = 7, 2
#: Where in its first page a block's header may be: alignments asked for of up to a page push it on.
_OFFSETS = (0, *((1 << power) - 16 for power in range(6, 13)))
#: Flags of a mapping (smaps) that forbid it: not copied to or wiped in children, locked, I/O, raw frames, watched.
_FORBIDDEN = frozenset(("dc", "wf", "lo", "io", "pf", "um", "uw", "ui", "ss"))
_SCAN_PAGES = 1024
#: The self-test looks for free pieces of the heap in so many steps of 2 MiB.
_GAPS_MAX = 4096
#: Bits 63 and 62 of a page's entry in /proc/self/pagemap, present or swapped, from its highest byte.
_HAS_CONTENT = bytes(1 if value & 0xC0 else 0 for value in range(256))


class Moved:
    """What was done. `off` says why nothing was, "" otherwise."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.blocks = 0
        self.off = ""


class _Block:
    """A mapped block of glibc's: [start, end), both at pages."""

    __slots__ = ("end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end


_FIELDS = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]


class _MallInfo2(ctypes.Structure):
    """`struct mallinfo2`; `hblks` and `hblkhd` are the number and bytes of mapped blocks."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _FIELDS)


class _MallInfo(ctypes.Structure):
    """`struct mallinfo`, of 32 bits each."""

    _fields_ = tuple((name, ctypes.c_uint) for name in _FIELDS)


def prepare() -> None:
    """From now on glibc maps each block of BLOCK_BYTES_MIN or more alone. Nothing with another C library."""
    _set_option(_M_MMAP_THRESHOLD, BLOCK_BYTES_MIN)


moved = Moved()


def move_large_blocks() -> Moved:
    """Move all large blocks into one sealed memfd. Then let tasks' own blocks come from the heap again."""
    try:
        blocks = _movable(moved)
        if blocks:
            moved.off = _self_test() or _why_not_now()
        if blocks and not moved.off:
            _move(blocks, moved)
    finally:
        _set_option(_M_MMAP_THRESHOLD, TASK_MMAP_BYTES)
        _set_option(_M_TRIM_THRESHOLD, 2 * TASK_MMAP_BYTES)
    return moved


def tell() -> list[str]:
    """What `move_large_blocks` did, for the user: nothing where there was nothing to do."""
    said = []
    if moved.size_bytes:
        said.append(f"{moved.size_bytes >> 20} MiB in {moved.blocks} blocks moved into shared memory")
    if moved.off:
        said.append(f"large blocks stay in private memory ({moved.off}): each fork copies their page tables")
    return said


def _set_option(option: int, value: int) -> None:
    try:
        system._libc.mallopt(option, value)
    except AttributeError:
        return  # musl has none; `_counted` says that nothing can be moved


def _movable(moved: Moved) -> list[_Block]:
    """The blocks to move, if all of glibc's mapped blocks were found; else none, and `moved.off` says why."""
    counted = _counted()
    if counted is None:
        moved.off = "the C library is not glibc"
        return []
    if not counted[0]:
        return []
    blocks = [block for region in _regions() for block in _blocks_in(*region)]
    # In a branch some were moved before it was forked.
    found = (
        len(blocks) + moved.blocks,
        sum(block.end - block.start for block in blocks) + moved.size_bytes,
    )
    if found[0] != counted[0] or (found[1] - counted[1]) % (1 << 32):
        moved.off = f"glibc counts {counted[0]} mapped blocks of {counted[1]} bytes, found are {found[0]} of {found[1]}"
        return []
    large = [block for block in blocks if block.end - block.start >= BLOCK_BYTES_MIN]
    if not large:
        return []
    forbidden = _forbidden()
    large = [b for b in large if not any(b.start < end and start < b.end for start, end in forbidden)]
    large.sort(key=lambda block: block.start - block.end)
    return large[:BLOCKS_MAX]


def _counted() -> tuple[int, int] | None:
    """Number and bytes of the mapped blocks, as glibc has counted them; before 2.33 modulo 2**32."""
    for name, structure in (("mallinfo2", _MallInfo2), ("mallinfo", _MallInfo)):
        try:
            function = system._libc[name]
        except AttributeError:
            continue
        function.restype = structure
        information = function()
        return information.hblks, information.hblkhd
    return None


def _regions() -> Iterator[tuple[int, int]]:
    """Stretches of private, anonymous, writeable memory. (Advice, such as numpy's on huge pages, splits mappings.)"""
    start = end = 0
    for mapping in system.mappings():
        if mapping.permissions != "rw-p" or not (mapping.path == "" or mapping.path.startswith("[anon")):
            continue
        if mapping.start != end:
            if end:
                yield start, end
            start = mapping.start
        end = mapping.end
    if end:
        yield start, end


def _blocks_in(start: int, end: int) -> Iterator[_Block]:
    """The blocks with a header in this stretch. The inside of a block is not looked at."""
    page = floor = start
    while page < end:
        count = min(_SCAN_PAGES, (end - page) // PAGE_BYTES)
        words = memoryview((ctypes.c_uint64 * (count * _PAGE_WORDS)).from_address(page)).cast("B").cast("Q")
        for offset, number in _headers(words):
            block = _block_at(words, page, page + number * PAGE_BYTES, offset, floor, end)
            if block is not None:
                yield block
                page = floor = block.end
                break
        else:
            page += count * PAGE_BYTES


def _headers(words: memoryview) -> list[tuple[int, int]]:
    """Places where the size of a mapped block could stand, by page: offset in the page, page."""
    found = []
    for offset in _OFFSETS:
        column = words[offset // 8 + 1 :: _PAGE_WORDS].tolist()
        found += [(number, offset) for number, size in enumerate(column) if size & _FLAGS == _MAPPED]
    return [(offset, number) for number, offset in sorted(found)]


def _block_at(  # noqa: PLR0917
    words: memoryview, base: int, page: int, offset: int, floor: int, limit: int
) -> _Block | None:
    at = (page + offset - base) // 8
    before, size = words[at], words[at + 1]
    start, end = page + offset - before, page + offset + size - _MAPPED
    # Only an alignment above a page moves the header out of the first page.
    in_place = start == page or (offset == _OFFSETS[-1] and floor <= start < page)
    if in_place and start % PAGE_BYTES == 0 and end % PAGE_BYTES == 0 and page < end <= limit:
        return _Block(start, end)
    return None


def _forbidden() -> list[tuple[int, int]]:
    """Mappings with a flag that forbids to replace them."""
    return [
        (mapping.start, mapping.end)
        for mapping, _, _, flags in system.described_mappings()
        if not _FORBIDDEN.isdisjoint(flags)
    ]


def _why_not_now() -> str:
    """Another thread might write to a block just while it is moved, unless it sleeps until this one wakes it."""
    own = os.getpid()
    others = [tid for tid in system.thread_ids() if tid != own]
    try:
        if all(canary._waits_for_ever(f"/proc/self/task/{tid}/syscall") for tid in others):
            return ""
    except OSError:
        pass
    return f"{len(others)} other threads might write to it meanwhile"


def _move(blocks: list[_Block], moved: Moved) -> None:
    """Between copy and mapping only this runs, and what it writes (stack, small objects) is in no large block."""
    fd = os.memfd_create("herder-setup", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        offset = 0
        for block in blocks:
            # The header's page stays: with it change the counts of objects that begin in it.
            start, end = block.start + PAGE_BYTES, block.end
            os.ftruncate(fd, offset + end - start)
            for first in range(start, end, CHUNK_BYTES):
                length = min(CHUNK_BYTES, end - first)
                _move_chunk(fd, offset, first, length)
                offset += length
                moved.size_bytes += length
            moved.blocks += 1
    except OSError as error:
        # No more room for shared memory: what was moved is right, what was not is as it was.
        moved.off = f"stopped after {moved.size_bytes >> 20} MiB: {error.strerror}"
    finally:
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        os.close(fd)


def _move_chunk(fd: int, offset: int, address: int, length: int) -> None:
    memory = memoryview((ctypes.c_char * length).from_address(address)).cast("B")
    for first, last in runs(address, length):
        written = first
        while written < last:
            written += os.pwrite(fd, memory[written:last], offset + written)
    memory.release()
    map_over(address, length, fd, offset)


def runs(address: int, length: int) -> Iterator[tuple[int, int]]:
    """The parts of this memory that have pages, as offsets; what was never touched stays a hole of the file."""
    count = length // PAGE_BYTES
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(address // PAGE_BYTES * 8)
            entries = file.read(count * 8)
    except OSError:
        entries = b""
    if len(entries) < count * 8:
        yield 0, length
        return
    pages = entries[7::8].translate(_HAS_CONTENT)
    at = pages.find(1)
    while at >= 0:
        end = pages.find(0, at)
        end = count if end < 0 else end
        yield at * PAGE_BYTES, end * PAGE_BYTES
        at = pages.find(1, end)


def map_over(address: int, length: int, fd: int, offset: int) -> None:
    """Map this part of a file here, privately and writeable, in place of what is mapped here. Raises OSError."""
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
    result = _mmap(address, length, protection, flags, fd, offset)
    if result != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def map_anywhere(length: int, protection: int, fd: int) -> int:
    """Map a whole file privately, wherever there is room; no descriptor is kept. Raises OSError."""
    address = int(_mmap(None, length, protection, mmap.MAP_PRIVATE, fd, 0))
    if address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return address


def _self_test() -> str:
    """Move a block of our own and use it in every way that its owner could. Returns what went wrong."""
    size = 2 * BLOCK_BYTES_MIN
    # Of what setup freed the heap may have a piece as large: it would be given that one.
    gaps = _fill_gaps(size)
    content = bytearray(os.urandom(64)) * (size // 64)
    for gap in gaps:
        system._libc.free(ctypes.c_void_p(gap))
    expected = bytes(content)
    address = ctypes.addressof((ctypes.c_char * size).from_buffer(content))
    if ctypes.c_uint64.from_address(address - 8).value & _FLAGS != _MAPPED:
        return "self-test: glibc does not map large blocks alone"
    page = -(-address // PAGE_BYTES) * PAGE_BYTES
    length = (address + size - page) // PAGE_BYTES * PAGE_BYTES
    fd = os.memfd_create("herder-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, length)
        _move_chunk(fd, 0, page, length)
        if content != expected:
            return "self-test: the memory changed when it was moved"
        content[size // 2] ^= 1
        content.extend(expected)
        if content[: size // 2] + content[size // 2 + 1 : size] != expected[: size // 2] + expected[size // 2 + 1 :]:
            return "self-test: the memory changed when it grew"
    except OSError as error:
        return f"self-test: {error.strerror}"
    finally:
        os.close(fd)
    return ""


def _fill_gaps(size: int) -> list[int]:
    """Untouched blocks of this size, of which the last one is mapped alone: the heap has no room for another."""
    malloc = system._libc.malloc
    malloc.argtypes, malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    taken: list[int] = []
    while len(taken) < _GAPS_MAX and (address := malloc(size)):
        taken.append(address)
        if ctypes.c_uint64.from_address(address - 8).value & _FLAGS == _MAPPED:
            break
    return taken


_mmap = system._libc.mmap
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_mmap.restype = ctypes.c_void_p
