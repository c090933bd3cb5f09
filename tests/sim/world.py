"""Virtual time, and connections that break."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable


class World:
    """A clock and what is to happen, in order of time and then of asking."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_s = 1_000.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, due_s: float, what: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._due, (max(due_s, self.now_s), self._count, what))

    def after(self, delay_s: float, what: Callable[[], None]) -> None:
        self.at(self.now_s + delay_s, what)

    def run(self, until_s: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Let things happen until then, or until `done()`. Returns whether it was done."""
        while self._due and self._due[0][0] <= until_s:
            self.now_s, _, what = heapq.heappop(self._due)
            what()
            if done():
                return True
        self.now_s = until_s
        return done()

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability


class Wire:
    """One connection: in order both ways, each message with its own delay, until it breaks.

    When it breaks, what is under way is lost, or arrives late though newer connections exist: `late` decides, and the
    receivers are told from which connection a thing came.
    """

    def __init__(self, world: World, delay_s_max: float) -> None:
        self.world = world
        self.delay_s_max = delay_s_max
        self.broken = False
        #: Nothing passes any more, and nobody has been told.
        self.silent = False
        self.late = False
        self._free_s = [0.0, 0.0]

    def send(self, direction: int, deliver: Callable[[], None]) -> None:
        if self.broken or self.silent:
            return
        due_s = self.world.now_s + self.world.random.random() * self.delay_s_max
        self._free_s[direction] = due_s = max(due_s, self._free_s[direction] + 1e-6)
        self.world.at(due_s, lambda: self._arrive(deliver))

    def _arrive(self, deliver: Callable[[], None]) -> None:
        if (not self.broken or self.late) and not self.silent:
            deliver()

    def cut(self, closed: list[Callable[[], None]]) -> None:
        """Break it; each end learns of that in its own time."""
        if self.broken:
            return
        self.broken = True
        self.late = self.world.chance(0.3)
        for tell in closed:
            self.world.after(self.world.random.random() * 0.2, tell)
