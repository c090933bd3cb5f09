"""Which cores, GPUs, memory and named resources of the node are held, and which are free.

Core indices count from 0 over the slots that the agent offers. One index alone is the lowest that is free: the node's
CPUs are listed by NUMA node, and within it one of each core before their siblings, so that two tasks share a core last.
Several lie on one NUMA node where that can be, on cores of which no sibling is held by others, siblings together. A
request below one core shares a core with others of its kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

#: Shares of a core are compared with this tolerance: ten requests of 0.1 fill a core.
_EPSILON = 1e-6


class Place(NamedTuple):
    """Where a CPU is: its NUMA node, and its core, which SMT siblings share."""

    numa: int
    core: int


class Request(Struct, frozen=True):
    """What an attempt asks for. `cores` may be a fraction, or a whole number plus one."""

    cores: float = 1.0
    memory_bytes: int = 0
    gpus: int = 0
    resources: tuple[tuple[str, float], ...] = ()


class Slot(Struct, frozen=True):
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
    #: Of each index; empty where all are alike.
    places: tuple[Place, ...] = ()

    @staticmethod
    def of(
        cores: int,
        memory_bytes: int,
        gpus: int = 0,
        resources: dict[str, float] | None = None,
        places: tuple[Place, ...] = (),
    ) -> Slots:
        """All of it free. `places` of the node's CPUs: index i is on CPU i, and on CPU i - n where there are but n."""
        differ = len({place.numa for place in places}) > 1 or len({place.core for place in places}) < len(places)
        spread = tuple(places[index % len(places)] for index in range(cores)) if differ else ()
        free = list(range(cores))
        heapify(free)
        named = dict(resources or {})
        total = Request(cores, memory_bytes, gpus, tuple(named.items()))
        return Slots(cores, memory_bytes, list(range(gpus)), named, total, free=free, places=spread)

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
        whole = self._whole_cores(whole_count)
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

    def lend(self, slot: Slot) -> Slot:
        """Free the cores of `slot`, which must not be used again. What is left of it, which holds none."""
        self.give_back(Slot(Request(slot.request.cores), slot.whole, slot.shared, slot.share, ()))
        return Slot(replace(slot.request, cores=0.0), (), -1, 0.0, slot.gpus)

    def retake(self, rest: Slot, request: Request) -> Slot | None:
        """Hold the cores that `request` asks for besides what `rest`, left by `lend`, holds; None if they are not
        free."""
        cores = self.take(Request(request.cores))
        return Slot(request, cores.whole, cores.shared, cores.share, rest.gpus) if cores is not None else None

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

    def _whole_cores(self, count: int) -> tuple[int, ...]:
        if count <= 1 or not self.places:
            return tuple(heappop(self.free) for _ in range(count))
        chosen = choose(self.free, count, self.places)
        self.free = [index for index in self.free if index not in chosen]
        heapify(self.free)
        return chosen

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


def choose(free: Sequence[int], count: int, places: Sequence[Place]) -> tuple[int, ...]:
    """`count` of the free indices, as near to each other as can be.

    On the NUMA node with the fewest free ones that has enough; on several, those with most first. There, cores that are
    free as a whole before those which somebody else is on, except that what does not fill a core goes where one is used
    already.
    """
    by_node: dict[int, list[int]] = {}
    for index in sorted(free):
        by_node.setdefault(places[index].numa, []).append(index)
    enough = [members for members in by_node.values() if len(members) >= count]
    nodes = [min(enough, key=len)] if enough else sorted(by_node.values(), key=len, reverse=True)
    siblings = Counter(place.core for place in places)
    chosen: list[int] = []
    for members in nodes:
        chosen += _compact(members, count - len(chosen), places, siblings)
    return tuple(sorted(chosen))


def _compact(members: list[int], count: int, places: Sequence[Place], siblings: Counter[int]) -> list[int]:
    cores: dict[int, list[int]] = {}
    for index in members:
        cores.setdefault(places[index].core, []).append(index)
    idle = [held for core, held in cores.items() if len(held) == siblings[core]]
    begun = [held for core, held in cores.items() if len(held) < siblings[core]]
    chosen: list[int] = []
    for held in idle:
        if len(held) <= count - len(chosen):
            chosen += held
    rest = [index for held in (*begun, *idle) for index in held if index not in chosen]
    return chosen + rest[: count - len(chosen)]
