"""How many fresh interpreters to keep warm: as many as will be asked for while a new one starts."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import ceil, sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from herder_agent.core.state import Pool, State

#: Arrivals that the rate is taken from, and the number of starts for their duration.
_ARRIVALS = 32
_STARTS = 8
#: Nobody arrived for so many mean gaps: the demand has ended.
_GAPS_MAX = 8.0
#: Warm interpreters wait for each core at most: they cost memory, and starting them costs the cores themselves.
PER_CORE_MAX = 4
#: ... and of the node's memory they take, all together, at most this part.
MEMORY_SHARE = 0.25


@dataclass(slots=True)
class Demand:
    """What a pool has seen of arrivals, and of what a child costs."""

    arrivals_s: deque[float] = field(default_factory=lambda: deque(maxlen=_ARRIVALS))
    warm_s: deque[float] = field(default_factory=lambda: deque(maxlen=_STARTS))
    anon_bytes: int = 0

    def note_arrival(self, now_s: float) -> None:
        """An attempt wants a child."""
        self.arrivals_s.append(now_s)

    def note_warm(self, seconds: float, anon_bytes: int) -> None:
        """A child became warm in so many seconds, and has so much memory of its own."""
        self.warm_s.append(seconds)
        self.anon_bytes = max(self.anon_bytes, anon_bytes)

    def rate(self, now_s: float) -> float:
        """Arrivals per second; 0 when they have ceased."""
        count = len(self.arrivals_s) - 1
        if count < 1:
            return 0.0
        span_s = self.arrivals_s[-1] - self.arrivals_s[0]
        silence_s = now_s - self.arrivals_s[-1]
        if silence_s > _GAPS_MAX * span_s / count:
            return 0.0
        return count / max(span_s, silence_s, 1e-3)


def reserve(state: State, pool: Pool, now_s: float) -> int:
    """Interpreters to have warm beyond those that are asked for now.

    While one starts, rate × start time more are asked for, give or take the root of that (arrivals are as random as
    calls of a telephone). At most so many as cores and memory bear.
    """
    known = pool.demand
    if not known.warm_s:
        return 1
    expected = known.rate(now_s) * sorted(known.warm_s)[len(known.warm_s) // 2]
    wanted = ceil(expected + sqrt(expected)) if expected else 1
    cores = state.slots.total.cores
    most = ceil(PER_CORE_MAX * cores)
    if known.anon_bytes:
        most = min(most, int(MEMORY_SHARE * state.slots.total.memory_bytes / known.anon_bytes))
    return max(1, min(wanted, most))
