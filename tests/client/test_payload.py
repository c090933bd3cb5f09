"""What is pickled how, what is cached, and who is blamed when something cannot be pickled."""

from __future__ import annotations

import concurrent.futures
import functools
import math
import pickle
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herder.payload import (
    PYTHON_TAG,
    DependencyEnded,
    FunctionCache,
    Ready,
    function_name,
    payload_of,
    pickle_call,
    pickle_plainly,
    refuse_futures,
)
from herder_shared.errors import NotSerializable, PayloadTooLarge
from herder_shared.ids import JobId
from herder_shared.limits import INLINE_BYTES_MAX


def call_of(*args: Any, **kwargs: Any) -> Any:
    return pickle.loads(pickle_call(args, kwargs, refuse_futures, "f").content)


@dataclass
class Model:
    weights: list[Any]
    lock: Any = None


class Point(NamedTuple):
    x: Any
    y: Any


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner: Any) -> None:
        self.inner = inner


def test_arguments_come_back() -> None:
    assert call_of(1, "x", None) == ((1, "x", None), {})
    assert call_of([1, {"a": (2.0, b"b")}], k={3}) == (([1, {"a": (2.0, b"b")}],), {"k": {3}})


def test_the_tag_is_of_interpreter_and_cloudpickle() -> None:
    assert PYTHON_TAG.startswith(f"{sys.version_info[0]}.{sys.version_info[1]}/")


@pytest.mark.parametrize(
    ("value", "by_value"),
    [
        (len, False),
        (math.sin, False),
        (Model([1]), False),
        (pickle_call, False),
        (lambda: 1, True),
        ({"deep": [lambda: 1]}, True),
        (functools.partial(pow, 2), False),
        (type(None), False),
        (int, False),
        (threading, False),
    ],
)
def test_code_by_value_is_noticed(value: Any, by_value: bool) -> None:
    assert pickle_call((value,), {}, refuse_futures, "f").code_by_value is by_value


def test_class_of_a_function_is_code_by_value() -> None:
    class Local:
        pass

    assert pickle_call((Local(),), {}, refuse_futures, "f").code_by_value


def test_code_by_value_keeps_the_name_of_its_file_and_of_what_is_inside() -> None:
    def outer() -> str:
        return (lambda: sys._getframe().f_code.co_filename)()

    pickled = pickle_call((outer,), {}, refuse_futures, "f")
    (made,), _ = pickle.loads(pickled.content)
    assert made.__code__ is not outer.__code__
    assert made.__code__.co_filename == __file__
    assert made() == __file__


# --- futures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def task_module() -> Iterator[None]:
    module = types.ModuleType("_herder_task")
    module.dependency = lambda job, index: f"{job}:{index}"  # type: ignore[attr-defined]
    sys.modules["_herder_task"] = module
    yield
    del sys.modules["_herder_task"]


def test_pending_future_becomes_a_call_of_the_tasks_module(task_module: None) -> None:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    pickled = pickle_call(({"a": [future]}, future), {}, lambda _: (JobId("j"), 7), "f")
    assert pickled.deps == ((JobId("j"), 7),)
    assert not pickled.code_by_value
    args, _ = pickle.loads(pickled.content)
    assert args == ({"a": ["j:7"]}, "j:7")


@pytest.mark.parametrize("value", [(1, 2), None, [3], "text"])
def test_ended_future_becomes_its_value(value: Any) -> None:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    pickled = pickle_call(([future],), {}, lambda _: Ready(value), "f")
    assert pickled.deps == ()
    assert pickle.loads(pickled.content) == (([value],), {})


def test_ended_dependency_is_not_an_error_of_pickling() -> None:
    def depend(_: object) -> Ready:
        raise DependencyEnded(None)

    with pytest.raises(DependencyEnded):
        pickle_call((concurrent.futures.Future(),), {}, depend, "f")


def test_future_where_none_may_be_is_refused() -> None:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    with pytest.raises(NotSerializable, match="setup"):
        pickle_plainly(lambda: future, "the workload's setup")


# --- who is to blame -------------------------------------------------------------------------------------------------

LOCK = threading.Lock()


@pytest.mark.parametrize(
    ("args", "kwargs", "path"),
    [
        ((LOCK,), {}, "args[0]"),
        ((1, [2, LOCK]), {}, "args[1][1]"),
        (({"model": Model([1], LOCK)},), {}, "args[0]['model'].lock"),
        ((Model([{"deep": (1, LOCK)}]),), {}, "args[0].weights[0]['deep'][1]"),
        ((), {"where": Point(1, LOCK)}, "kwargs['where'].y"),
        ((Slotted(LOCK),), {}, "args[0].inner"),
        ((functools.partial(print, LOCK),), {}, "args[0].args[0]"),
        ((Model([1], LOCK).__init__,), {}, "args[0].__self__.lock"),  # type: ignore[misc]
    ],
)
def test_the_offender_is_named_with_its_path(args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> None:
    with pytest.raises(NotSerializable) as caught:
        pickle_call(args, kwargs, refuse_futures, "fit")
    assert caught.value.path == path
    assert "fit" in str(caught.value)
    assert "_thread.lock" in str(caught.value)
    assert isinstance(caught.value, TypeError)


def test_closures_globals_and_defaults_are_searched() -> None:
    lock = threading.Lock()
    cache = FunctionCache()
    with pytest.raises(NotSerializable, match="closes over lock"):
        cache.pickled(lambda: lock, refuse_futures)
    with pytest.raises(NotSerializable, match="default"):
        cache.pickled(lambda it=lock: it, refuse_futures)
    by_global = types.FunctionType((lambda: LOCK).__code__, {"LOCK": lock}, "by_global")
    with pytest.raises(NotSerializable, match="global LOCK"):
        cache.pickled(by_global, refuse_futures)


def test_what_raises_while_it_is_pickled_is_blamed() -> None:
    class Moody:
        def __getstate__(self) -> Any:
            raise RuntimeError("not today")

    with pytest.raises(NotSerializable, match="not today") as caught:
        pickle_call(([Moody()],), {}, refuse_futures, "f")
    assert caught.value.path == "args[0][0]"
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_too_deep_nesting_says_so() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(NotSerializable, match="deep"):
        pickle_call((deep,), {}, refuse_futures, "f")


def test_cycles_are_no_trouble() -> None:
    loop: list[Any] = [LOCK]
    loop.insert(0, loop)
    with pytest.raises(NotSerializable) as caught:
        pickle_call((loop,), {}, refuse_futures, "f")
    assert caught.value.path == "args[0][1]"


plain = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.binary(max_size=5) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


@st.composite
def poisoned(draw: st.DrawFn) -> tuple[Any, str]:
    """A structure with one lock in it, and where."""
    value: Any = LOCK
    path = ""
    for _ in range(draw(st.integers(0, 6))):
        siblings = draw(st.lists(plain, max_size=3))
        match draw(st.sampled_from(["list", "tuple", "dict", "model", "slots"])):
            case "list":
                path = f"[{len(siblings)}]{path}"
                value = [*siblings, value]
            case "tuple":
                path = f"[0]{path}"
                value = (value, *siblings)
            case "dict":
                key = draw(st.text("abc", min_size=1, max_size=3))
                value = {**{f"z{i}": each for i, each in enumerate(siblings)}, key: value}
                path = f"[{key!r}]{path}"
            case "model":
                value, path = Model(siblings, value), f".lock{path}"
            case _:
                value, path = Slotted(value), f".inner{path}"
    return value, path


@given(poisoned(), plain)
def test_the_path_leads_to_the_offender_wherever_it_is(offender: tuple[Any, str], other: Any) -> None:
    value, path = offender
    with pytest.raises(NotSerializable) as caught:
        pickle_call((other, value), {}, refuse_futures, "f")
    assert caught.value.path == f"args[1]{path}"


@given(plain)
def test_what_pickles_comes_back(value: Any) -> None:
    assert call_of(value, k=value) == ((value,), {"k": value})


# --- the function cache ----------------------------------------------------------------------------------------------


def by_value(text: str, **names: Any) -> Callable[..., Any]:
    """A function as a script's `__main__` has it, with these globals."""
    names.update(__name__="__main__")
    exec(text, names)
    made: Callable[..., Any] = names["f"]
    return made


def run(cache: FunctionCache, function: Callable[..., Any], *args: Any) -> Any:
    return pickle.loads(cache.pickled(function, refuse_futures).function.content)(*args)


def test_functions_by_reference_and_plain_ones_by_value_are_pickled_once() -> None:
    cache = FunctionCache()
    for function in (call_of, by_value("def f(x): return x + ONE", ONE=1), by_value("import math\ndef f(): math.pi")):
        assert cache.pickled(function, refuse_futures) is cache.pickled(function, refuse_futures)


def test_changed_globals_closures_and_defaults_are_never_stale() -> None:
    cache = FunctionCache()
    f: Any = by_value("def g(x): return x * K\ndef f(x, y=1): return g(x) + y + C", K=2, C=10)
    assert run(cache, f, 3) == 17
    f.__globals__["C"] = 20
    assert run(cache, f, 3) == 27
    f.__globals__["K"] = 3
    assert run(cache, f, 3) == 30
    f.__defaults__ = (100,)
    assert run(cache, f, 3) == 129
    f.__globals__["g"] = lambda x: 0
    assert run(cache, f, 3) == 120
    f.__code__ = (lambda x, y: x).__code__
    assert run(cache, f, 3) == 3


def test_changed_mutable_objects_are_never_stale() -> None:
    cache = FunctionCache()
    table = {"a": 1}
    f = by_value("def f(): return dict(TABLE)", TABLE=table)
    assert run(cache, f) == {"a": 1}
    table["a"] = 2
    assert run(cache, f) == {"a": 2}
    count = 0

    def read() -> int:
        return count

    counted = types.FunctionType(read.__code__, {"__name__": "__main__"}, "read", None, read.__closure__)
    assert run(cache, counted) == 0
    count = 5
    assert run(cache, counted) == 5


def test_the_cache_keeps_no_function_alive() -> None:
    import gc
    import weakref

    cache = FunctionCache()
    f = by_value("def f(x): return f(x - 1) if x else ONE", ONE=1)
    assert run(cache, f, 3) == 1
    seen = weakref.ref(f)
    f.__globals__.clear()
    del f
    gc.collect()
    assert seen() is None


def test_what_is_not_callable_is_refused() -> None:
    with pytest.raises(TypeError, match="not callable"):
        FunctionCache().pickled(3, refuse_futures)  # type: ignore[arg-type]


def test_large_function_is_a_blob() -> None:
    content = bytes(INLINE_BYTES_MAX)
    pickled = FunctionCache().pickled(lambda: content, refuse_futures)
    assert pickled.function.content == b""
    assert pickled.blob is not None
    assert pickle.loads(pickled.blob)() == content


def test_payload_is_inline_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert payload_of(bytes(INLINE_BYTES_MAX)).blob is None
    large = payload_of(bytes(INLINE_BYTES_MAX + 1))
    assert (large.inline, large.size_bytes) == (b"", INLINE_BYTES_MAX + 1)
    assert large.blob is not None
    monkeypatch.setattr("herder.payload.BLOB_BYTES_MAX", INLINE_BYTES_MAX)
    with pytest.raises(PayloadTooLarge, match="setup"):
        payload_of(bytes(INLINE_BYTES_MAX + 1))


def test_names_of_functions() -> None:
    assert function_name(len) == "len"
    assert function_name(Model.__init__) == "Model.__init__"
    assert function_name(functools.partial(functools.partial(len))) == "partial(len)"
