"""What ends connections from outside: forks of the process, and the end of the interpreter.

A forked child shares the socket and lacks the thread, so nothing of its parent's connections may be used in it. At exit
the interpreter waits for what was submitted, as `concurrent.futures` does, and cancels it after Ctrl-C.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - its exit hook must be registered before ours: names are resolved in its threads
import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from herder.connection import Connection

_connections: weakref.WeakSet[Connection] = weakref.WeakSet()
_is_registered = False


def register(connection: Connection) -> None:
    """Let this connection take part."""
    global _is_registered
    if not _is_registered:
        _is_registered = True
        os.register_at_fork(after_in_child=_disown_all)
        # As concurrent.futures does: runs when the main thread has ended, before daemon threads are stopped.
        threading._register_atexit(_finish_all)  # type: ignore[attr-defined]
    _connections.add(connection)


def _disown_all() -> None:
    for connection in list(_connections):
        connection.disown()


def _finish_all() -> None:
    """The interpreter ends: wait for what was submitted. After Ctrl-C, or at one, cancel it instead."""
    interrupted = getattr(sys, "last_type", None) is KeyboardInterrupt
    for connection in [each for each in _connections if not each.is_foreign]:
        connection.refuse_new()
        try:
            if not interrupted:
                connection.wait_settled()
        except KeyboardInterrupt:
            interrupted = True
        connection.end(None)
