"""Makes the objects of `setup`'s value immortal, so that children which read them copy no page.

Reading a Python object writes to it: its reference count. CPython 3.12 and 3.13 know objects whose count is never
written, because their low 32 bits say so (PEP 683: `None`, small integers, interned names); there is no call that makes
one, so the bits are set here as `None` has them. A self-test comes first.

An immortal object is never freed and never finalised, whoever lets go of it. So only plain data is made so: what
belongs to the interpreter (types, modules, functions, code, frames) ends the walk, as do weak references, locks, files
and objects with finalizers; objects of types that nobody vouches for, and those that somebody watches by a weak
reference, stay mortal themselves while the walk goes on through them. What is left over leaks at most once, in a
process that holds the value for life anyway: the template, which runs no code of the user's any more, and its children.
"""

from __future__ import annotations

import _thread
import _weakref
import collections
import ctypes
import functools
import gc
import sys
import time
import types
from itertools import chain, compress, repeat
from operator import is_

from . import system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from . import child

VERSIONS = ((3, 12), (3, 13))
#: Looked at together: enough to spread what a batch costs, and small enough to stay in the processor's caches.
_BATCH = 4096
#: Containers opened together; fewer where that gives more than this many objects.
_OPENED_MAX = 1024
_FOUND_MANY = 1 << 18

#: What becomes of an object: the walk ends here, it stays mortal but is walked through, or it becomes immortal: as it
#: is, with its hash known, with what it holds, with what it holds unless it is weakly referenced, as a numpy array.
_STOP, _THROUGH, _ATOM, _HASHED, _NODE, _WATCHED, _ARRAY = range(7)

_PLAIN: dict[type, int] = {
    int: _ATOM,
    float: _ATOM,
    complex: _ATOM,
    bytearray: _ATOM,
    range: _NODE,
    slice: _NODE,
    str: _HASHED,
    bytes: _HASHED,
    tuple: _NODE,
    list: _NODE,
    dict: _NODE,
    set: _WATCHED,
    frozenset: _WATCHED,
    object: _ATOM,
    collections.OrderedDict: _WATCHED,
    collections.defaultdict: _WATCHED,
    collections.deque: _WATCHED,
    types.SimpleNamespace: _NODE,
    types.MappingProxyType: _NODE,
}
#: By module and name, taken only where the module is loaded. Their hashes are not asked for where that may run code.
_PLAIN_NAMED: tuple[tuple[str, str, int], ...] = (
    ("datetime", "date", _HASHED),
    ("datetime", "timedelta", _HASHED),
    ("datetime", "datetime", _NODE),
    ("datetime", "time", _NODE),
    ("datetime", "timezone", _NODE),
    ("decimal", "Decimal", _HASHED),
    ("array", "array", _WATCHED),
    ("numpy", "ndarray", _ARRAY),
)
_STOPPED: tuple[type, ...] = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.CodeType,
    types.FrameType,
    types.TracebackType,
    types.GeneratorType,
    types.CoroutineType,
    types.AsyncGeneratorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    functools._lru_cache_wrapper,
    _weakref.ReferenceType,
    _weakref.ProxyType,
    _weakref.CallableProxyType,
    _thread.LockType,
    _thread.RLock,
    _thread._local,
)
#: Where a type object has its `tp_dealloc`, in words of 64 bits: its place is part of the ABI.
_DEALLOC_WORD = 6


class _Plain:
    """A class as Python code makes them: by its deallocator others of that kind are known."""


class Walk:
    """Makes plain data immortal, whatever holds it. One use, in a process with one thread."""

    def __init__(self) -> None:
        self.count = 0
        self._words = system.address_space()
        self._immortal = self._words[id(None) >> 2]
        self._plain = dict(_PLAIN)
        for module, name, kind in _PLAIN_NAMED:
            found = getattr(sys.modules.get(module), name, None)
            if isinstance(found, type):
                self._plain[found] = kind
        self._kinds: dict[type, int] = {}
        #: Dicts whose keys are to be seen to: those of a dict of texts are not among its referents.
        self._tables: list[dict[Any, Any]] = []
        #: Left mortal and walked through; kept, so that no id is used again.
        self._passed: dict[int, Any] = {}
        self._python_dealloc = _dealloc(_Plain)
        #: Namespaces of modules are the interpreter's, also where a value leads to one without its module.
        self._namespaces = {
            id(module.__dict__) for module in list(sys.modules.values()) if isinstance(module, types.ModuleType)
        }

    def run(self, value: Any) -> int:
        """Make immortal what can be reached from `value`. Returns how many objects that were."""
        pending = self._settle([value])
        width = _OPENED_MAX
        while pending or self._tables:
            if self._tables:
                found = list(chain.from_iterable(map(dict.keys, self._tables[-width:])))
                del self._tables[-width:]
            else:
                found = self._open(pending[-width:])
                del pending[-width:]
            if len(found) > _FOUND_MANY:
                width = max(1, width // 8)
            elif width < _OPENED_MAX:
                width *= 2
            for start in range(0, len(found), _BATCH):
                pending += self._settle(found[start : start + _BATCH])
        return self.count

    def _settle(self, objects: list[Any]) -> list[Any]:
        """Make these immortal, as their types allow. Returns those to be opened, each once in the whole walk."""
        kinds = list(map(type, objects))
        distinct = set(kinds)
        opened: list[Any] = []
        for kind in distinct:
            what = self._kinds.get(kind)
            if what is None:
                what = self._kinds[kind] = self._judge(kind)
            if what == _STOP:
                continue
            mine = objects if len(distinct) == 1 else list(compress(objects, map(is_, kinds, repeat(kind))))
            if kind is dict and not self._namespaces.isdisjoint(map(id, mine)):
                mine = [each for each in mine if id(each) not in self._namespaces]
            if what == _THROUGH:
                new = self._pass(mine)
            elif what in (_ATOM, _HASHED):
                if what == _HASHED:
                    collections.deque(map(hash, mine), 0)
                self._mark_atoms(mine)
                continue
            else:
                new = self._mark(mine, what)
            opened += new
            if issubclass(kind, dict):
                self._tables += new
        return opened

    def _mark_atoms(self, objects: Iterable[Any]) -> None:
        words, immortal = self._words, self._immortal
        count = 0
        for address in map(id, objects):
            at = address >> 2
            if words[at] != immortal:
                words[at] = immortal
                count += 1
        self.count += count

    def _mark(self, objects: list[Any], what: int) -> list[Any]:
        """Mark containers. Returns those that were not yet; the watched ones among them stay as they are."""
        words, immortal = self._words, self._immortal
        if what != _NODE:
            watched = [each for each in objects if _weakref.getweakrefcount(each)]
            if watched:
                return self._pass(watched) + self._mark(
                    [each for each in objects if not _weakref.getweakrefcount(each)], _NODE
                )
        new: list[Any] = []
        add = new.append
        for each, address in zip(objects, map(id, objects), strict=True):
            at = address >> 2
            if words[at] != immortal:
                words[at] = immortal
                add(each)
        self.count += len(new)
        return new

    def _pass(self, objects: list[Any]) -> list[Any]:
        """Those which the walk has not yet come through."""
        new = []
        for each in objects:
            if id(each) not in self._passed:
                self._passed[id(each)] = each
                new.append(each)
        return new

    def _open(self, containers: list[Any]) -> list[Any]:
        found = gc.get_referents(*containers)
        array_type = getattr(sys.modules.get("numpy"), "ndarray", None)
        if array_type is not None:
            for each in containers:
                if isinstance(each, array_type):
                    found += _array_referents(array_type.view(each, array_type), array_type)
        return found

    def _judge(self, kind: type) -> int:
        if issubclass(kind, _STOPPED) or any("__del__" in each.__dict__ for each in kind.__mro__):
            return _STOP
        what = self._plain.get(kind)
        if what is not None:
            return what
        numpy = sys.modules.get("numpy")
        if numpy is not None and issubclass(kind, (numpy.generic, numpy.dtype)):
            return _THROUGH if issubclass(kind, numpy.void) else _ATOM
        native = kind
        while _dealloc(native) == self._python_dealloc and native.__base__ is not None:
            native = native.__base__
        if native is not kind and native in self._plain:
            return _WATCHED if kind.__weakrefoffset__ else _NODE
        return _THROUGH


def settle(plan: child.Plan) -> list[str]:
    """As a template is sealed: make `setup`'s value immortal and put that into its account. Returns what was done that
    the user may want to know."""
    began = time.perf_counter()
    count, off = make_immortal(plan.seen._value, plan.immortal)
    plan.account |= {"immortal_objects": count, "immortal_off": off}
    return [f"{count:,} objects of setup's value made immortal in {time.perf_counter() - began:.2f} s"] if count else []


def make_immortal(value: Any, wanted: bool = True) -> tuple[int, str]:
    """Make the objects of `setup`'s value immortal. Returns how many, and why none where that is so ("": nothing was
    to be done)."""
    if value is None:
        return 0, ""
    reason = "switched off by the workload" if not wanted else unavailable()
    return (0, reason) if reason else (Walk().run(value), "")


def unavailable() -> str:
    """Why objects cannot be made immortal in this interpreter; "" where they can."""
    own = f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}"
    if sys.implementation.name != "cpython" or sys.version_info[:2] not in VERSIONS:
        return f"{own} has no immortal objects that Herder knows (CPython 3.12 and 3.13 have)"
    if sys.maxsize < 1 << 32 or sys.byteorder != "little":
        return "objects have another shape on this machine (64-bit little-endian ones are known)"
    if "t" in sys.abiflags or "d" in sys.abiflags or hasattr(sys, "gettotalrefcount"):
        return f"this build of {own} counts references in another way (free-threaded or for debugging)"
    return _self_test()


def _self_test() -> str:
    """Try it on objects of our own: their count must be as `None`'s, and stay so."""
    words = system.address_space()
    immortal = words[id(None) >> 2]
    if immortal != sys.getrefcount(None) or immortal < 1 << 31:
        return f"self-test failed: the reference count of None is {sys.getrefcount(None)}, in memory {immortal}"
    mortal = [object()]
    before = words[id(mortal) >> 2]
    again = mortal
    if words[id(mortal) >> 2] != before + 1:
        return "self-test failed: reference counts are not where they should be"
    del again
    for each in ([1.5], (object(), "x"), {"a": object()}, f"{before} herder", _Plain()):
        words[id(each) >> 2] = immortal
        held = [each] * 100
        if sys.getrefcount(each) != sys.getrefcount(None):
            return f"self-test failed: references to an immortal {type(each).__name__} are counted"
        del held
        if words[id(each) >> 2] != immortal:
            return f"self-test failed: an immortal {type(each).__name__} did not stay so"
    return ""


def _dealloc(kind: type) -> int:
    return ctypes.c_size_t.from_address(id(kind) + _DEALLOC_WORD * 8).value


def _array_referents(array: Any, array_type: type) -> list[Any]:
    """What numpy does not tell the collector: an array's elements, its owner and its type."""
    found = [array.dtype]
    if isinstance(array.base, array_type):
        found.append(array.base)
    if array.dtype.names:
        for name in array.dtype.names:
            if array.dtype[name].hasobject:
                found += _array_referents(array[name], array_type)
    elif array.dtype.hasobject:
        found += array.reshape(-1).tolist()
    return found
