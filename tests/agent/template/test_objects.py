"""Locks, loops and pipes that are alive in a process: here, in this one."""

from __future__ import annotations

import asyncio
import gc
import threading
from multiprocessing import Pipe

from herder_agent.template import objects


class Owner:
    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_only_what_is_held_or_open_and_not_in_the_baseline_is_found() -> None:
    baseline = objects.held_locks()
    own = Owner()
    held_by_us = threading.RLock()
    with held_by_us:
        before = objects.look(baseline)
        with own.lock:
            found = objects.look(baseline)
            assert [lock for lock in found.locks if lock is own.lock]
            assert not [lock for lock in found.locks if lock is held_by_us]
            assert "test_objects.Owner" in objects.whereabouts(own.lock)
            assert not [lock for lock in objects.look(objects.held_locks()).locks if lock is own.lock]
    assert not [lock for lock in before.locks if lock is own.lock]


def test_loops_and_pipes_count_while_they_are_open() -> None:
    loop = asyncio.new_event_loop()
    ends = Pipe()
    try:
        found = objects.look([])
        assert loop in found.loops
        assert sum(end in found.pipes for end in ends) == 2
    finally:
        loop.close()
        for end in ends:
            end.close()
    found = objects.look([])
    assert loop not in found.loops
    assert not any(end in found.pipes for end in ends)


def test_objects_that_are_garbage_are_not_found() -> None:
    gc.disable()
    try:
        own = Owner()
        own.lock.acquire()
        own.itself = own  # type: ignore[attr-defined]
        lock = id(own.lock)
        del own
        assert lock not in [id(each) for each in objects.look([]).locks]
    finally:
        gc.enable()
