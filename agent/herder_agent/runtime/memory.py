"""Samples the memory of children that run tasks, while any does.

The kernel's own peak (`ru_maxrss`) of a forked child counts its template's pages, so it cannot be used. Tasks that
are over sooner than the first sample are measured once, when they answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from herder_agent.launch.child import Child
from herder_agent.runtime.reap import anon_bytes_of_tree

#: Between samples; with a memory limit shorter, as what is allocated meanwhile is not stopped.
_PERIOD_S = 0.25
_LIMITED_PERIOD_S = 0.05
#: A sample costs about 50 µs a child: no more than 2 % of a core for many.
_COST_S = 50e-6
_SHARE = 0.02


@dataclass(slots=True)
class _Watched:
    child: Child
    since_s: float
    is_limited: bool


class MemoryWatch:
    """Calls `seen(child number, bytes)` with Σ RssAnon beyond the child's baseline."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seen: Callable[[int, int], None]) -> None:
        self._loop = loop
        self._seen = seen
        self._watched: dict[int, _Watched] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, child: Child, *, is_limited: bool) -> None:
        """It runs a task now."""
        self._watched[child.number] = _Watched(child, self._loop.time(), is_limited)
        if self._timer is None:
            self._timer = self._loop.call_later(self._period_s(), self._sample)

    def remove(self, number: int) -> None:
        """It runs none any more."""
        self._watched.pop(number, None)

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

    def _sample(self) -> None:
        self._timer = None
        if not self._watched:
            return
        before_s = self._loop.time() - _PERIOD_S / 2
        for each in list(self._watched.values()):
            if each.is_limited or each.since_s <= before_s:
                child = each.child
                # Output of tasks that last is read as it comes.
                child.attach_output()
                self._seen(child.number, max(0, anon_bytes_of_tree(child.pid) - child.baseline_bytes))
        self._timer = self._loop.call_later(self._period_s(), self._sample)
