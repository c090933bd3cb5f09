"""Pages that every child writes to are copied as it is forked, and code that it runs is mapped then: it need not fault.

Theory of operation. After a fork each page that parent or child writes to costs a fault and a copy; a task's child
writes to some 330 pages that its template shares with it, and the template writes to 80 of them again. The kernel
copies a page at once, in `fork`, where it is pinned for DMA (since Linux 5.10: a device may write to the parent's page,
so the child must not share it). Registering a buffer with io_uring pins its pages and does nothing else. Which pages
to pin is seen from a child that rehearses a whole life: at its end, those are the pages that it has for itself alone.
A page costs about as much this way, in time of the template; but a child that waits for its task has paid already, and
answers it in a third less time.

Code and constants lie in private file mappings, whose page tables `fork` leaves out: each child maps them again, fault
by fault. It copies them where one page of the mapping was ever written to; so one byte is written over itself.

Both are off where the kernel does not allow them (containers often forbid io_uring): children then fault, as ever.
"""

from __future__ import annotations

import array
import ctypes
import os
import select

from . import system, transplant

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: A child that rehearses takes a millisecond, and some more to look at gigabytes of page tables.
LIMIT_S = 10.0
#: Mappings larger than this in all are not looked through.
LOOKED_AT_BYTES_MAX = 4 << 30
#: io_uring takes no more buffers than this.
PINNED_MAX = 1 << 14
#: Of a huge page's 512 parts: where children write to fewer, it stays whole.
SPLIT_PARTS_MIN = 8
_SETUP, _REGISTER, _REGISTER_BUFFERS = 425, 427, 0
_PARAMETERS_BYTES = 120
_PRESENT, _FILE, _EXCLUSIVE = 1 << 63, 1 << 61, 1 << 56


def settle(live: Callable[[int], None]) -> tuple[list[str], bool]:
    """Make forks from now on take these pages along. `live` is called in a forked child: it does what children
    do, with this descriptor as its output, and returns. Returns what was done, for the user, and
    whether the pages come with the fork."""
    written, read = _seen_by(live)
    written = _outside_huge_pages(written)
    applied = []
    mapped = _map_at_fork(read)
    if mapped:
        applied.append(f"code and constants of {mapped} libraries are mapped at the fork")
    pinned = _pin(written)
    if pinned:
        applied.append(f"{pinned} pages that every child writes to are copied at the fork")
    return applied, pinned > 0


def _seen_by(live: Callable[[int], None]) -> tuple[list[int], list[int]]:
    """Addresses of pages that a child had for itself at its end, and of those of files that it read."""
    fd = os.memfd_create("herder-pages", os.MFD_CLOEXEC)
    try:
        pid = os.fork()
        if pid == 0:
            try:
                live(fd)
                written, read = _own_pages()
                os.write(1, array.array("Q", [len(written), *written, *read]).tobytes())
            finally:
                os._exit(0)
        _wait(pid)
        size = os.fstat(fd).st_size
        found = array.array("Q", os.pread(fd, size, 0))
    finally:
        os.close(fd)
    if not found:
        return [], []
    return list(found[1 : found[0] + 1]), list(found[found[0] + 1 :])


def _wait(pid: int) -> None:
    """Until it has ended; it is killed if that takes too long."""
    poll = select.poll()
    pidfd = os.pidfd_open(pid)
    poll.register(pidfd, select.POLLIN)
    if not poll.poll(LIMIT_S * 1000):
        os.kill(pid, 9)
    os.waitpid(pid, 0)
    os.close(pidfd)


def _own_pages() -> tuple[list[int], list[int]]:
    written: list[int] = []
    read: list[int] = []
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for mapping in _looked_at():
            entries = _entries(pagemap.fileno(), mapping.start, mapping.end)
            if "w" in mapping.permissions:
                wanted, flags, found = _PRESENT | _FILE | _EXCLUSIVE, _PRESENT | _EXCLUSIVE, written
            else:
                wanted, flags, found = _PRESENT | _FILE, _PRESENT | _FILE, read
            found.extend(
                mapping.start + index * system.SMALL_PAGE_BYTES
                for index, entry in enumerate(entries)
                if entry & wanted == flags
            )
    return written, read


def _looked_at() -> list[system.Mapping]:
    found = []
    left = LOOKED_AT_BYTES_MAX
    for mapping in system.mappings():
        if mapping.permissions[0] == "r" and mapping.permissions[3] == "p" and not mapping.path.startswith("[v"):
            left -= mapping.end - mapping.start
            if left < 0:
                break
            found.append(mapping)
    return found


def _entries(pagemap: int, start: int, end: int) -> array.array[int]:
    first, count = start // system.SMALL_PAGE_BYTES, (end - start) // system.SMALL_PAGE_BYTES
    return array.array("Q", os.pread(pagemap, count * 8, first * 8))


def _map_at_fork(read: list[int]) -> int:
    """Have the mappings of these pages copied at the fork. Returns how many there are."""
    done = 0
    maps = [mapping for mapping in _looked_at() if "w" not in mapping.permissions and mapping.path]
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        for mapping in maps:
            address = next((page for page in read if mapping.start <= page < mapping.end), None)
            if address is None:
                continue
            try:
                byte = os.pread(memory.fileno(), 1, address)
                os.pwrite(memory.fileno(), byte, address)
            except OSError:
                return done
            done += 1
    return done


def _pin(addresses: list[int]) -> int:
    """Pin those of these pages that are this process's own. Returns how many; 0 where it is not allowed."""
    own = _anonymous(addresses)
    if not own:
        return 0
    parameters = ctypes.create_string_buffer(_PARAMETERS_BYTES)
    ring = system.syscall(_SETUP, 1, ctypes.addressof(parameters))
    if ring < 0:
        return 0
    buffers = array.array("Q", [word for start, size in _ranges(own) for word in (start, size)][: 2 * PINNED_MAX])
    address, _ = buffers.buffer_info()
    if system.syscall(_REGISTER, ring, _REGISTER_BUFFERS, address, len(buffers) // 2) < 0:
        os.close(ring)
        return 0
    return sum(buffers[1::2]) // system.SMALL_PAGE_BYTES


def _outside_huge_pages(addresses: list[int]) -> list[int]:
    """These pages without those that had better stay parts of a huge one.

    A pin holds all of its huge page, so each fork would copy all of it. Where many of a huge page's parts are written
    to, it is split first; where few are, it stays, and these few are left to fault. Break-even as measured: a huge page
    split at a fault 50 µs and 7 µs a part; split before 70 µs and 4 µs a part.
    """
    huge = [mapping for mapping, _, size in transplant.private_memory() if size and "w" in mapping.permissions]
    if not huge:
        return addresses
    blocks: dict[int, list[int]] = {}
    left = []
    for address in addresses:
        if any(mapping.start <= address < mapping.end for mapping in huge):
            blocks.setdefault(address // system.HUGE_PAGE_BYTES, []).append(address)
        else:
            left.append(address)
    for parts in blocks.values():
        if len(parts) >= SPLIT_PARTS_MIN and system.split_huge_page(parts[0]):
            left.extend(parts)
    return left


def _anonymous(addresses: list[int]) -> list[int]:
    """Those of these pages that are here, and not a file's."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        fd = pagemap.fileno()
        return [
            address
            for address in addresses
            if _entries(fd, address, address + system.SMALL_PAGE_BYTES)[0] & (_PRESENT | _FILE) == _PRESENT
        ]


def _ranges(addresses: list[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for address in sorted(addresses):
        if found and sum(found[-1]) == address:
            found[-1] = (found[-1][0], found[-1][1] + system.SMALL_PAGE_BYTES)
        else:
            found.append((address, system.SMALL_PAGE_BYTES))
    return found
