"""The watcher of memory: when it looks, and whose fault a kill of the kernel's was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from herder_agent.launch.child import Child
from herder_agent.runtime import memory
from herder_agent.runtime.cgroups import Group
from herder_agent.runtime.memory import MemoryWatch, TemplateWatch


class Clock:
    """A loop of which the time is set by the test."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, function: Callable[[], None]) -> Any:
        entry = (self.now_s + delay_s, function)
        self.due.append(entry)
        return SimpleNamespace(cancel=lambda: self.due.remove(entry) if entry in self.due else None)

    def run(self, for_s: float) -> None:
        until_s = self.now_s + for_s
        while self.due and min(self.due, key=lambda each: each[0])[0] <= until_s:
            entry = min(self.due, key=lambda each: each[0])
            self.due.remove(entry)
            self.now_s = entry[0]
            entry[1]()
        self.now_s = until_s


class Bench:
    """A watch over children that are numbers, with memory and kills set by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.kills = 7
        self.looks: list[tuple[float, int, int, int]] = []
        monkeypatch.setattr(memory, "oom_kills", lambda: self.kills)
        monkeypatch.setattr(memory, "tree_of", lambda pid: (1000 * pid, pid))
        loop = cast("asyncio.AbstractEventLoop", self.clock)
        self.watch = MemoryWatch(loop, lambda *seen: self.looks.append((self.clock.now_s, *seen)))

    def add(self, number: int, *, is_limited: bool = False, group: Group | None = None) -> None:
        child = Child(number, number, "fork", 1)
        child.baseline_bytes = 500
        self.watch.add(child, is_limited=is_limited, group=group)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def test_kill_while_a_task_runs_is_held_for_its_end_and_an_earlier_one_is_not(bench: Bench) -> None:
    bench.kills += 1  # While nothing ran here.
    bench.add(1)
    assert not bench.watch.oom_since(1)
    bench.clock.run(1.0)
    bench.kills += 1
    bench.clock.run(1.0)
    bench.add(2)
    bench.clock.run(1.0)
    assert bench.watch.oom_since(1)
    assert not bench.watch.oom_since(2)
    assert not bench.watch.oom_since(3)


def test_kill_for_an_attempts_own_limit_is_nobody_elses(bench: Bench) -> None:
    bench.add(1)
    bench.kills += 2
    bench.watch.expect_kills(2)
    assert not bench.watch.oom_since(1)
    bench.kills += 1
    assert bench.watch.oom_since(1)


def test_limited_children_are_looked_at_sooner_and_what_they_had_is_taken_off(bench: Bench) -> None:
    bench.add(1)
    bench.add(2, is_limited=True)
    bench.clock.run(0.26)
    assert len([look for look in bench.looks if look[1] == 2]) == 5
    assert bench.looks[-1][1:] == (2, 1500, 2)
    assert next(look[1:] for look in bench.looks if look[1] == 1) == (1, 500, 1)


@pytest.mark.parametrize(
    ("holds_memory", "holds_pids", "has_peak", "seen"),
    [
        (True, True, True, (4, 0, 0)),
        (True, False, True, (4, 0, 4)),
        (False, True, True, (4, 3500, 0)),
        (True, True, False, (4, 99, 0)),
    ],
)
def test_what_a_group_sees_to_is_left_to_it(
    bench: Bench, holds_memory: bool, holds_pids: bool, has_peak: bool, seen: tuple[int, int, int]
) -> None:
    group = SimpleNamespace(holds_memory=holds_memory, holds_pids=holds_pids, has_peak=has_peak, usage_bytes=lambda: 99)
    bench.add(4, group=cast("Group", group))
    bench.clock.run(0.3)
    assert [look[1:] for look in bench.looks] == [seen]


def test_template_is_looked_at_until_it_has_too_much_or_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    sizes = {1: 10, 2: 10, 3: 10}
    monkeypatch.setattr(memory, "own_bytes", lambda pid: sizes[pid])
    watch = TemplateWatch(cast("asyncio.AbstractEventLoop", clock))
    said: list[str] = []
    building = {1}
    for pid in sizes:
        watch.add(pid, 100, lambda pid=pid: pid in building, said.append, pid == 3)  # type: ignore[misc]
    clock.run(5)
    assert (said, len(clock.due)) == ([], 2)  # The third runs tasks by now.
    sizes[1] = sizes[2] = sizes[3] = 101
    clock.run(5)
    assert sorted(said) == [
        f"the workload's process used 101 bytes of memory {when} it was set up, its limit is 100 (memory=)"
        for when in ("after", "while")
    ]
    assert not clock.due
