"""What the standard library does not offer of Linux: prctl, fflush, madvise and openmp by `ctypes`; and short reads of
/proc.

`ctypes` is imported here, once, in the template: its children need `prctl`, and must not import anything themselves.
"""

from __future__ import annotations

import ctypes
import os
import resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MADV_COLLAPSE = 25
HUGE_PAGE_BYTES = 2 << 20
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
#: Size of glibc's `FILE` on 64-bit machines; its layout is part of the ABI. The first words are its flags and pointers.
_STREAM_BYTES = 216
#: ... and how far apart the standard ones may lie, with what glibc keeps between them.
_STDIO_BYTES_MAX = 4096
#: Badness added to a child, so that it dies of memory pressure before its template and the agent.
CHILD_OOM_SCORE_ADJ = 500

_LIMITS = {name: getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
_libc = ctypes.CDLL(None, use_errno=True)
#: Without conversions, errno and the release of the interpreter's lock: a forked child pays for each in page faults.
prctl = ctypes.PyDLL(None).prctl
_fflush = _libc.fflush
_fflush.argtypes = (ctypes.c_void_p,)
_mmap = _libc.mmap
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_mmap.restype = ctypes.c_void_p
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def die_with(parent: int) -> None:
    """Ask to be killed when the thread that made this process ends; end now if that has already happened."""
    prctl(PR_SET_PDEATHSIG, 9)
    if os.getppid() != parent:
        os._exit(0)


def become_subreaper() -> None:
    """Orphans of this process's descendants become its children, and not the agent's or init's."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def set_limit(name: str, soft: int, hard: int) -> None:
    """Set a resource limit by its name, as far as this process may: never above a hard limit that it has."""
    number = _LIMITS.get(name)
    if number is None:
        return
    _, ceiling = resource.getrlimit(number)
    if ceiling != resource.RLIM_INFINITY and os.geteuid() != 0:
        hard = ceiling if hard == resource.RLIM_INFINITY else min(hard, ceiling)
    if hard != resource.RLIM_INFINITY and (soft == resource.RLIM_INFINITY or soft > hard):
        soft = hard
    resource.setrlimit(number, (soft, hard))


def enter_groups(entrances: list[str]) -> None:
    """Put this process into control groups, by their `cgroup.procs`.

    Raises:
        OSError: it may not.
    """
    for path in entrances:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"0")
        finally:
            os.close(fd)


class CStreams:
    """C's stdio, flushed only where something may be in it: `fflush` costs a forked child page faults.

    glibc links each stream that is opened to the front of a list whose last three are the standard ones, and writing
    changes a stream's structure. As long as neither has happened here, there is nothing to flush. Once it has, or with
    another C library, each `flush` is one.
    """

    def __init__(self) -> None:
        #: The streams' memory as it is, and as it was when nothing was in them; never equal where that is not known.
        self.memory: memoryview | None = None
        self.clean: bytes | None = b""

    def settle(self) -> None:
        """Flush; what is written from now on will be seen."""
        _fflush(None)
        self.memory = _stdio_memory()
        self.clean = b"" if self.memory is None else self.memory.tobytes()

    def flush(self) -> None:
        if self.memory != self.clean:
            self.memory = None
            _fflush(None)


def _stdio_memory() -> memoryview | None:
    """The head of glibc's list of streams, stdout and stderr, which lie together; None where other streams are open."""
    try:
        out, err, front = (ctypes.c_void_p.in_dll(_libc, name) for name in ("stdout", "stderr", "_IO_list_all"))
    except ValueError:
        return None
    if not out.value or not err.value or front.value != err.value:
        return None
    parts = [(ctypes.addressof(front), 8), (out.value, _STREAM_BYTES), (err.value, _STREAM_BYTES)]
    start = min(address for address, _ in parts)
    length = max(address + size for address, size in parts) - start
    return memory_at(start, length).cast("B") if length <= _STDIO_BYTES_MAX else None


def write_memory(address: int, content: bytes) -> None:
    """Overwrite this process's own memory."""
    ctypes.memmove(address, content, len(content))


def read_memory(address: int, length: int) -> bytes:
    return ctypes.string_at(address, length)


def memory_at(address: int, length: int) -> memoryview:
    """This process's own memory, as it is whenever it is looked at."""
    return memoryview((ctypes.c_char * length).from_address(address))


class Mapping:
    """A line of /proc/self/maps."""

    __slots__ = ("end", "path", "permissions", "start")

    def __init__(self, start: int, end: int, permissions: str, path: str) -> None:
        self.start = start
        self.end = end
        self.permissions = permissions
        self.path = path


def mappings() -> list[Mapping]:
    found = []
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            found.append(parse_mapping(line))
    return found


def parse_mapping(line: str) -> Mapping:
    fields = line.split(None, 5)
    start, _, end = fields[0].partition("-")
    path = fields[5].rstrip("\n") if len(fields) > 5 else ""
    return Mapping(int(start, 16), int(end, 16), fields[1], path)


def described_mappings() -> Iterator[tuple[Mapping, int, int, set[str]]]:
    """This process's mappings with the bytes of private pages in each, those of huge ones, and their flags (smaps)."""
    mapping: Mapping | None = None
    anonymous = huge = 0
    with open("/proc/self/smaps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if line[0] not in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
                mapping, anonymous, huge = parse_mapping(line), 0, 0
            elif line.startswith("Anonymous:"):
                anonymous = int(line.split()[1]) * 1024
            elif line.startswith("AnonHugePages:"):
                huge = int(line.split()[1]) * 1024
            elif line.startswith("VmFlags:") and mapping is not None:
                yield mapping, anonymous, huge, set(line.split()[1:])


def address_space() -> memoryview:
    """All of this process's memory, in words of 32 bits: word N is at address 4 N. As sharp as it sounds."""
    return memoryview((ctypes.c_uint32 * (1 << 45)).from_address(0)).cast("B").cast("I")


def map_pages(fd: int, length: int, protection: int) -> int:
    """Map a file privately, or anonymous memory (-1), outside any allocator. Returns the address; raises OSError."""
    address: int | None = _mmap(None, length, protection, 0x02 if fd >= 0 else 0x22, fd, 0)
    if address is None or address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return address


def unmap_pages(address: int, length: int) -> None:
    _munmap(address, length)


def collapse_huge_pages() -> int:
    """Fold anonymous memory and the heap into huge pages, where the kernel can (6.1+). Returns bytes that were
    folded."""
    folded = 0
    for mapping in mappings():
        if not mapping.permissions.startswith("rw-p") or mapping.path not in ("", "[heap]"):
            continue
        start = -(-mapping.start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        length = (mapping.end - start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if length > 0 and _madvise(start, length, MADV_COLLAPSE) == 0:
            folded += length
    return folded


def pause_openmp(paths: list[str]) -> list[str]:
    """End the idle threads of these libgomp's (already loaded, by path). Returns those that did so."""
    paused = []
    for path in paths:
        try:
            if ctypes.CDLL(path).omp_pause_resource_all(2) == 0:
                paused.append(path)
        except (OSError, AttributeError):
            # Not loadable by this path any more, or older than OpenMP 5.0: the audit speaks for itself.
            continue
    return paused


def is_cuda_initialised(path: str) -> bool:
    """Whether somebody called `cuInit` in this process; `path` is the loaded libcuda's."""
    count = ctypes.c_int()
    not_initialised = 3
    try:
        return bool(ctypes.CDLL(path).cuDeviceGetCount(ctypes.byref(count)) != not_initialised)
    except (OSError, AttributeError):
        return True


def memory_bytes(pid: int | str = "self") -> tuple[int, int]:
    """Resident and anonymous memory of a process."""
    resident = anonymous = 0
    with open(f"/proc/{pid}/status", "rb") as lines:
        for line in lines:
            if line.startswith(b"VmRSS:"):
                resident = int(line.split()[1]) * 1024
            elif line.startswith(b"RssAnon:"):
                anonymous = int(line.split()[1]) * 1024
    return resident, anonymous


def anon_bytes() -> int:
    """Private memory of this process."""
    with open("/proc/self/statm", "rb") as file:
        words = file.read().split()
    return (int(words[1]) - int(words[2])) * PAGE_BYTES


def open_or_none(path: str, flags: int) -> int | None:
    """A descriptor that no program is exec'd with; None where the file cannot be opened."""
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError:
        return None


def thread_ids(pid: int | str = "self") -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


def children_of(pid: int) -> list[int]:
    """Direct children, over all threads. Empty when the process is gone."""
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found.extend(int(word) for word in file.read().split())
        except OSError:
            continue
    return found


def descendants_of(pid: int) -> list[int]:
    """All processes below `pid`, nearest first, as far as /proc shows them at this moment."""
    found: list[int] = []
    seen = {pid}
    front = [pid]
    while front:
        below = [child for parent in front for child in children_of(parent) if child not in seen]
        seen.update(below)
        found.extend(below)
        front = below
    return found
