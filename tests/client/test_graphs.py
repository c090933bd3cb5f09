"""Graphs as tasks, by an executor which runs each at once and moves everything in bytes, as a cluster would."""

from __future__ import annotations

import concurrent.futures
import pickle
import sys
from collections.abc import Callable, Iterator
from operator import add, mul, neg
from typing import Any, cast

import pytest

from herder.client import View
from herder.graphs import compute_graph
from herder.payload import PickledFunction, Ready, pickle_call, refuse_futures
from herder_agent.template import seen


class Done(concurrent.futures.Future[Any]):
    task_id = ""


class AtOnce:
    """Runs what is submitted at once."""

    def __init__(self) -> None:
        self.count = 0
        self.cancelled = 0
        self.over = 0

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Done:
        future = Done()
        future.task_id = f"job.{self.count}"
        self.count += 1
        content = pickle_call((function, args), {}, lambda each: Ready(each.result()), "a graph").content
        (sent, arguments), _ = pickle.loads(content)
        try:
            future.set_result(sent(*arguments))
        except Exception as error:  # noqa: BLE001 - as a task: whatever it is
            future.set_exception(error)
        return future

    def cancel_all(self) -> None:
        self.cancelled += 1

    def shutdown(self, wait: bool = True) -> None:
        assert not wait
        self.over += 1


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch) -> Iterator[AtOnce]:
    monkeypatch.setitem(sys.modules, "_herder_task", seen)
    view = AtOnce()
    yield view
    assert view.over == 1


def compute(view: AtOnce, dsk: Any, keys: Any) -> Any:
    return compute_graph(cast("View", view), dsk, keys)


def total(numbers: list[int]) -> int:
    return sum(numbers)


def test_keys_are_replaced_by_values_anywhere(view: AtOnce) -> None:
    dsk = {
        "one": 1,
        ("two", 0): (add, "one", "one"),
        "alias": ("two", 0),
        "list": ["one", ["alias", 5]],
        "sum": (total, ["one", ("two", 0), "alias", 10]),
        "nested": (add, (neg, "one"), (mul, ("two", 0), (add, "sum", 1))),
        "of lists": (total, [(add, "one", 1), "alias"]),
        "listed": [(neg, "one"), "one"],
    }
    keys = ["one", [("two", 0), "alias"], "list", ["sum", "nested", "of lists", "listed"]]
    assert compute(view, dsk, keys) == [1, [2, 2], [1, [2, 5]], [15, 31, 4, [-1, 1]]]
    assert view.count == 5
    assert not view.cancelled


def test_only_what_is_needed_is_run(view: AtOnce) -> None:
    assert compute(view, {"a": (add, 1, 2), "b": (neg, "a"), "c": (1 / 1).__truediv__}, "a") == 3
    assert view.count == 1


def test_what_looks_like_a_task_and_is_none_is_itself(view: AtOnce) -> None:
    dsk: dict[str, Any] = {"a": (1, 2), "b": (len, ("x", "y")), "c": {"a": 1}, "d": (len, [[1], {}]), "e": ()}
    assert compute(view, dsk, list(dsk)) == [(1, 2), 2, {"a": 1}, 2, ()]


def test_a_long_chain_needs_no_deep_stack(view: AtOnce) -> None:
    dsk: dict[str, Any] = {"0": 0, **{str(n): (add, str(n - 1), 1) for n in range(1, 3000)}}
    assert compute(view, dsk, "2999") == 2999


@pytest.mark.parametrize(
    ("dsk", "keys", "error", "message"),
    [
        ({"a": 1}, "b", KeyError, "'b' is not a key"),
        ({"a": 1}, ["a", ["b"]], KeyError, "'b' is not a key"),
        ({"a": (neg, "b"), "b": (neg, "c"), "c": (neg, "b")}, "a", ValueError, "'b' needs 'c' needs 'b'"),
        ({"a": "a"}, "a", ValueError, "'a' needs 'a'"),
        ([1], "a", TypeError, "not a list"),
    ],
)
def test_what_is_no_graph_is_refused(dsk: Any, keys: Any, error: type[Exception], message: str) -> None:
    view = AtOnce()
    with pytest.raises(error, match=message):
        compute(view, dsk, keys)
    assert not view.count


def test_a_failure_names_its_key_and_cancels_the_rest(view: AtOnce) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        compute(view, {"a": (divmod, 1, 0), "b": (neg, 1)}, ["a", "b"])
    assert caught.value.__notes__ == ["It is the task of the graph's key 'a'."]
    assert view.cancelled == 1


def test_a_function_of_ours_is_no_code_by_value() -> None:
    from herder.graphs import _COMPUTE
    from herder.payload import FunctionCache

    pickled: PickledFunction = FunctionCache().pickled(_COMPUTE, refuse_futures)
    assert not pickled.code_by_value
    assert pickled.name == "graph"


# --- Dask's own classes ----------------------------------------------------------------------------------------------


def test_graphs_of_newer_dask(view: AtOnce) -> None:
    from dask import _task_spec as spec

    dsk = {
        "a": spec.DataNode("a", 1),
        "b": spec.Task("b", add, spec.TaskRef("a"), 2),
        "c": spec.Alias("c", "b"),
        "d": spec.Task("d", total, spec.List(spec.TaskRef("a"), spec.TaskRef("c"), spec.Task("x", neg, 1))),
        "e": (add, "d", "a"),
        "f": ["a", "e"],
    }
    assert compute(view, dsk, ["c", "d", "e", "f"]) == [3, 3, 4, [1, 4]]
