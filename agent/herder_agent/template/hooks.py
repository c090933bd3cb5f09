"""The standard library's fork hooks, left out where a sealed template forks a child.

After each fork `threading` and `logging` make their locks anew, in case another thread held them. That is 160 of the
230 page faults of a bare child. A sealed template has one Python thread, so no lock is held by another and every one is
as it should be; `threading` already knows of just this thread. `random` is seeded by its C method alone.

The hooks are wrapped when they are registered, so they still run in every fork that a task makes. Where a module
registered them before `watch` (an interpreter whose start-up files import it), they run always.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Hook = Callable[[], Any]

#: The hooks, by what they do in the child.
_NEEDLESS = ("threading._after_fork", "logging._after_at_fork_child_reinit_locks", "random.Random.seed")

_register = os.register_at_fork
_leaves_out = False
_random_was_wrapped = False
_reseed: Hook | None = None


def watch() -> None:
    """See hooks being registered, until `leave_out`."""
    os.register_at_fork = _register_wrapped  # type: ignore[assignment]


def leave_out() -> None:
    """This process forks children only from now on, and if just one Python thread lives in it, with lighter hooks."""
    global _leaves_out, _reseed
    os.register_at_fork = _register
    threading = sys.modules.get("threading")
    if len(sys._current_frames()) != 1 or (threading is not None and _knows_others(threading)):
        return
    if _random_was_wrapped:
        generator = sys.modules["random"]._inst
        generator.gauss_next = None
        _reseed = sys.modules["_random"].Random.seed.__get__(generator)
    _leaves_out = True


def take_up() -> None:
    """In a forked child: from now on all hooks run."""
    global _leaves_out
    if _leaves_out:
        _leaves_out = False
        if _reseed is not None:
            _reseed()


def _knows_others(threading: Any) -> bool:
    known = threading.enumerate()
    return bool(known != [threading.main_thread()] or known[0].ident != threading.get_ident())


def _register_wrapped(**hooks: Hook) -> None:
    global _random_was_wrapped
    in_child = hooks.get("after_in_child")
    name = f"{getattr(in_child, '__module__', '')}.{getattr(in_child, '__qualname__', '')}"
    if name in _NEEDLESS:
        if name == "random.Random.seed":
            _random_was_wrapped = True
        hooks = {when: _unless_left_out(hook) for when, hook in hooks.items()}
    _register(**hooks)


def _unless_left_out(hook: Hook) -> Hook:
    def run() -> None:
        if not _leaves_out:
            hook()

    return run
