"""The rules of the audit, each a function that looks at one scene and yields what it finds.

Measured on 50 uses of 14 libraries, on Linux with glibc. `RULES` is the list; the guide's table is made of it. To add a
rule: write the function, whose docstring's first line says what it looks at, and list it with when it is unsafe.
"""

from __future__ import annotations

import _imp
import ctypes
import fnmatch
import sys

from . import objects, system, threads
from .descriptors import judged
from .findings import ALLOWED, FRESH, IN_TASK, NOTE, UNKNOWN, Finding

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

#: Beginning of a library's name or thread's name: what it is, why it is unsafe, the cure.
_HAZARDS = (
    ("libgomp", "OpenMP's idle threads do not exist in a forked child, whose next parallel loop waits for ever",
     "run setup with OMP_NUM_THREADS=1 (the default), or make the first parallel call in the tasks"),
    ("libomp", "OpenMP's threads do not exist in a forked child", IN_TASK),
    ("libiomp5", "OpenMP's threads do not exist in a forked child", IN_TASK),
    ("polars", "polars' thread pool does not exist in a forked child, whose first query waits for it for ever",
     f"import polars in preload but make the first query in the task; pass frames as Arrow or numpy, {FRESH}"),
    ("tokio-rt-worker", "the tokio runtime's threads do not exist in a forked child", IN_TASK),
    ("async-executor", "the async executor's threads do not exist in a forked child", IN_TASK),
    ("cygrpc", "a gRPC channel or server is open: its threads and connections do not exist in a forked child",
     f"close channels at the end of setup and open them in the tasks, {FRESH}"),
    ("libtorch", "torch's thread pools do not exist in a forked child", IN_TASK),
    ("libc10", "torch's thread pools do not exist in a forked child", IN_TASK),
    ("libtbb", "TBB's threads do not exist in a forked child", IN_TASK),
    ("libcuda", "a CUDA context does not survive a fork", IN_TASK),
    ("libjvm", "a Java virtual machine does not survive a fork", IN_TASK),
)  # fmt: skip
#: Libraries and threads that were found to cope with a fork: they look at the process id, or have handlers for it.
_HARMLESS = ("libarrow", "jemalloc_bg_thd", "interpreter.", "libscipy_openblas", "libopenblas", "polars-ooc-clea")
#: Beginnings of the names of Python threads whose owner is known, and how he is made to end them.
_PYTHON_CURES = (
    ("QueueFeederThread", "close the multiprocessing.Queue in setup (queue.close(); queue.join_thread())"),
    ("ThreadPoolExecutor", "end the executor in setup (executor.shutdown(wait=True))"),
    ("asyncio_", "end the loop's executor in setup (loop.shutdown_default_executor()); asyncio.run does it"),
    ("grpc", "close gRPC channels and stop servers at the end of setup"),
)


class Scene:
    """What there is to see after one step. `ended` are threads that were there until a fork was tried."""

    def __init__(
        self,
        *,
        own: Iterable[int],
        allowed: Iterable[str],
        baseline: list[Any],
        alive: list[threads.Thread],
        ended: list[threads.Thread],
        maps: list[system.Mapping],
    ) -> None:
        self.allowed = list(allowed)
        self.alive = alive
        self.ended = ended
        self.maps = maps
        self.descriptors = judged(set(own))
        self.objects = objects.look(baseline)

    def threads_by(self, rule: str) -> list[threads.Thread]:
        return [thread for thread in self.alive if _rule_of(thread, self.allowed) == rule]

    def descriptors_by(self, rule: str) -> Iterator[Finding]:
        for descriptor in self.descriptors:
            if descriptor.finding is not None and descriptor.finding.rule == rule:
                yield descriptor.finding


def python_threads(scene: Scene) -> Iterator[Finding]:
    """Python threads, also those behind executors, queues and event loops"""
    reason = "it does not exist in a forked child: locks that it holds stay locked, what it was to do never happens"
    for thread, seen in _grouped(scene.threads_by("R1")):
        name = thread.python_name or thread.name
        end = next(
            (cure for stem, cure in _PYTHON_CURES if name.startswith(stem)),
            "end it in setup (executor.shutdown(wait=True), thread.join())",
        )
        cure = f'{end}, start it in the tasks, declare it harmless with allow_threads=("{name}",), {FRESH}'
        yield Finding("R1", seen, reason, cure)


def hazardous_threads(scene: Scene) -> Iterator[Finding]:
    """native threads, each attributed to the library whose frames are on its stack"""
    for thread, seen in _grouped(scene.threads_by("R2")):
        hazard = _hazard_of(thread)
        assert hazard is not None
        yield Finding("R2", seen, hazard[1], hazard[2])


def harmless_threads(scene: Scene) -> Iterator[Finding]:
    """native threads which are known to cope, which end at a fork, or which the workload allows by name"""
    alive = {str(thread) for thread in scene.alive}
    # What ended and is there again (gRPC's) is judged as what it is.
    for _, seen in _grouped(thread for thread in scene.ended if str(thread) not in alive):
        yield Finding("R3", seen, "ended before the fork", verdict=ALLOWED)
    for thread, seen in _grouped(scene.threads_by("R3")):
        asked = _is_allowed(thread, scene.allowed)
        reason = "allowed by the workload (allow_threads)" if asked else "known to cope with a fork"
        yield Finding("R3", seen, reason, verdict=ALLOWED)


def unknown_threads(scene: Scene) -> Iterator[Finding]:
    """any other native thread"""
    for thread, seen in _grouped(scene.threads_by("R4")):
        cure = f'declare it harmless with allow_threads=("{thread.name}",), {FRESH}'
        yield Finding("R4", seen, "not known; a canary child decides", cure, UNKNOWN)


def gpus(scene: Scene) -> Iterator[Finding]:
    """GPU device files, and whether CUDA was initialised"""
    yield from scene.descriptors_by("R5")
    for path in threads.libraries(scene.maps, "libcuda.so")[:1]:
        if system.is_cuda_initialised(path):
            reason = "a CUDA context does not survive a fork: the child's first call fails, or corrupts"
            yield Finding("R5", f"{path} is initialised", reason, IN_TASK)


def unsharable_descriptors(scene: Scene) -> Iterator[Finding]:
    """connected sockets, io_uring, databases, files open for writing or locked, multiprocessing's queues and pipes"""
    yield from scene.descriptors_by("R6")
    if scene.objects.pipes:
        count = len(scene.objects.pipes)
        yield Finding(
            "R6",
            f"{count} open end{'s' if count > 1 else ''} of multiprocessing queues or pipes",
            "they are closed in a forked child, where each use of them fails",
            f"close them at the end of setup and make them in the tasks, {FRESH}",
        )


def event_loops(scene: Scene) -> Iterator[Finding]:
    """event descriptors, pipes and unconnected sockets (closed in the children), and asyncio's loops"""
    yield from scene.descriptors_by("R7")
    for loop in scene.objects.loops:
        state = "running" if loop.is_running() else "open"
        yield Finding(
            "R7",
            f"an asyncio event loop ({type(loop).__module__}.{type(loop).__qualname__}) is {state}",
            "a forked child would share its selector with the parent",
            f"use asyncio.run (which closes its loop) or loop.close() in setup, and asyncio.run in the tasks, {FRESH}",
        )


def locks(scene: Scene) -> Iterator[Finding]:
    """the import lock, and Python locks that were not held when the template started"""
    if _imp.lock_held():
        reason = "a forked child could never import"
        yield Finding("R8", "the import lock is held", reason, f"end the thread that imports, {FRESH}")
    held = scene.objects.locks
    if any(thread.is_python for thread in scene.alive):
        # Each thread that waits holds some, as it should; the threads themselves are judged by R1.
        if held:
            reason = "if another thread holds them, they stay locked in a forked child"
            yield Finding("R8", f"{len(held)} locks are held", reason, verdict=NOTE)
        return
    for lock in held:
        where = objects.whereabouts(lock)
        yield Finding(
            "R8",
            f"a lock is held{f' ({where})' if where else ''}",
            "nobody is left who could release it: a forked child that wants it waits for ever",
            f"release it before setup returns, {FRESH}",
        )


def numba_openmp(scene: Scene) -> Iterator[Finding]:
    """numba's OpenMP threading layer beside GNU OpenMP"""
    if "numba.np.ufunc.omppool" in sys.modules and threads.libraries(scene.maps, "libgomp"):
        reason = "it ends a forked child with SIGTERM (fork() from a process already using GNU OpenMP)"
        cure = f"set NUMBA_THREADING_LAYER=workqueue in the workload's env, {FRESH}"
        yield Finding("R9", "numba's OpenMP threading layer was used", reason, cure)


def mpi(scene: Scene) -> Iterator[Finding]:
    """MPI libraries"""
    for path in threads.libraries(scene.maps, "libmpi.so")[:1] + threads.libraries(scene.maps, "libmpich.so")[:1]:
        if _is_initialised(path, "MPI_Initialized") and not _is_initialised(path, "MPI_Finalized"):
            reason = "its connections and pinned memory belong to one process: a forked child that uses it corrupts it"
            cure = f"keep mpi4py.MPI out of preload and setup (mpi4py.rc.initialize = False), {FRESH}"
            yield Finding("R10", f"{path} is initialised", reason, cure)


class Rule:
    """`id`, the function that applies it, and when it speaks against a fork."""

    __slots__ = ("apply", "id", "unsafe_when")

    def __init__(self, id: str, apply: Callable[[Scene], Iterator[Finding]], unsafe_when: str) -> None:  # noqa: A002
        self.id = id
        self.apply = apply
        self.unsafe_when = unsafe_when

    @property
    def looks_at(self) -> str:
        return (self.apply.__doc__ or "").strip()


RULES = (
    Rule("R1", python_threads, "any but the main one is alive, unless allowed by name (`allow_threads`)"),
    Rule(
        "R2",
        hazardous_threads,
        "they belong to a runtime known to hang after a fork: OpenMP pools that were used and cannot be ended, polars, "
        "tokio, gRPC, torch, TBB, CUDA, Java",
    ),
    Rule(
        "R3",
        harmless_threads,
        "never: OpenBLAS ends its threads at a fork; arrow, numexpr and jemalloc make new ones per process",
    ),
    Rule("R4", unknown_threads, "the canary says so"),
    Rule("R5", gpus, "always"),
    Rule("R6", unsharable_descriptors, "always: shared with a child they corrupt or confuse, closed in it they fail"),
    Rule("R7", event_loops, "a loop is open or running; descriptors alone are only noted"),
    Rule("R8", locks, "one is held at the fork point and no living thread could release it"),
    Rule("R9", numba_openmp, "it was used: its own hook ends a forked child by SIGTERM"),
    Rule("R10", mpi, "`MPI_Init` was called and `MPI_Finalize` was not"),
)


def table() -> str:
    """The rules as a table in Markdown, as it stands in docs/guides/fork_safety.md."""
    rows = [f"| {rule.id} | {rule.looks_at} | {rule.unsafe_when} |" for rule in RULES]
    return "\n".join(["| rule | looks at | unsafe when |", "|---|---|---|", *rows])


def _grouped(alike: Iterable[threads.Thread]) -> Iterator[tuple[threads.Thread, str]]:
    """One of each sort, and how to name all of its sort."""
    sorts: dict[str, list[threads.Thread]] = {}
    for thread in alike:
        sorts.setdefault(str(thread), []).append(thread)
    for name, same in sorts.items():
        yield same[0], name if len(same) == 1 else f"{name} ({len(same)} of them)"


def _rule_of(thread: threads.Thread, allowed: list[str]) -> str:
    if _is_allowed(thread, allowed):
        return "R3"
    if thread.is_python:
        return "R1"
    if is_harmless(thread):
        return "R3"
    return "R4" if _hazard_of(thread) is None else "R2"


def is_harmless(thread: threads.Thread) -> bool:
    """Whether it is known to cope with a fork."""
    return not thread.is_python and (thread.owner.startswith(_HARMLESS) or thread.name.startswith(_HARMLESS))


def is_excused(thread: threads.Thread, allowed: list[str]) -> bool:
    """Whether it is known to be harmless, or allowed by name."""
    return is_harmless(thread) or _is_allowed(thread, allowed)


def _is_allowed(thread: threads.Thread, allowed: list[str]) -> bool:
    names = (thread.name, thread.python_name, thread.owner)
    return any(name and fnmatch.fnmatchcase(name, pattern) for name in names for pattern in allowed)


def _hazard_of(thread: threads.Thread) -> tuple[str, str, str] | None:
    for hazard in _HAZARDS:
        stem = hazard[0]
        if thread.owner.startswith((stem, f"_{stem}")) or thread.name.startswith(stem):
            return hazard
    return None


def _is_initialised(path: str, question: str) -> bool:
    """Ask a loaded MPI one of the two questions that may be asked at any time."""
    flag = ctypes.c_int()
    try:
        return bool(getattr(ctypes.CDLL(path), question)(ctypes.byref(flag)) == 0 and flag.value)
    except (OSError, AttributeError):
        return False
