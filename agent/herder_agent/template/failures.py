"""An exception of the user's code as what the agent is told: text without our frames, and a pickle that is known to
unpickle."""

from __future__ import annotations

import copyreg
import pickle
import sys
import traceback
from types import FunctionType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Traceback and message, each; the middle is left out.
TEXT_BYTES_MAX = 64 * 1024
#: Pickled exceptions above this are sent as text only.
PICKLE_BYTES_MAX = 1 << 20
#: How far into a value the search for what does not pickle goes.
SEARCH_DEPTH_MAX = 6
SEARCH_ITEMS_MAX = 2_000

#: Built-in exceptions that keep more than `args` and attributes.
_WITH_OWN_STATE = (
    OSError,
    ImportError,
    AttributeError,
    NameError,
    StopIteration,
    SyntaxError,
    SystemExit,
    UnicodeError,
    BaseExceptionGroup,
)

_OURS = __file__.rpartition("/")[0] + "/"


class Refusal(Exception):
    """A task that cannot be run or whose result cannot be sent, for a reason that we found: `cause` as in states.py."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def clip(text: str) -> str:
    """`text` within the bound, with its middle left out."""
    if len(text) <= TEXT_BYTES_MAX // 4:
        return text
    content = text.encode("utf-8", "replace")
    if len(content) <= TEXT_BYTES_MAX:
        return content.decode()
    half = TEXT_BYTES_MAX // 2 - 64
    return (
        content[:half].decode("utf-8", "ignore")
        + f"\n... {len(content) - 2 * half} bytes left out ...\n"
        + content[-half:].decode("utf-8", "ignore")
    )


def type_name(error: BaseException) -> str:
    kind = type(error)
    return (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )


def message_of(error: BaseException) -> str:
    try:
        return clip(str(error))
    except Exception as broken:  # noqa: BLE001 - the user's __str__ may raise anything; we only report
        return f"<its __str__ raised {type(broken).__name__}>"


def traceback_text(error: BaseException) -> str:
    """The traceback as Python prints it, causes, contexts and notes included, without the frames of this package."""
    try:
        report = traceback.TracebackException(type(error), error, error.__traceback__, compact=True)
        _drop_our_frames(report, set())
        return clip("".join(report.format()))
    except Exception as broken:  # noqa: BLE001 - hostile __str__, __notes__ or source: the type must still be told
        return (
            f"{type_name(error)}: {message_of(error)}\n(no traceback: formatting it raised {type(broken).__name__})\n"
        )


def _drop_our_frames(report: traceback.TracebackException, seen: set[int]) -> None:
    if id(report) in seen:
        return
    seen.add(id(report))
    report.stack[:] = [frame for frame in report.stack if not frame.filename.startswith(_OURS)]
    for linked in (report.__cause__, report.__context__, *(getattr(report, "exceptions", None) or ())):
        if linked is not None:
            _drop_our_frames(linked, seen)


def pickle_exception(error: BaseException) -> bytes | None:
    """The exception's pickle, or None when it has none that unpickles to an exception of its type.

    Unpickling is tried here: that a class's own reduction is wrong shows only then.
    """
    try:
        content = _dump_exception(error)
        if len(content) > PICKLE_BYTES_MAX or type(pickle.loads(content)) is not type(error):
            return None
    except Exception:  # noqa: BLE001 - whatever the user's reduction raises: the text is sent instead
        return None
    return content


def _dump_exception(error: BaseException) -> bytes:
    import io

    import cloudpickle

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, BaseException) and _has_own_init(type(obj)):
                return copyreg.__newobj__, (type(obj), *obj.args), vars(obj) or None  # type: ignore[attr-defined]
            return super().reducer_override(obj)

    file = io.BytesIO()
    Pickler(file, protocol=5).dump(error)
    return file.getvalue()


def _has_own_init(kind: type[BaseException]) -> bool:
    """Whether rebuilding as exceptions do it, `kind(*args)`, would call an `__init__` of the user's, which may well
    take something else than what it left in `args`. Its `args` and attributes are all there is to such an exception."""
    return (
        isinstance(kind.__init__, FunctionType)
        and not isinstance(kind.__new__, FunctionType)
        and kind.__reduce__ is BaseException.__reduce__
        and kind.__reduce_ex__ is object.__reduce_ex__
        and not issubclass(kind, _WITH_OWN_STATE)
    )


def cannot_unpickle(what: str, error: BaseException) -> Refusal:
    """What arrived for a task is of no use here."""
    return Refusal("cannot_unpickle", unpickling_message(what, error))


def unpickling_message(what: str, error: BaseException) -> str:
    """Why a function or an argument could not be unpickled here, and what to do."""
    text = f"{what} could not be unpickled on this node: {type_name(error)}: {message_of(error)}"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{text}. The module {error.name!r} is not importable by {sys.executable} (Python {version}). "
            "Cures: install it there; name an interpreter that has it (Workload(python=...)); or make its folder "
            "visible to the nodes (Workload(working_dir=...), or a path that is the same there)"
        )
    if isinstance(error, (ImportError, AttributeError)):
        name = getattr(error, "name", None)
        module = sys.modules.get(name) if isinstance(name, str) else getattr(error, "obj", None)
        found = getattr(module, "__version__", None) or getattr(module, "__file__", None)
        where = f" Here it is {found}." if found else ""
        return f"{text}.{where} The package probably has another version here than where the task was submitted"
    return text


def not_serializable(value: Any, error: BaseException) -> str:
    """Why a result could not be pickled: names the object and its path."""
    path, culprit = find_culprit(value)
    try:
        shown = repr(culprit)[:200]
    except Exception:  # noqa: BLE001 - the user's __repr__
        shown = f"<{type(culprit).__qualname__}>"
    kind = type(culprit)
    return (
        f"the task's result cannot be pickled: {path} is {shown} (type {kind.__module__}.{kind.__qualname__}): "
        f"{type_name(error)}: {message_of(error)}. Return plain data, or open such things where they are used"
    )


def find_culprit(value: Any) -> tuple[str, Any]:
    """The innermost part of `value` that does not pickle, with its path, as far as containers and attributes tell."""
    import cloudpickle

    budget = SEARCH_ITEMS_MAX
    path, found = "result", value
    for _ in range(SEARCH_DEPTH_MAX):
        for suffix, part in _parts(found):
            budget -= 1
            if budget < 0:
                return path, found
            try:
                cloudpickle.dumps(part, protocol=5)
            except Exception:  # noqa: BLE001 - any reason for not pickling makes it the culprit
                path, found = path + suffix, part
                break
        else:
            return path, found
    return path, found


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return [(f"[{index}]", part) for index, part in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return [("{...}", part) for part in value]
    return (
        [(f".{name}", part) for name, part in getattr(value, "__dict__", {}).items()] if _has_own_state(value) else []
    )


def _has_own_state(value: Any) -> bool:
    return not isinstance(value, type) and isinstance(getattr(value, "__dict__", None), dict)
