"""Waits that begin and end in any order, between starts, ends, cancellations and reconnections: accounts stay right.

The machine checks the invariants after each event; a failure names the seed, by which the same happens again.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from agent.core.test_step import JOB, KEY, ONE, SPEC, Machine, ident, order
from herder_agent.core import effects as fx
from herder_agent.core import events as ev
from herder_agent.core.state import Child, ChildPhase
from herder_shared.limits import GIB
from herder_shared.wire.messages import JobBrief, TaskOptions

STEPS = 150
CORES = 3


class Walk:
    """One random history of an agent with one workload."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.machine = Machine(cores=CORES)
        self.last = 0
        self.waits = 0
        self.session = 1
        self.resumed: list[tuple[object, int]] = []
        self.order()
        self.take(ev.TemplateReady(1, "fork", "start", "", "3.11/3.1", 900, 0.1, 1000))

    def take(self, event: ev.Event) -> None:
        for effect in self.machine.take(event, after_s=self.chance.choice((0.0, 0.001, 0.5))):
            match effect:
                case fx.ForkChildren():
                    for child in effect.children:
                        self.take(ev.ChildForked(child, 1000 + child))
                case fx.StopChild():
                    self.take(ev.ChildExited(effect.child, ev.Exit(0)))
                case fx.ResumeTask():
                    self.resumed.append((effect.attempt, effect.n))
                case fx.SignalChild() if effect.child in self.machine.state.children:
                    self.take(ev.ChildExited(effect.child, ev.Exit(15)))
                case fx.SweepLeftovers() if self.chance.random() < 0.7:
                    self.take(ev.LeftoversGone())
                case _:
                    continue

    def order(self) -> None:
        options = TaskOptions(
            cores=self.chance.choice((0.5, 1.0, 2.0, 3.0)), memory_bytes=self.chance.choice((0, GIB // 4))
        )
        self.last += 1
        # One job is enough: what is ordered now is told with its own brief.
        brief = JobBrief(JOB, "job", KEY, options)
        self.take(ev.AttemptsOrdered(self.session, (order(self.last),), (SPEC,), (brief,)))

    def busy(self) -> Child | None:
        found = [child for child in self.machine.state.children.values() if child.phase is ChildPhase.BUSY]
        return self.chance.choice(found) if found else None

    def start(self) -> None:
        if (child := self.busy()) is not None:
            self.take(ev.ChildStarted(child.id))

    def answer(self) -> None:
        if (child := self.busy()) is not None:
            self.take(ev.ChildAnswered(child.id, ONE))

    def exit(self) -> None:
        if (child := self.busy()) is not None:
            self.take(ev.ChildExited(child.id, ev.Exit(self.chance.choice((0, 9)))))

    def wait(self) -> None:
        self.take(ev.WaitBegan(ident(self.chance.randrange(1, self.last + 1))))

    def go_on(self) -> None:
        self.waits += 1
        self.take(ev.WaitEnded(ident(self.chance.randrange(1, self.last + 1)), self.waits))

    def cancel(self) -> None:
        self.take(ev.CancelOrdered((ident(self.chance.randrange(1, self.last + 1)),), 0.5))

    def gone(self) -> None:
        self.take(ev.LeftoversGone())

    def reconnect(self) -> None:
        self.take(ev.Disconnected(self.session))
        self.session += 1
        self.take(ev.Connected(self.session))

    def go(self) -> None:
        can: list[Callable[[], None]] = [
            *(self.order, self.start, self.answer, self.exit, self.wait, self.go_on) * 3,
            *(self.gone, self.cancel, self.reconnect),
        ]
        for _ in range(STEPS):
            self.chance.choice(can)()
        self.finish()

    def finish(self) -> None:
        """Who waits wants to go on, and everything ends."""
        state = self.machine.state
        for _ in range(20 * self.last):
            if not state.attempts:
                break
            for attempt in list(state.lent):
                if attempt not in state.returning:
                    self.waits += 1
                    self.take(ev.WaitEnded(attempt, self.waits))
            held = [child for child in state.children.values() if child.attempt and child.attempt.id not in state.lent]
            if held:
                child = self.chance.choice(held)
                self.take(ev.ChildAnswered(child.id, ONE))
                self.take(ev.ChildExited(child.id, ev.Exit(0)))
            self.take(ev.LeftoversGone())
            self.take(ev.Ticked())
        assert not state.attempts, [(str(each), one.phase) for each, one in state.attempts.items()]
        assert not state.lent
        assert not state.returning
        assert state.slots.used == 0
        assert len(state.slots.free) == CORES
        assert state.slots.memory_bytes == state.slots.total.memory_bytes
        seconds = sum(state.account.seconds.values())
        assert abs(seconds - CORES * (state.account.now_s - 100.0)) < 1e-6


@pytest.mark.parametrize("seed", range(15))
def test_whatever_waits_and_ends_all_cores_come_back(seed: int) -> None:
    Walk(seed).go()
