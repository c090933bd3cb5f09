"""Is this process safe to fork? Looks at its threads, descriptors, libraries and locks; says what it found, why, and
the cure.

Rules (measured on 50 uses of 14 libraries, on Linux with glibc):

    R1  a Python thread is alive                                unsafe
    R2  a native thread of a library that hangs after a fork    unsafe (libgomp's are ended first, then looked at again)
    R3  a native thread known to be harmless, or gone after a probe fork          allowed
    R4  any other native thread                                 unknown: the canary decides
    R5  a GPU is in use                                         unsafe, no canary
    R6  a descriptor that must not be shared: connected socket, io_uring, database, file open for writing         unsafe
    R7  event descriptors and pipes                             note: closed in the children
    R8  the import lock, or a lock beside other threads, is held                  unsafe / note
    R9  numba's OpenMP layer was used                           unsafe: it ends the child by SIGTERM
    canary   a forked child did not run a trivial task          unsafe
"""

from __future__ import annotations

import _imp
import _socket
import fnmatch
import os
import stat
import sys

from . import system, threads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

SAFE = "safe"
UNSAFE = "unsafe"
#: Nothing known speaks against it; the canary decides.
UNKNOWN = "unknown"

_FRESH = 'or use start="fresh"'
_IN_TASK = f"use it in the tasks instead of before them (import in preload, call in the task), {_FRESH}"
#: Beginning of a library's name or thread's name: what it is, why it is unsafe, the cure.
_HAZARDS = (
    ("libgomp", "OpenMP's idle threads do not exist in a forked child, whose next parallel loop waits for ever",
     "run setup with OMP_NUM_THREADS=1 (the default), or make the first parallel call in the tasks"),
    ("libomp", "OpenMP's threads do not exist in a forked child", _IN_TASK),
    ("libiomp5", "OpenMP's threads do not exist in a forked child", _IN_TASK),
    ("polars", "polars' thread pool does not exist in a forked child, whose first query waits for it for ever",
     f"import polars in preload but make the first query in the task; pass frames as Arrow or numpy, {_FRESH}"),
    ("tokio-rt-worker", "the tokio runtime's threads do not exist in a forked child", _IN_TASK),
    ("async-executor", "the async executor's threads do not exist in a forked child", _IN_TASK),
    ("cygrpc", "an open gRPC channel does not survive a fork",
     f"close channels at the end of setup and open them in the tasks, {_FRESH}"),
    ("libtorch", "torch's thread pools do not exist in a forked child", _IN_TASK),
    ("libc10", "torch's thread pools do not exist in a forked child", _IN_TASK),
    ("libtbb", "TBB's threads do not exist in a forked child", _IN_TASK),
    ("libcuda", "a CUDA context does not survive a fork", _IN_TASK),
    ("libjvm", "a Java virtual machine does not survive a fork", _IN_TASK),
)  # fmt: skip
#: Libraries and threads that were found to cope with a fork: they look at the process id, or have handlers for it.
_HARMLESS = ("libarrow", "jemalloc_bg_thd", "interpreter.", "libscipy_openblas", "libopenblas", "polars-ooc-clea")
_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri")
_EVENTS = tuple(f"anon_inode:{kind}" for kind in ("[eventpoll]", "[eventfd]", "[timerfd]", "[signalfd]", "inotify"))
#: Shared memory on purpose.
_SHARED = ("/memfd:", "/dev/shm/")
_HARMLESS_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/pts/")


class Finding:
    """`verdict`: "unsafe", "unknown", "allowed" or "note"."""

    __slots__ = ("cure", "reason", "rule", "seen", "verdict")

    def __init__(self, rule: str, seen: str, reason: str = "", cure: str = "", verdict: str = UNSAFE) -> None:
        self.rule = rule
        self.seen = seen
        self.reason = reason
        self.cure = cure
        self.verdict = verdict

    def encode(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        return f"{self.rule}: {self.seen}" + (f": {self.reason}" if self.reason else "")


class Report:
    """What one audit found. `kept` are the descriptors which children must have, too."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.applied: list[str] = []
        self.kept: list[int] = []
        self.thread_count = 1

    @property
    def verdict(self) -> str:
        verdicts = {finding.verdict for finding in self.findings}
        return UNSAFE if UNSAFE in verdicts else UNKNOWN if UNKNOWN in verdicts else SAFE

    def first_unsafe(self) -> Finding | None:
        return next((finding for finding in self.findings if finding.verdict == UNSAFE), None)


def audit(own: Iterable[int], allow_threads: Iterable[str] = ()) -> Report:
    """Look at this process. `own` are the descriptors of the template itself."""
    report = Report()
    alive = threads.others()
    if alive:
        alive = _end_openmp(report, alive)
    if alive:
        # Libraries with fork handlers (OpenBLAS) end their threads when the process forks: what is left is what
        # matters.
        before = {thread.tid: thread for thread in alive}
        probe_fork()
        alive = threads.others()
        for tid in before.keys() - {thread.tid for thread in alive}:
            report.findings.append(Finding("R3", str(before[tid]), "ended before the fork", verdict="allowed"))
    report.thread_count = len(alive) + 1
    report.findings.extend(_judge(thread, list(allow_threads)) for thread in alive)
    maps = system.mappings()
    _judge_libraries(report, maps)
    _judge_descriptors(report, set(own))
    _judge_locks(report, bool(alive))
    return report


def probe_fork() -> None:
    """Fork a child which ends at once."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _end_openmp(report: Report, alive: list[threads.Thread]) -> list[threads.Thread]:
    """End the idle threads of each libgomp (it makes them again on need). Returns the threads that are left."""
    paused = system.pause_openmp(threads.libraries(system.mappings(), "libgomp"))
    if not paused:
        return alive
    left = threads.others()
    if len(left) < len(alive):
        report.applied.extend(f"omp_pause_resource_all on {path.rpartition('/')[2]}" for path in paused)
    return left


def _judge(thread: threads.Thread, allowed: list[str]) -> Finding:
    names = (thread.name, thread.python_name, thread.owner)
    if any(name and fnmatch.fnmatchcase(name, pattern) for name in names for pattern in allowed):
        return Finding("R3", str(thread), "allowed by the workload (allow_threads)", verdict="allowed")
    if thread.is_python:
        reason = "it does not exist in a forked child: locks that it holds stay locked, what it was to do never happens"
        cure = (
            "end it in setup (executor.shutdown(wait=True), thread.join()), start it in the tasks, "
            f'declare it harmless with allow_threads=("{thread.python_name or thread.name}",), {_FRESH}'
        )
        return Finding("R1", str(thread), reason, cure)
    if thread.owner.startswith(_HARMLESS) or thread.name.startswith(_HARMLESS):
        return Finding("R3", str(thread), "known to cope with a fork", verdict="allowed")
    for stem, reason, cure in _HAZARDS:
        if thread.owner.startswith((stem, f"_{stem}")) or thread.name.startswith(stem):
            return Finding("R2", str(thread), reason, cure)
    return Finding("R4", str(thread), "not known; a canary child decides", verdict=UNKNOWN)


def _judge_libraries(report: Report, maps: list[system.Mapping]) -> None:
    for path in threads.libraries(maps, "libcuda.so")[:1]:
        if system.is_cuda_initialised(path):
            reason = "a CUDA context does not survive a fork: the child's first call fails, or corrupts"
            report.findings.append(Finding("R5", f"{path} is initialised", reason, _IN_TASK))
    if "numba.np.ufunc.omppool" in sys.modules and threads.libraries(maps, "libgomp"):
        reason = "it ends a forked child with SIGTERM (fork() from a process already using GNU OpenMP)"
        cure = f"set NUMBA_THREADING_LAYER=workqueue in the workload's env, {_FRESH}"
        report.findings.append(Finding("R9", "numba's OpenMP threading layer was used", reason, cure))


def _judge_descriptors(report: Report, own: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd in own:
            continue
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
            mode = os.fstat(fd).st_mode
        except OSError:
            continue  # the listing's own
        finding = _judge_descriptor(fd, target, mode)
        if finding is None:
            report.kept.append(fd)
        else:
            report.findings.append(finding)
    report.kept.sort()


def _judge_descriptor(fd: int, target: str, mode: int) -> Finding | None:
    """None where children may have it."""
    if target.startswith(_DEVICES):
        return Finding("R5", f"{target} is open", "a GPU's context does not survive a fork", _IN_TASK)
    if stat.S_ISSOCK(mode):
        return _judge_socket(fd)
    if "io_uring" in target or "userfaultfd" in target:
        return Finding("R6", f"{target} is open", "parent and children would use one queue", _IN_TASK)
    if target.startswith(_EVENTS):
        return Finding("R7", f"{target} (descriptor {fd})", "closed in the children", verdict="note")
    if stat.S_ISFIFO(mode):
        return Finding("R7", f"a pipe (descriptor {fd})", "closed in the children", verdict="note")
    if target.startswith(_SHARED) or target.startswith(_HARMLESS_DEVICES):
        return None
    if stat.S_ISREG(mode):
        return _judge_file(fd, target)
    return (
        None
        if stat.S_ISDIR(mode)
        else Finding("R7", f"{target} (descriptor {fd})", "closed in the children", verdict="note")
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
        return Finding("R7", f"a socket (descriptor {fd})", "closed in the children", verdict="note")
    shown = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) and len(peer) > 1 else str(peer)
    reason = "parent and children would speak on one connection and mix their messages"
    return Finding(
        "R6", f"a connection to {shown}", reason, f"close it at the end of setup and connect in the tasks, {_FRESH}"
    )


def _judge_file(fd: int, target: str) -> Finding | None:
    cure = f"close it at the end of setup and open it in the tasks, {_FRESH}"
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


def _judge_locks(report: Report, has_threads: bool) -> None:
    if _imp.lock_held():
        reason = "a forked child could never import"
        report.findings.append(
            Finding("R8", "the import lock is held", reason, f"end the thread that imports, {_FRESH}")
        )
    if not has_threads:
        return
    import _thread
    import gc

    # Beside no other thread a held lock is the main thread's own and means the same in a child.
    held = sum(1 for thing in gc.get_objects() if type(thing) is _thread.LockType and thing.locked())
    if held > 1:
        reason = "if another thread holds them, they stay locked in a forked child"
        report.findings.append(Finding("R8", f"{held} locks are held", reason, verdict="note"))
