"""The standard library's fork hooks, left out where a sealed template forks a child.

After each fork `threading` and `logging` make their locks anew, in case another thread held them. That is 160 of the
230 page faults of a bare child. A sealed template has one Python thread, so no lock is held by another and every one is
as it should be; `threading` already knows of just this thread. `random` is seeded by its C method alone.

Theory of operation. The hooks are wrapped when they are registered, and a wrapper does nothing while they are left out.
But even that costs a child 30 page faults, so they are also taken out of the interpreter's own lists, which are found
by what refers to the wrappers; and put back by a hook that runs before each fork, when that is a fork which a child
makes. Where the lists are not found, the wrappers stay in them. Where a module registered its hooks before `watch` (an
interpreter whose start-up files import it), they run always.
"""

from __future__ import annotations

import gc
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
#: In this process, and the forks that it makes, the hooks do nothing; 0 = they run everywhere.
_leaving_pid = 0
_random_was_wrapped = False
_reseed: Hook | None = None
_wrappers: list[Hook] = []
#: Taken out of an interpreter's list: the list, the place, the hook. The last one was taken out last.
_taken_out: list[tuple[list[Hook], int, Hook]] = []
_before: list[Hook] = []
#: The interpreter's list that a wrapper is in, by the wrapper's id. Once memory is frozen it cannot be looked for.
_lists: dict[int, list[Hook]] = {}
_watches_forks = False


def watch() -> None:
    """See hooks being registered, until `leave_out`."""
    os.register_at_fork = _register_wrapped  # type: ignore[assignment]


def leave_out() -> None:
    """This process forks children only from now on, and if just one Python thread lives in it, with lighter hooks."""
    global _leaving_pid, _reseed
    os.register_at_fork = _register
    threading = sys.modules.get("threading")
    if len(sys._current_frames()) != 1 or (threading is not None and _knows_others(threading)):
        return
    if _random_was_wrapped:
        generator = sys.modules["random"]._inst
        generator.gauss_next = None
        _reseed = sys.modules["_random"].Random.seed.__get__(generator)
    _leaving_pid = os.getpid()
    _take_out()


def nothing_left() -> None:
    """What a forked child has to make up for: nothing."""


def makes_up() -> Hook:
    """What a forked child has to make up for, of the hooks that were left out. All of them run in its own forks."""
    return _reseed if _reseed is not None and _leaving_pid else nothing_left


def _take_out() -> None:
    global _watches_forks
    if not _watches_forks:
        _register(before=_before_fork)
        _watches_forks = True
    for wrapper in _wrappers:
        found = _lists.get(id(wrapper)) or _list_of(wrapper)
        if found is not None and wrapper in found:
            _lists[id(wrapper)] = found
            place = found.index(wrapper)
            del found[place]
            _taken_out.append((found, place, wrapper))


def _list_of(wrapper: Hook) -> list[Hook] | None:
    ours = (_wrappers, _before)
    lists = [each for each in gc.get_referrers(wrapper) if type(each) is list and all(each is not one for one in ours)]
    return lists[0] if len(lists) == 1 else None


def _before_fork() -> None:
    """Put everything back if this is a child's own fork. The interpreter has already begun to go through the hooks that
    run before a fork, so those are called here."""
    global _leaving_pid
    if not _leaving_pid or os.getpid() == _leaving_pid:
        return
    _leaving_pid = 0
    missed: list[Hook] = []
    while _taken_out:
        hooks, place, hook = _taken_out.pop()
        hooks.insert(place, hook)
        if hook in _before:
            missed.append(hook)
    for hook in missed:
        hook()


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
        _wrappers.extend(hooks.values())
        _before.extend(hook for when, hook in hooks.items() if when == "before")
    _register(**hooks)


def _unless_left_out(hook: Hook) -> Hook:
    def run() -> None:
        if not _leaving_pid:
            hook()

    return run
