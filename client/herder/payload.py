"""A function and its arguments as bytes: what is pickled how, which tasks it waits for, and what could not be pickled.

Theory of operation. Arguments of plain types take the C pickler alone. Everything else goes through `_Pickler`,
cloudpickle's with four additions in the reduction hook, which the C pickler calls for no plain container, so they are
free there:

- a `herder.Future` found anywhere becomes a call of `_herder_task.dependency(job, index)` in the child, or, when it is
done,
  its value in place. The call is built of `operator.methodcaller` and `importlib.import_module`, so that neither side
  needs a module of ours to pickle or to unpickle it;
- any other future is refused: nobody could wait for it on another machine;
- code pickled by value is noticed, for then the interpreters on both sides must agree;
- it keeps the name of its file, which cloudpickle 3.1.3 and later replace: a traceback of a task has to say where.

Functions that `submit` sends again and again are pickled once where that cannot be told apart from pickling each time:
`_snapshot` lists everything that the pickle depends on, and the cache is used only while all of it is the same objects
and these are immutable. Any other function is pickled at each submit, so a changed closure or global is never sent
stale.
"""

from __future__ import annotations

import builtins
import concurrent.futures
import importlib
import io
import operator
import pickle
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import cloudpickle

from herder.in_task import OPTIONS_ATTRIBUTE
from herder_shared.errors import NotSerializable, PayloadTooLarge
from herder_shared.ids import BlobId, JobId, blob_id
from herder_shared.limits import BLOB_BYTES_MAX, GIB, INLINE_BYTES_MAX
from herder_shared.wire.messages import Function, Payload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: "3.11/3.1": what the other side must have to unpickle code that was pickled by value.
PYTHON_TAG = f"{sys.version_info[0]}.{sys.version_info[1]}/{'.'.join(cloudpickle.__version__.split('.')[:2])}"

_PROTOCOL = 5
_PLAIN = frozenset({int, str, bytes, float, bool, type(None), complex})
_SINGLETON_TYPES = frozenset({type(None), type(Ellipsis), type(NotImplemented)})
#: How deep, and over how many objects, the offender is looked for: a message is not worth more.
_SEARCH_DEPTH_MAX = 32
_SEARCH_OBJECTS_MAX = 10_000
_SNAPSHOT_DEPTH_MAX = 8


class Ready(NamedTuple):
    """A dependency which has ended well: its value takes its place."""

    value: Any


class DependencyEnded(Exception):
    """Raised by a `Depend`: a task that is depended on has failed or was cancelled, so this call need not be sent.

    `outcome` is the exception that the dependant ends with, or None when it is cancelled.
    """

    def __init__(self, outcome: BaseException | None) -> None:
        super().__init__()
        self.outcome = outcome


#: Says what stands for a future found in the arguments: the task to wait for, or its value. May raise.
Depend = Callable[["concurrent.futures.Future[Any]"], "tuple[JobId, int] | Ready"]


class Pickled(NamedTuple):
    """Pickled bytes, the tasks whose values they need, and whether they hold code by value."""

    content: bytes
    deps: tuple[tuple[JobId, int], ...] = ()
    code_by_value: bool = False


class PickledFunction(NamedTuple):
    """A callable ready to travel. `blob` holds its bytes when they are too many to travel inside the message."""

    function: Function
    blob: bytes | None
    deps: tuple[tuple[JobId, int], ...]
    code_by_value: bool
    name: str


def refuse_futures(future: concurrent.futures.Future[Any]) -> tuple[JobId, int] | Ready:
    """A `Depend` for where no task could wait."""
    raise NotSerializable(f"a {type(future).__qualname__} cannot be sent from here: take its result first")


def pickle_call(args: tuple[Any, ...], kwargs: Mapping[str, Any], depend: Depend, function_name: str) -> Pickled:
    """The arguments of one call.

    Raises:
        NotSerializable: names the object that cannot be pickled and its path in the arguments.
        PayloadTooLarge: above `BLOB_BYTES_MAX`.
    """
    if not kwargs and all(type(arg) in _PLAIN for arg in args):
        return Pickled(pickle.dumps((args, kwargs), _PROTOCOL))
    try:
        return _dump((args, kwargs), depend)
    except DependencyEnded:
        raise
    except Exception as error:  # pickling runs the objects' own code, which may raise anything
        raise _explain_call(args, kwargs, depend, function_name, error) from error


def pickle_plainly(value: Any, what: str) -> Pickled:
    """Something other than arguments, which may not depend on tasks. `what` names it in the error.

    Raises:
        NotSerializable: names the object that cannot be pickled and its path.
    """
    try:
        return _dump(value, refuse_futures)
    except Exception as error:  # pickling runs the objects' own code, which may raise anything
        culprit, path = _find_culprit(value, what, refuse_futures)
        raise _not_serializable(f"Cannot send {what}", culprit, path, error) from error


def payload_of(content: bytes) -> Payload:
    """The payload that stands for these bytes: themselves, or the name of a blob.

    Raises:
        PayloadTooLarge: above `BLOB_BYTES_MAX`.
    """
    size = len(content)
    if size <= INLINE_BYTES_MAX:
        return Payload(inline=content, size_bytes=size)
    if size > BLOB_BYTES_MAX:
        raise PayloadTooLarge(
            f"the arguments take {size / GIB:.1f} GiB pickled; at most {BLOB_BYTES_MAX / GIB:.0f} GiB are allowed: "
            "load what is that large inside the task, or in the workload's setup",
            size_bytes=size,
        )
    return Payload(blob=blob_id(content), size_bytes=size)


class FunctionCache:
    """Pickled functions, kept as long as the functions live and nothing that their pickle depends on has changed."""

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[Any, tuple[list[_Check], PickledFunction]] = weakref.WeakKeyDictionary()

    def pickled(self, function: Callable[..., Any], depend: Depend) -> PickledFunction:
        """Raises:
        NotSerializable: names the object in the function that cannot be pickled.
        TypeError: it is not callable.
        """
        if isinstance(function, types.FunctionType):
            kept = self._kept.get(function)
            if kept is not None and all(check() for check in kept[0]):
                return kept[1]
        result = _pickle_function(function, depend)
        if isinstance(function, types.FunctionType) and not result.deps:
            checks = _snapshot(function)
            if checks is not None:
                self._kept[function] = (checks, result)
        return result


def _pickle_function(function: Callable[..., Any], depend: Depend) -> PickledFunction:
    if not callable(function):
        raise TypeError(f"{function!r} is not callable: pass the function itself and its arguments behind it")
    name = function_name(function)
    try:
        pickled = _dump(function, depend)
    except DependencyEnded:
        raise
    except Exception as error:  # pickling runs the objects' own code, which may raise anything
        culprit, path = _find_culprit(function, name, depend)
        raise _not_serializable(f"Cannot send the function {name}", culprit, path, error) from error
    content = pickled.content
    large = len(content) > INLINE_BYTES_MAX
    name_by_hash: BlobId = blob_id(content)
    wire = Function(id=name_by_hash, content=b"" if large else content)
    return PickledFunction(wire, content if large else None, pickled.deps, pickled.code_by_value, name)


def function_name(function: Callable[..., Any]) -> str:
    """What messages call it: `sum`, `Model.fit`, `partial(fit)`."""
    inner = getattr(function, "func", None)
    if inner is not None and callable(inner):
        return f"{type(function).__name__}({function_name(inner)})"
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__


# --- pickling --------------------------------------------------------------------------------------------------------


class _TaskModule:
    """Unpickles as the module `_herder_task`, which exists only where tasks run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, ("_herder_task",)


TASK_MODULE = _TaskModule()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO, depend: Depend) -> None:
        super().__init__(file, protocol=_PROTOCOL)
        self._depend = depend
        self.deps: dict[tuple[JobId, int], None] = {}
        self.code_by_value = False

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, concurrent.futures.Future):
            return self._reduce_future(obj)
        if type(obj) is types.CodeType:
            return _reduce_code(obj)
        reduced = super().reducer_override(obj)
        if reduced is not NotImplemented and _is_code(obj):
            self.code_by_value = True
        return reduced

    def _reduce_future(self, future: concurrent.futures.Future[Any]) -> tuple[Any, ...]:
        stand_in = self._depend(future)
        if isinstance(stand_in, Ready):
            return operator.getitem, ((stand_in.value,), 0)
        self.deps[stand_in] = None
        job, index = stand_in
        return operator.methodcaller("dependency", str(job), index), (TASK_MODULE,)


def _reduce_code(code: types.CodeType) -> Any:
    """As cloudpickle does it, but for the file's name, the constructor's 11th argument."""
    make, args = cloudpickle.Pickler.dispatch_table[types.CodeType](code)
    # A new string: the pickle must not depend on who else holds this one.
    return make, (*args[:10], "".join(code.co_filename), *args[11:])


def _is_code(obj: Any) -> bool:
    if isinstance(obj, types.FunctionType):
        return True
    return isinstance(obj, type) and obj not in _SINGLETON_TYPES and obj.__module__ != "builtins"


def _dump(value: Any, depend: Depend) -> Pickled:
    file = io.BytesIO()
    pickler = _Pickler(file, depend)
    pickler.dump(value)
    return Pickled(file.getvalue(), tuple(pickler.deps), pickler.code_by_value)


# --- the function cache ----------------------------------------------------------------------------------------------

_Check = Callable[[], bool]
_MISSING = object()


def _snapshot(function: types.FunctionType) -> list[_Check] | None:
    """Checks that everything which the pickle of `function` depends on is unchanged; None: that cannot be told.

    They hold no function, closure or module's names: a cached function must die as any other.
    """
    checks: list[_Check] = []
    return checks if _watch_function(function, checks, set(), 0) else None


def _watch_function(function: types.FunctionType, checks: list[_Check], seen: set[int], depth: int) -> bool:
    if id(function) in seen:
        return True
    seen.add(id(function))
    module = sys.modules.get(function.__module__ or "")
    if (
        module is not None
        and module.__name__ != "__main__"
        and getattr(module, function.__qualname__, None) is function
    ):
        checks.append(_still_there(module.__name__, function.__qualname__, weakref.ref(function)))
        return module.__name__ not in cloudpickle.list_registry_pickle_by_value()
    if depth >= _SNAPSHOT_DEPTH_MAX or function.__kwdefaults__ or set(vars(function)) - {OPTIONS_ATTRIBUTE}:
        return False
    if not all(type(value) in _PLAIN for value in function.__defaults__ or ()):
        return False
    try:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # an empty cell
        return False
    names = {name: function.__globals__.get(name, _MISSING) for name in _global_names(function.__code__)}
    for value in (*cells, *names.values()):
        if value is not _MISSING and not _watch_value(value, checks, seen, depth):
            return False
    checks.append(_unchanged(function, cells, names))
    return True


def _watch_value(value: Any, checks: list[_Check], seen: set[int], depth: int) -> bool:
    if type(value) in _PLAIN:
        return True
    if isinstance(value, types.FunctionType):
        return _watch_function(value, checks, seen, depth + 1)
    if isinstance(value, types.ModuleType):
        return sys.modules.get(value.__name__) is value
    if isinstance(value, types.BuiltinFunctionType):
        return isinstance(value.__self__, types.ModuleType)
    return (
        isinstance(value, type) and value.__module__ == "builtins" and getattr(builtins, value.__name__, None) is value
    )


def _still_there(module: str, name: str, own: weakref.ref[types.FunctionType]) -> _Check:
    return lambda: getattr(sys.modules.get(module), name, None) is own()


def _unchanged(function: types.FunctionType, cells: list[Any], names: dict[str, Any]) -> _Check:
    own = weakref.ref(function)
    code, defaults = function.__code__, function.__defaults__
    kept_cells = [_weakly(value) for value in cells]
    kept_names = [(name, _weakly(value)) for name, value in names.items()]

    def unchanged() -> bool:
        now = own()
        if now is None or now.__code__ is not code or now.__defaults__ is not defaults or now.__kwdefaults__:
            return False
        if vars(now).keys() - {OPTIONS_ATTRIBUTE}:
            return False
        try:
            for cell, kept in zip(now.__closure__ or (), kept_cells, strict=True):
                if not _is_same(kept, cell.cell_contents):
                    return False
        except ValueError:  # emptied
            return False
        now_names = now.__globals__
        return all(_is_same(kept, now_names.get(name, _MISSING)) for name, kept in kept_names)

    return unchanged


def _weakly(value: Any) -> Any:
    return weakref.ref(value) if isinstance(value, types.FunctionType) else value


def _is_same(kept: Any, now: Any) -> bool:
    return (kept() if type(kept) is weakref.ref else kept) is now


def _global_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names


# --- who is to blame -------------------------------------------------------------------------------------------------


def _explain_call(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], depend: Depend, function_name: str, error: BaseException
) -> NotSerializable:
    named = [(f"args[{i}]", value) for i, value in enumerate(args)]
    named += [(f"kwargs[{name!r}]", value) for name, value in kwargs.items()]
    for path, value in named:
        if not _pickles(value, depend):
            culprit, where = _find_culprit(value, path, depend)
            return _not_serializable(f"Cannot send the arguments of {function_name}", culprit, where, error)
    return _not_serializable(f"Cannot send the arguments of {function_name}", (args, dict(kwargs)), "args", error)


def _not_serializable(what: str, culprit: Any, path: str, error: BaseException) -> NotSerializable:
    if isinstance(error, NotSerializable):
        reason, cure = str(error), ""
    else:
        reason = f"{type(error).__name__}: {error}"
        cure = (
            ". It nests too deeply: pass it in a flatter form"
            if isinstance(error, RecursionError) or "recursion" in str(error)
            else ". Make it inside the task or in the workload's setup, or pass what it is made from"
        )
    kind = f"{type(culprit).__module__}.{type(culprit).__qualname__}".removeprefix("builtins.")
    return NotSerializable(f"{what}: {path} (a {kind}) cannot be pickled: {reason}{cure}", path=path, culprit_type=kind)


def _find_culprit(value: Any, path: str, depend: Depend) -> tuple[Any, str]:
    """The deepest object which does not pickle by itself, on the first path that leads to one."""
    seen = {id(value)}
    for _ in range(_SEARCH_DEPTH_MAX):
        for where, part in _parts(value):
            if len(seen) >= _SEARCH_OBJECTS_MAX:
                return value, path
            if id(part) in seen or type(part) in _PLAIN:
                continue
            seen.add(id(part))
            if not _pickles(part, depend):
                value, path = part, path + where
                break
        else:
            break
    return value, path


def _pickles(value: Any, depend: Depend) -> bool:
    try:
        _dump(value, depend)
    except Exception:  # noqa: BLE001 - whatever it is, this part is where it comes from
        return False
    return True


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What the pickle of `value` is made of, each with its path from it."""
    if isinstance(value, dict):
        for key, item in list(value.items()):
            yield f"[{_short(key)}]", item
            yield f" key {_short(key)}", key
    elif isinstance(value, list | tuple):
        names: Sequence[str] = getattr(value, "_fields", ())
        for i, item in enumerate(value):
            yield (f".{names[i]}" if i < len(names) else f"[{i}]"), item
    elif isinstance(value, set | frozenset):
        for item in list(value):
            yield f" element {_short(item)}", item
    elif isinstance(value, types.FunctionType):
        yield from _function_parts(value)
    elif isinstance(value, concurrent.futures.Future):
        return  # refused as a whole: what it is made of is nobody's concern
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
        yield ".__func__", value.__func__
    elif isinstance(value, type):
        yield from ((f".{name}", item) for name, item in list(vars(value).items()) if not name.startswith("__"))
    else:
        yield from _attributes(value)


def _function_parts(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield f" closes over {name}", cell.cell_contents
        except ValueError:
            continue  # an empty cell: nothing in it to pickle
    for name in sorted(_global_names(function.__code__)):
        if name in function.__globals__:
            yield f" uses the global {name}", function.__globals__[name]
    for i, default in enumerate(function.__defaults__ or ()):
        yield f" has the default [{i}]", default
    yield from ((f" has the default {name}", value) for name, value in (function.__kwdefaults__ or {}).items())
    yield from ((f".{name}", value) for name, value in vars(function).items())


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    if type(value).__module__ == "functools" and type(value).__name__ == "partial":
        yield ".func", value.func
        yield from ((f".args[{i}]", item) for i, item in enumerate(value.args))
        yield from ((f".keywords[{name!r}]", item) for name, item in value.keywords.items())
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict):
        yield from ((f".{name}", item) for name, item in list(own.items()))
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if isinstance(item := getattr(value, name, _MISSING), object) and item is not _MISSING:
                yield f".{name}", item


def _short(value: Any) -> str:
    text = repr(value) if type(value) in _PLAIN else f"<{type(value).__qualname__}>"
    return text if len(text) <= 40 else f"{text[:37]}..."
