"""Samples the memory of children that run tasks, while any does, and how many processes they are.

The kernel's own peak (`ru_maxrss`) of a forked child counts its template's pages, so it cannot be used. Tasks that
are over sooner than the first sample are measured once, when they answer. What a control group limits and measures is
left to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from herder_agent.launch.child import Child
from herder_agent.runtime.cgroups import Group
from herder_agent.runtime.reap import oom_kills, own_bytes, tree_of

#: Between samples; with a memory limit shorter, as what is allocated meanwhile is not stopped.
_PERIOD_S = 0.25
_LIMITED_PERIOD_S = 0.05
#: A sample costs about 50 µs a child: no more than 2 % of a core for many.
_COST_S = 50e-6
_SHARE = 0.02
#: Of a template with a limit: while it builds, and after.
_BUILD_PERIOD_S = 0.02
_SERVE_PERIOD_S = 1.0


@dataclass(slots=True)
class _Watched:
    child: Child
    since_s: float
    is_limited: bool
    group: Group | None


class MemoryWatch:
    """Calls `seen(child number, bytes, processes and threads)` with Σ RssAnon beyond the child's baseline; 0 for what a
    control group sees to."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seen: Callable[[int, int, int], None]) -> None:
        self._loop = loop
        self._seen = seen
        self._watched: dict[int, _Watched] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = 0.0
        self._kills = oom_kills()
        self._killed_s = -1.0

    def add(self, child: Child, *, is_limited: bool, group: Group | None = None) -> None:
        """It runs a task now."""
        limited_here = is_limited and (group is None or not group.holds_memory)
        self._watched[child.number] = _Watched(child, self._loop.time(), limited_here, group)
        if self._timer is None:
            # What was killed while nothing ran here is not ours.
            self._kills = oom_kills()
            self._look_in(self._period_s())
        elif limited_here and (wait_s := self._period_s()) < self._due_s - self._loop.time():
            self._timer.cancel()
            self._look_in(wait_s)

    def remove(self, number: int) -> None:
        """It runs none any more."""
        self._watched.pop(number, None)

    def is_watched(self, number: int) -> bool:
        """It runs a task."""
        return number in self._watched

    def oom_since(self, number: int) -> bool:
        """Whether the kernel's out-of-memory killer was seen to act, anywhere, since this child's task began."""
        watched = self._watched.get(number)
        self._look_for_kills()
        return watched is not None and self._killed_s >= watched.since_s

    def expect_kills(self, count: int) -> None:
        """So many of the kernel's kills were for an attempt's own limit."""
        self._kills += count

    def close(self) -> None:
        """Stop."""
        self._watched.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _period_s(self) -> float:
        limited = any(each.is_limited for each in self._watched.values())
        wanted_s = _LIMITED_PERIOD_S if limited else _PERIOD_S
        return max(wanted_s, len(self._watched) * _COST_S / _SHARE)

    def _look_for_kills(self) -> None:
        kills = oom_kills()
        if kills > self._kills:
            self._kills = kills
            self._killed_s = self._loop.time()

    def _sample(self) -> None:
        self._timer = None
        if not self._watched:
            return
        self._look_for_kills()
        before_s = self._loop.time() - _PERIOD_S / 2
        for each in list(self._watched.values()):
            if each.is_limited or each.since_s <= before_s:
                # Output of tasks that last is read as it comes.
                each.child.attach_output()
                self._look_at(each)
        self._look_in(self._period_s())

    def _look_in(self, wait_s: float) -> None:
        self._due_s = self._loop.time() + wait_s
        self._timer = self._loop.call_later(wait_s, self._sample)

    def _look_at(self, each: _Watched) -> None:
        child, group = each.child, each.group
        counts_here = group is None or not group.holds_pids
        if group is not None and group.holds_memory:
            used = 0 if group.has_peak else group.usage_bytes()
            tasks = tree_of(child.pid)[1] if counts_here else 0
        else:
            anonymous, tasks = tree_of(child.pid)
            used = max(0, anonymous - child.baseline_bytes)
        self._seen(child.number, used, tasks if counts_here else 0)


class TemplateWatch:
    """Holds templates, and fresh interpreters which preload, to their workload's own limit.

    By sampling: a control group would charge them what their children do until these have left it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timers: dict[int, asyncio.TimerHandle] = {}

    def add(
        self,
        pid: int,
        limit_bytes: int,
        is_building: Callable[[], bool],
        over: Callable[[str], None],
        until_built: bool = False,
    ) -> None:
        """Look at it until it has gone, or `remove`; one that runs tasks itself `until_built`. `over(message)` is
        called once, when it has more than it may."""

        def look() -> None:
            self._timers.pop(pid, None)
            builds = is_building()
            if until_built and not builds:
                return
            used = own_bytes(pid)
            if used > limit_bytes:
                when = "while it was set up" if builds else "after it was set up"
                over(f"the workload's process used {used} bytes of memory {when}, its limit is {limit_bytes} (memory=)")
            elif used:
                self._timers[pid] = self._loop.call_later(_BUILD_PERIOD_S if builds else _SERVE_PERIOD_S, look)

        self._timers[pid] = self._loop.call_later(_BUILD_PERIOD_S, look)

    def remove(self, pid: int) -> None:
        """It is gone, or is none any more."""
        timer = self._timers.pop(pid, None)
        if timer is not None:
            timer.cancel()

    def close(self) -> None:
        """Stop."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
