"""Python objects that a fork leaves in a state nobody can mend: held locks, open event loops, multiprocessing's pipes.

One pass over all that the collector knows, about 30 ns an object. Nothing is imported and nothing is called on an
object whose type is not exactly known, so that looking changes nothing.
"""

from __future__ import annotations

import _thread
import gc
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Objects:
    """Those of interest that are alive: reachable, or at least not yet known to be garbage."""

    def __init__(self, *, locks: list[Any], loops: list[Any], pipes: list[Any]) -> None:
        self.locks = locks
        self.loops = loops
        self.pipes = pipes


def held_locks() -> list[Any]:
    """Locks that are held now, by whomever."""
    return _scan(set()).locks


def look(baseline: list[Any]) -> Objects:
    """What is alive and was not in `baseline` (locks). Garbage is collected before anything is said about it."""
    known = {id(lock) for lock in baseline}
    found = _scan(known)
    if found.locks or found.loops or found.pipes:
        del found
        gc.collect()
        found = _scan(known)
    return found


def whereabouts(thing: Any) -> str:
    """Who has this object, as far as that can be told in a word: "module.name" or "an attribute of Type"."""
    for holder in gc.get_referrers(thing):
        if isinstance(holder, dict):
            place = _place_in(holder, thing)
            if place:
                return place
        elif type(holder).__module__ != "builtins" and type(holder).__flags__ & _HEAP_TYPE:
            return f"of a {type(holder).__module__}.{type(holder).__qualname__}"
    return ""


def _place_in(holder: dict[Any, Any], thing: Any) -> str:
    """Of what module or object `holder` is the dictionary."""
    for name, module in list(sys.modules.items()):
        if _dict_of(module) is holder:
            return f"{name}.{next((key for key, value in holder.items() if value is thing), '?')}"
    owner = next((each for each in gc.get_referrers(holder) if _dict_of(each) is holder), None)
    return "" if owner is None else f"of a {type(owner).__module__}.{type(owner).__qualname__}"


def _dict_of(thing: Any) -> Any:
    """Without asking the object, which may be somebody's lazy one."""
    try:
        return object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return None


def _scan(known: set[int]) -> Objects:
    loops = _loop_types()
    connection = getattr(sys.modules.get("multiprocessing.connection"), "Connection", None)
    wanted = {_thread.LockType, _thread.RLock, *loops}
    if connection is not None:
        wanted.add(connection)
    found = [thing for thing in gc.get_objects() if type(thing) in wanted]
    own = _thread_locks()
    return Objects(
        locks=[
            thing
            for thing in found
            if type(thing) in (_thread.LockType, _thread.RLock)
            and id(thing) not in known
            and id(thing) not in own
            and _is_held(thing)
        ],
        loops=[thing for thing in found if type(thing) in loops and not thing.is_closed()],
        pipes=[thing for thing in found if type(thing) is connection and not thing.closed],
    )


def _is_held(lock: Any) -> bool:
    """Held so that a child of this thread could not take it: a recursive lock of this thread's own it could."""
    if type(lock) is _thread.LockType:
        return bool(lock.locked())
    text = repr(lock)  # <locked _thread.RLock object owner=1234 count=1 at 0x...>
    return text.startswith("<locked") and f"owner={_thread.get_ident()} " not in text


def _thread_locks() -> set[int]:
    """Of Python 3.11 and 3.12: each living thread holds one, the main thread in its child, too."""
    threading = sys.modules.get("threading")
    if threading is None:
        return set()
    return {id(getattr(thread, "_tstate_lock", None)) for thread in threading.enumerate()}


def _loop_types() -> set[type]:
    events = sys.modules.get("asyncio.events")
    if events is None:
        return set()
    found: set[type] = set()
    front: list[type] = [events.AbstractEventLoop]
    while front:
        kind = front.pop()
        found.add(kind)
        below: list[type] = type.__subclasses__(kind)
        front.extend(each for each in below if each not in found)
    # Nobody makes one of the abstract classes, whose `is_closed` raises.
    return {kind for kind in found if kind.is_closed is not events.AbstractEventLoop.is_closed}  # type: ignore[attr-defined]


_HEAP_TYPE = 1 << 9
