"""Readiness of many short-lived descriptors by one epoll of our own, of which the event loop watches but one.

A loop's `add_reader` is made for descriptors that live long: with uvloop each costs a handle, two probing `epoll_ctl`
calls and a mode change, and as much again at its end: 9 system calls for a child's socket, which lives for one task.
Here it is one call to add and one to remove. Removing is explicit, as closing alone does not end a registration while
a process forked meanwhile still holds a copy of the descriptor.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable

#: Descriptors served in one turn, so that no crowd of children holds up the rest of the loop.
_EVENTS_MAX = 64


class Poller:
    """Calls back when a descriptor can be read, or its other end is closed. Owns its epoll, not the descriptors."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], object]] = {}
        loop.add_reader(self._epoll.fileno(), self._ready)

    def add(self, fd: int, callback: Callable[[], object]) -> None:
        """Call `callback` in the loop whenever `fd` is readable, until `remove`."""
        self._epoll.register(fd, select.EPOLLIN)
        self._callbacks[fd] = callback

    def remove(self, fd: int) -> None:
        """Watch `fd` no more; to be called before it is closed. Does nothing after `close`."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def close(self) -> None:
        """Watch nothing any more."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._callbacks.clear()

    def _ready(self) -> None:
        for fd, _ in self._epoll.poll(0, _EVENTS_MAX):
            # An earlier callback of this round may have removed it.
            callback = self._callbacks.get(fd)
            if callback is not None:
                callback()
