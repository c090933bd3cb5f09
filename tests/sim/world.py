"""Virtual time, and programs that live in it.

A `Program` is the life of one process: its event loop, its clock (whose zero is its own, as on another machine), and
whether it is stopped or dead. The shipped shells run on that loop as they do on asyncio's, for all that they need of it
is callbacks, timers, futures and a thread for the disk.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable
from contextvars import Context
from typing import Any, TypeVar

_T = TypeVar("_T")
_set_running_loop = asyncio._set_running_loop


class World:
    """A clock and what is to happen, in order of time and then of asking."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.now_s = 1_000.0
        self._due: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, due_s: float, what: Callable[..., object], *args: Any) -> None:
        self._count += 1
        heapq.heappush(self._due, (due_s if due_s > self.now_s else self.now_s, self._count, what, args))

    def after(self, delay_s: float, what: Callable[..., object], *args: Any) -> None:
        self.at(self.now_s + delay_s, what, *args)

    def run(self, until_s: float, done: Callable[[], bool] | None = None) -> bool:
        """Let things happen until then, or until `done()`. Returns whether it was done."""
        due, pop = self._due, heapq.heappop
        count = 0
        while due and due[0][0] <= until_s:
            self.now_s, _, what, args = pop(due)
            what(*args)
            count += 1
            if done is not None and not count % 8 and done():
                return True
        self.now_s = until_s
        return done is not None and done()

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability


class Due(asyncio.TimerHandle):
    """A callback that a loop will run, unless it is cancelled."""

    __slots__ = ("args", "is_cancelled", "what")

    def __init__(self, what: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.what = what
        self.args = args
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def cancelled(self) -> bool:
        return self.is_cancelled


class Program(asyncio.AbstractEventLoop):
    """One life of one program, and its event loop."""

    def __init__(self, world: World, name: str, disk_s: Callable[[], float] = lambda: 0.0) -> None:
        self.world = world
        self.name = name
        self.is_dead = False
        self.zero_s = world.random.random() * 1e5
        self._disk_s = disk_s
        self._stopped_until_s = 0.0
        #: What came due while it was stopped.
        self._missed: list[Due] = []

    def kill(self) -> None:
        """SIGKILL: nothing of it happens any more."""
        self.is_dead = True
        self._missed.clear()

    def halt(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after a while."""
        self._stopped_until_s = max(self._stopped_until_s, self.world.now_s + seconds)
        self.world.at(self._stopped_until_s, self._resume)

    @property
    def is_stopped(self) -> bool:
        return self.world.now_s < self._stopped_until_s

    def _resume(self) -> None:
        if not self.is_stopped and not self.is_dead:
            missed, self._missed = self._missed, []
            for due in missed:
                self.world.at(0.0, self._run, due)

    def enter(self, what: Callable[..., _T], *args: Any) -> _T:
        """Call it as this loop would."""
        _set_running_loop(self)
        try:
            return what(*args)
        finally:
            _set_running_loop(None)

    def _run(self, due: Due) -> None:
        if self.is_dead or due.is_cancelled:
            return
        if self.world.now_s < self._stopped_until_s:
            self._missed.append(due)
            return
        _set_running_loop(self)
        try:
            due.what(*due.args)
        finally:
            _set_running_loop(None)

    # --- what asyncio's loops have -----------------------------------------------------------------------------------

    def time(self) -> float:
        return self.world.now_s + self.zero_s

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Due:  # type: ignore[override]
        due = Due(callback, args)
        self.world.at(0.0, self._run, due)
        return due

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> Due:
        due = Due(callback, args)
        self.world.at(self.world.now_s + delay, self._run, due)
        return due

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> Due:
        due = Due(callback, args)
        self.world.at(when - self.zero_s + 1e-9, self._run, due)  # never before, whatever the rounding
        return due

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def run_in_executor(self, executor: Any, func: Callable[..., _T], *args: Any) -> asyncio.Future[_T]:  # type: ignore[override]
        """A thread that works on the disk: what it does is done when it answers."""
        future: asyncio.Future[_T] = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001  it belongs to who waits
                future.set_exception(error)
            else:
                future.set_result(result)

        self.call_later(self._disk_s(), work)
        return future

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if "never retrieved" not in context["message"]:  # by a program that was killed
            raise AssertionError(f"{self.name}: {context}")

    async def create_server(self, *_args: Any, **_kind: Any) -> Any:
        """Who listens is known to the network."""
        return _Listener()


def new_program(world: World, name: str, disk_s: Callable[[], float] = lambda: 0.0) -> Program:
    """A new life. What of an event loop no program of ours uses, this one does not have."""
    return Program(world, name, disk_s)  # type: ignore[abstract]


class _Listener:
    """What `Acceptor` wants of a listening socket."""

    @property
    def sockets(self) -> tuple[_Listener, ...]:
        return (self,)

    def getsockname(self) -> tuple[str, int]:
        return "", 0
