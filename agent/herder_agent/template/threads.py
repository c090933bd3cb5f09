"""The threads of this process, each with the library that it belongs to.

Theory of operation. The kernel tells a thread's name and, in /proc/self/task/TID/syscall, its stack pointer, but not
who started it. Its stack does: the return addresses on it point into the code of the libraries that it runs, and the
one nearest the base of the stack, apart from the C library and the like, is the one whose function the thread was
started with. So the stack is read (/proc/self/mem) and scanned for addresses inside executable mappings. This is a
heuristic (stale words look like return addresses; 2 of 30 threads were given a neighbour's name), which is why an
unknown owner is not a verdict.
"""

from __future__ import annotations

import array
import os
import sys
import time

from . import system

#: A waiting thread's frames lie within this much of its stack pointer.
STACK_BYTES_MAX = 256 * 1024
#: A thread that runs is looked at again, this often and after this time.
SAMPLES_MAX = 10
SAMPLE_S = 0.01
#: Code through which every thread's stack leads.
_RUNTIME = ("libc.so", "libc-", "libpthread", "ld-linux", "libstdc++", "libgcc_s", "libm.so", "libm-")


class Thread:
    """A thread other than the main one. `owner` is the base name of its library ("" where it cannot be told)."""

    __slots__ = ("is_python", "name", "owner", "python_name", "tid")

    def __init__(self, tid: int, name: str, owner: str, python_name: str, is_python: bool) -> None:
        self.tid = tid
        self.name = name
        self.owner = owner
        self.python_name = python_name
        self.is_python = is_python

    def __str__(self) -> str:
        if self.is_python:
            return f"Python thread {self.python_name or self.name!r}"
        return f"thread {self.name!r} of {self.owner or 'an unknown library'}"


def others(maps: list[system.Mapping] | None = None) -> list[Thread]:
    """All threads but the main one. `maps`: this process's mappings, where they are known already."""
    own = os.getpid()
    tids = [tid for tid in system.thread_ids() if tid != own]
    if not tids:
        return []
    maps = system.mappings() if maps is None else maps
    python_names = _python_threads()
    found = []
    for tid in tids:
        try:
            with open(f"/proc/self/task/{tid}/comm", encoding="utf-8", errors="replace") as file:
                name = file.read().strip()
            owner = _owner(tid, maps)
        except OSError:
            # It has just ended, or this system does not show it; what cannot be seen is not known to be harmless.
            if not os.path.exists(f"/proc/self/task/{tid}"):
                continue
            name, owner = "?", ""
        is_python = tid in python_names or owner.startswith(("libpython", "python"))
        found.append(Thread(tid, name, owner, python_names.get(tid, ""), is_python))
    return found


def libraries(maps: list[system.Mapping], stem: str) -> list[str]:
    """Paths of the loaded libraries whose base name starts with `stem`."""
    return sorted({m.path for m in maps if m.path.rpartition("/")[2].startswith(stem)})


def _python_threads() -> dict[int, str]:
    """Kernel ids of the threads that `threading` knows, with their names."""
    threading = sys.modules.get("threading")
    if threading is None:
        return {}
    return {thread.native_id: thread.name for thread in threading.enumerate() if thread.native_id is not None}


def _owner(tid: int, maps: list[system.Mapping]) -> str:
    for _ in range(SAMPLES_MAX):
        with open(f"/proc/self/task/{tid}/syscall", encoding="ascii") as file:
            fields = file.read().split()
        if len(fields) >= 3:
            break
        time.sleep(SAMPLE_S)  # "running": it computes, or spins for a while before it waits
    else:
        return ""
    pointer = int(fields[-2], 16)
    stack = next((m for m in maps if m.start <= pointer < m.end), None)
    if stack is None:
        return ""
    code = sorted((m.start, m.end, m.path) for m in maps if "x" in m.permissions and m.path.startswith("/"))
    words = array.array("Q")
    start = pointer & ~7
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(start)
        content = memory.read(min(stack.end - start, STACK_BYTES_MAX))
    words.frombytes(content[: len(content) // 8 * 8])
    low, high = code[0][0], code[-1][1]
    for word in reversed(words):
        if low <= word < high:
            path = next((path for first, last, path in code if first <= word < last), "")
            name = path.rpartition("/")[2]
            if name and not name.startswith(_RUNTIME):
                return name
    return ""
