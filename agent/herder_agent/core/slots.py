"""Which cores, GPUs, memory and named resources of the node are held, and which are free.

Core indices count from 0 over the slots that the agent offers; lower ones are taken first, so that, with the node's
CPUs listed by NUMA node, an attempt's cores lie together. A request below one core shares a core with others of its
kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

#: Shares of a core are compared with this tolerance: ten requests of 0.1 fill a core.
_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Request:
    """What an attempt asks for. `cores` may be a fraction, or a whole number plus one."""

    cores: float = 1.0
    memory_bytes: int = 0
    gpus: int = 0
    resources: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Slot:
    """What an attempt holds. `shared` is the index of the core of which it holds `share`, or -1."""

    request: Request
    whole: tuple[int, ...]
    shared: int
    share: float
    gpus: tuple[int, ...]

    @property
    def indices(self) -> tuple[int, ...]:
        """All core indices, whole and shared."""
        return self.whole if self.shared < 0 else (*self.whole, self.shared)


@dataclass(slots=True)
class Slots:
    """Invariant: each core is in `free`, or held whole by one slot, or in `shares` with what is left of it."""

    cores: int
    memory_bytes: int
    gpus: list[int]
    resources: dict[str, float]
    total: Request
    used: float = 0.0
    free: list[int] = field(default_factory=list)
    #: Shared cores: index -> what is left.
    shares: dict[int, float] = field(default_factory=dict)

    @staticmethod
    def of(cores: int, memory_bytes: int, gpus: int = 0, resources: dict[str, float] | None = None) -> Slots:
        free = list(range(cores))
        heapify(free)
        named = dict(resources or {})
        total = Request(cores, memory_bytes, gpus, tuple(named.items()))
        return Slots(cores, memory_bytes, list(range(gpus)), named, total, free=free)

    @property
    def is_full(self) -> bool:
        """No part of any core is free."""
        return not self.free and not self.shares

    def could_ever(self, request: Request) -> bool:
        """Whether the node could hold `request` if it were empty."""
        named = dict(self.total.resources)
        return (
            request.cores <= self.total.cores + _EPSILON
            and request.memory_bytes <= self.total.memory_bytes
            and request.gpus <= self.total.gpus
            and all(amount <= named.get(name, 0.0) + _EPSILON for name, amount in request.resources)
        )

    def take(self, request: Request) -> Slot | None:
        """Hold what `request` asks for, or None if not all of it is free."""
        whole_count = int(request.cores + _EPSILON)
        share = request.cores - whole_count
        if share < _EPSILON:
            share = 0.0
        shared = self._shared_core(share) if share else -1
        needed = whole_count + (1 if share and shared < 0 else 0)
        if needed > len(self.free) or not self._fits_besides_cores(request):
            return None
        whole = tuple(heappop(self.free) for _ in range(whole_count))
        if share and shared < 0:
            shared = heappop(self.free)
            self.shares[shared] = 1.0
        if share:
            self.shares[shared] -= share
        self.memory_bytes -= request.memory_bytes
        for name, amount in request.resources:
            self.resources[name] -= amount
        gpus = tuple(self.gpus.pop(0) for _ in range(request.gpus)) if request.gpus else ()
        self.used += request.cores
        return Slot(request, whole, shared, share, gpus)

    def give_back(self, slot: Slot) -> None:
        """Free what `slot` holds; it must not be used again."""
        for index in slot.whole:
            heappush(self.free, index)
        if slot.shared >= 0:
            left = self.shares[slot.shared] + slot.share
            if left >= 1.0 - _EPSILON:
                del self.shares[slot.shared]
                heappush(self.free, slot.shared)
            else:
                self.shares[slot.shared] = left
        request = slot.request
        self.memory_bytes += request.memory_bytes
        for name, amount in request.resources:
            self.resources[name] += amount
        if slot.gpus:
            self.gpus = sorted((*self.gpus, *slot.gpus))
        self.used -= request.cores
        if len(self.free) == self.cores:
            self.used = 0.0

    def _shared_core(self, share: float) -> int:
        """The fullest shared core that has room, or -1."""
        fitting = [(left, index) for index, left in self.shares.items() if left >= share - _EPSILON]
        return min(fitting)[1] if fitting else -1

    def _fits_besides_cores(self, request: Request) -> bool:
        return (
            request.memory_bytes <= self.memory_bytes
            and request.gpus <= len(self.gpus)
            and all(amount <= self.resources.get(name, 0.0) + _EPSILON for name, amount in request.resources)
        )
