"""Looks at children that run for longer, and tells of those that cannot go on. core/watch.py decides; this reads /proc.

A task that ends within the first tenth of a second costs nothing here. A look is one read (some 20 µs); a thorough one
reads a file or two a thread, but only until the first thread that does not wait for a lock. Looks come later and later
while a child goes on, and what they cost is measured and kept below `_SHARE` of a core.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from herder_agent.core.events import ChildHung, Event, OracleDenied, TemplateSeen
from herder_agent.core.watch import FIRST_LOOK_S, Sight, Watch
from herder_agent.launch.child import Child
from herder_agent.runtime.reap import anon_bytes, descendants, shared_bytes
from herder_agent.template.canary import is_deadlocked

_SHARE = 0.01


@dataclass(slots=True)
class _Watched:
    child: Child
    watch: Watch
    due_s: float
    is_thorough: bool = False


class Watchdog:
    """Calls `tell` with `ChildHung`, and once with `OracleDenied` where the kernel does not show threads' calls.
    `is_busy(number)`: whether the child still runs a task."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, is_busy: Callable[[int], bool], tell: Callable[[Event], None]
    ) -> None:
        self._loop = loop
        self._is_busy = is_busy
        self._tell = tell
        self._watched: dict[int, _Watched] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0
        #: No look before this time.
        self._rest_until_s = 0.0
        #: Whether the kernel lets us see; None until it was tried.
        self._can_see: bool | None = None

    def add(self, child: Child) -> None:
        """It has run its task for a little while."""
        if child.number in self._watched:
            return
        now_s = self._loop.time()
        self._watched[child.number] = _Watched(child, Watch(now_s), now_s + FIRST_LOOK_S)
        self._set_timer(now_s)

    def close(self) -> None:
        """Stop."""
        self._watched.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self, now_s: float) -> None:
        if not self._watched:
            return
        due_s = max(min(each.due_s for each in self._watched.values()), now_s, self._rest_until_s)
        if self._timer is not None:
            if self._timer_s <= due_s:
                return
            self._timer.cancel()
        self._timer_s = due_s
        self._timer = self._loop.call_at(due_s, self._look_at_all)

    def _look_at_all(self) -> None:
        self._timer = None
        now_s, before_s = self._loop.time(), time.thread_time()
        for number, each in list(self._watched.items()):
            if not self._is_busy(number):
                del self._watched[number]
            elif each.due_s <= now_s + 1e-3:
                self._look(each, now_s)
        self._rest_until_s = now_s + (time.thread_time() - before_s) / _SHARE
        self._set_timer(now_s)

    def _look(self, each: _Watched, now_s: float) -> None:
        number, pid = each.child.number, each.child.pid
        if each.is_thorough and self._can_see is None:
            self._try_to_see(pid)
        sight = look(pid, is_thorough=each.is_thorough, asks_alone=each.watch.is_old(now_s))
        if sight is None:
            del self._watched[number]
            return
        following = each.watch.take(sight, now_s)
        if following.is_thorough and not following.wait_s:
            each.is_thorough = True
            self._look(each, now_s)
            return
        each.is_thorough = following.is_thorough
        each.due_s = now_s + following.wait_s
        if following.hung:
            self._tell(ChildHung(number, following.hung))

    def _try_to_see(self, pid: int) -> None:
        try:
            with open(f"/proc/{pid}/syscall", "rb") as file:
                file.read()
        except ProcessLookupError:
            return
        except OSError as error:
            if not os.path.exists(f"/proc/{pid}"):
                return
            self._can_see = False
            self._tell(OracleDenied(f"/proc/PID/syscall is not readable here ({error.strerror})"))
        else:
            self._can_see = True


def look(pid: int, *, is_thorough: bool, asks_alone: bool = False) -> Sight | None:
    """What the process does now; None when it is gone. `asks_alone`: also whether it has no processes of its own."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # After the name, which may hold anything: proc_pid_stat(5), fields 3 (state), 14 and 15 (CPU time).
            fields = file.read().rpartition(b")")[2].split(None, 14)
        ticks, is_asleep = int(fields[11]) + int(fields[12]), fields[0] == b"S"
        if not is_thorough:
            return Sight(ticks, is_asleep)
        waits = _switches(pid) if is_asleep and is_deadlocked(pid) else None
        return Sight(ticks, is_asleep, waits, is_alone=asks_alone and not descendants(pid))
    except (OSError, IndexError, StopIteration):
        return None


def _switches(pid: int) -> tuple[tuple[int, int], ...]:
    """How often each thread has been put aside by the scheduler: it stays the same while the thread does not run."""
    found = []
    for thread in sorted(map(int, os.listdir(f"/proc/{pid}/task"))):
        with open(f"/proc/{pid}/task/{thread}/status", "rb") as file:
            counts = [int(line.split()[1]) for line in file if b"ctxt_switches" in line]
        found.append((thread, sum(counts)))
    return tuple(found)


def see_template(number: int, pid: int) -> TemplateSeen | None:
    """A template's threads and memory; None when it is gone."""
    try:
        threads = len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return None
    return TemplateSeen(number, threads, shared_bytes(pid), anon_bytes(pid))
