"""Where a task stands while it waits for tasks of its own: its cores are given up, and back before it goes on.

Theory of operation. A wait *begins* when a thread is about to block, and *ends* when it has what it waited for. The
cores are given up while any thread of the task waits: which of the others compute nobody can tell, and cores kept for
them could be just those that the awaited task needs. So a thread that ends its wait while another still waits goes on
at once; the last one asks for the cores, and goes on when they are there, or when yet another begins to wait. Each
request has a number, as its answer may cross with a new wait.

`end` blocks and is called without any lock that the connection's thread may want, since it is that thread which hears
of the cores. `begin` never blocks. `concurrent.futures.wait` and `as_completed` wait on events of their own: `Waiters`
puts a patient one in place of each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Turnstile:
    """One task's. `say_began()` and `say_ended(n)` send; both from any thread, and do not block. `moved(cpus)` is
    called in the thread that goes on, when the task may go on elsewhere."""

    def __init__(
        self, say_began: Callable[[], None], say_ended: Callable[[int], None], moved: Callable[[tuple[int, ...]], None]
    ) -> None:
        self._say_began = say_began
        self._say_ended = say_ended
        self._moved = moved
        self._changed = threading.Condition(threading.Lock())
        self._waiting = 0
        self._asked = 0
        self._is_held = True
        self._is_closed = False
        self._cpus: tuple[int, ...] = ()

    def begin(self) -> None:
        """This thread is about to wait."""
        with self._changed:
            self._waiting += 1
            if self._waiting == 1 and not self._is_closed:
                self._is_held = False
                self._say_began()
                self._changed.notify_all()

    def end(self) -> None:
        """It has what it waited for: returns when it may go on."""
        with self._changed:
            self._waiting -= 1
            if self._may_go_on():
                return
            self._asked += 1
            self._say_ended(self._asked)
            self._changed.wait_for(self._may_go_on)
            cpus = self._cpus if self._is_held else ()
        if cpus:
            self._moved(cpus)

    def _may_go_on(self) -> bool:
        return self._is_held or self._waiting > 0 or self._is_closed

    def slot_back(self, n: int, cpus: tuple[int, ...]) -> None:
        """The agent's answer to the request of this number."""
        with self._changed:
            if n == self._asked and not self._waiting:
                self._is_held = True
                self._cpus = cpus
                self._changed.notify_all()

    def close(self) -> None:
        """There is nobody to ask any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class Patience:
    """One wait of one thread, as a context; it begins, at most once, where it turns out that there is to be waited.
    Without a turnstile it is nothing."""

    __slots__ = ("_has_begun", "_turnstile")

    def __init__(self, turnstile: Turnstile | None) -> None:
        self._turnstile = turnstile
        self._has_begun = False

    def __enter__(self) -> Patience:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._has_begun and self._turnstile is not None:
            self._has_begun = False
            self._turnstile.end()

    def begin(self) -> None:
        """The thread is about to block. Locks may be held."""
        if self._turnstile is not None and not self._has_begun:
            self._has_begun = True
            self._turnstile.begin()


class Waiters(list[Any]):
    """A future's waiters, as the standard library appends them: from then on they wait patiently."""

    def __init__(self, turnstile: Turnstile) -> None:
        super().__init__()
        self._turnstile = turnstile

    def append(self, waiter: Any) -> None:
        """As of a list."""
        if not isinstance(waiter.event, _PatientEvent):
            waiter.event = _PatientEvent(waiter.event, self._turnstile)
        super().append(waiter)


class _PatientEvent:
    """A `threading.Event` whose `wait` gives the task's cores up."""

    def __init__(self, event: threading.Event, turnstile: Turnstile) -> None:
        self._event = event
        self._turnstile = turnstile
        self.set = event.set
        self.clear = event.clear
        self.is_set = event.is_set

    def wait(self, timeout: float | None = None) -> bool:
        """As `threading.Event.wait`."""
        if self._event.is_set():
            return True
        with Patience(self._turnstile) as patience:
            patience.begin()
            return self._event.wait(timeout)
