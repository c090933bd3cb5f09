"""A Dask-style graph as tasks: what of it is needed, in which order, with futures in place of keys.

A graph is a mapping of keys to what they stand for: a tuple whose first element is callable is a task, a list is a list
of such things, anything hashable that is a key refers to it, and all else is itself. Newer Dask has classes for tasks
instead (`dask._task_spec`): where one is found, the graph is read as Dask itself reads it. Each key that stands for a
task becomes one task of Herder's; tasks inside tasks are computed in the process of the outer one.
"""

from __future__ import annotations

import concurrent.futures
import operator
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from herder.payload import TASK_MODULE
from herder_shared.errors import DependencyFailed

if TYPE_CHECKING:
    from herder.client import View
    from herder.futures import Future


def compute_graph(view: View, dsk: Mapping[Any, Any], keys: Any) -> Any:
    """Run what `keys` need through a view of its own; values in the structure of `keys`.

    Raises:
        KeyError: a key that is not in the graph.
        ValueError: the graph has a cycle.
        Exception: as the task of a key raised it, or `DependencyFailed`; a note names the keys. What else of the graph
            has not ended is cancelled.
    """
    run = _Run(view, _read(dsk))
    wanted = list(_flat(keys))
    try:
        run.submit(wanted)
        run.wait()
        return _shaped(keys, run.value)
    except BaseException:
        run.cancel()
        raise
    finally:
        view.shutdown(wait=False)


class _Nested:
    """A task inside a task. Pickles as what `_herder_task.compute` computes."""

    def __init__(self, function: Callable[..., Any], arguments: list[Any]) -> None:
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> Any:
        return operator.methodcaller("nested", self.function, self.arguments), (TASK_MODULE,)


class _Compute:
    """Stands here for the function `compute` of the module `_herder_task`, and unpickles as it."""

    __qualname__ = "graph"

    def __call__(self, nested: _Nested) -> Any:
        raise AssertionError(f"{nested} is computed in a task")

    def __reduce__(self) -> Any:
        return operator.attrgetter("compute"), (TASK_MODULE,)


class _Listed:
    """As `_Compute`, for a list that holds tasks."""

    def __call__(self, *items: Any) -> list[Any]:
        return list(items)

    def __reduce__(self) -> Any:
        return operator.attrgetter("listed"), (TASK_MODULE,)


_COMPUTE = _Compute()
_LISTED = _Listed()


class _Run:
    """One computation of a graph."""

    def __init__(self, view: View, graph: dict[Any, Any]) -> None:
        self._view = view
        self._graph = graph
        #: What stands for each key in the arguments of those that depend on it: a value with futures in it.
        self._built: dict[Any, Any] = {}
        self._futures: list[Future[Any]] = []
        self._keys: dict[str, Any] = {}

    def submit(self, wanted: list[Any]) -> None:
        """Submit what is needed, dependencies first. Only what is wanted in the end is kept."""
        order = _order(self._graph, wanted)
        left = dict.fromkeys(wanted, 1)
        for key in order:
            for needed in _needs(self._graph, key):
                left[needed] = left.get(needed, 0) + 1
        for key in order:
            self._built[key] = self._build_key(key)
            for needed in _needs(self._graph, key):
                left[needed] -= 1
                if not left[needed]:
                    del self._built[needed]
        self._futures = [future for key in dict.fromkeys(wanted) for future in _futures_in(self._built[key])]

    def wait(self) -> None:
        """Until all is there, or something failed, which is raised."""
        concurrent.futures.wait(self._futures, return_when=concurrent.futures.FIRST_EXCEPTION)
        for future in self._futures:
            if future.done() and (future.cancelled() or future.exception() is not None):
                self._raise(future)

    def value(self, key: Any) -> Any:
        """Of a key that was wanted."""
        return _with_values(self._built[key])

    def cancel(self) -> None:
        """End what has not ended."""
        self._view.cancel_all()

    def _build_key(self, key: Any) -> Any:
        node = self._graph[key]
        if _is_spec(node):
            return self._build_spec(key, node)
        if not _is_task(node):
            built = self._build(node)
            return self._submit(key, _COMPUTE, [built]) if isinstance(built, _Nested) else built
        arguments = [self._build(argument) for argument in node[1:]]
        if any(isinstance(argument, _Nested) for argument in arguments):
            return self._submit(key, _COMPUTE, [_Nested(node[0], arguments)])
        return self._submit(key, node[0], arguments)

    def _build_spec(self, key: Any, node: Any) -> Any:
        spec = sys.modules["dask._task_spec"]
        if isinstance(node, spec.DataNode):
            return node.value
        if isinstance(node, spec.Alias):
            return self._built[node.target]
        return self._submit(key, node, [{needed: self._built[needed] for needed in node.dependencies}])

    def _build(self, expression: Any) -> Any:
        if type(expression) is list:
            items = [self._build(item) for item in expression]
            return _Nested(_LISTED, items) if any(isinstance(item, _Nested) for item in items) else items
        if _is_task(expression):
            return _Nested(expression[0], [self._build(argument) for argument in expression[1:]])
        return self._built[expression] if _is_key(expression, self._graph) else expression

    def _submit(self, key: Any, function: Callable[..., Any], arguments: list[Any]) -> Future[Any]:
        future = self._view.submit(function, *arguments)
        self._keys[future.task_id] = key
        return future

    def _raise(self, future: Future[Any]) -> None:
        key = self._keys.get(future.task_id)
        if future.cancelled():
            raise concurrent.futures.CancelledError(f"the task of the graph's key {key!r} was cancelled")
        error = future.exception()
        assert error is not None
        root = self._keys.get(error.task_id or "") if isinstance(error, DependencyFailed) else key
        error.add_note(
            f"It is the task of the graph's key {key!r}"
            + (f"; what failed first is that of the key {root!r}." if root is not key and root is not None else ".")
        )
        raise error


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(dsk: Any) -> dict[Any, Any]:
    """The graph as a plain dict, all of one kind."""
    if hasattr(dsk, "__dask_graph__"):
        dsk = dsk.__dask_graph__()
    if not isinstance(dsk, Mapping):
        raise TypeError(f"a graph is a mapping of keys to tasks, not a {type(dsk).__name__}")
    graph = dict(dsk)
    if any(_is_spec(node) for node in graph.values()):
        converted: dict[Any, Any] = sys.modules["dask._task_spec"].convert_legacy_graph(graph)
        return converted
    return graph


def _is_spec(node: Any) -> bool:
    """Of Dask's own classes; whoever made one has imported their module."""
    spec = sys.modules.get("dask._task_spec")
    return spec is not None and isinstance(node, spec.GraphNode)


def _is_task(expression: Any) -> bool:
    return type(expression) is tuple and bool(expression) and callable(expression[0])


def _is_key(expression: Any, graph: Mapping[Any, Any]) -> bool:
    if not isinstance(expression, Hashable):
        return False
    try:
        return expression in graph
    except TypeError:  # a tuple of what cannot be hashed
        return False


def _needs(graph: Mapping[Any, Any], key: Any) -> tuple[Any, ...]:
    """The keys which the one of `key` refers to."""
    node = graph[key]
    if _is_spec(node):
        return tuple(node.dependencies)
    found: dict[Any, None] = {}
    left = [node]
    while left:
        expression = left.pop()
        if type(expression) is list:
            left.extend(expression)
        elif _is_task(expression):
            left.extend(expression[1:])
        elif _is_key(expression, graph):
            found[expression] = None
    return tuple(found)


def _order(graph: Mapping[Any, Any], wanted: list[Any]) -> list[Any]:
    """All keys that are needed, each behind those that it needs."""
    order: dict[Any, None] = {}
    way: dict[Any, Iterator[Any]] = {}
    for first in wanted:
        if not _is_key(first, graph):
            raise KeyError(f"{first!r} is not a key of the graph")
        if first in order:
            continue
        way[first] = iter(_needs(graph, first))
        while way:
            key = next(reversed(way))
            needed = next((each for each in way[key] if each not in order), None)
            if needed is None:
                del way[key]
                order[key] = None
            elif needed in way:
                circle = [*list(way)[list(way).index(needed) :], needed]
                raise ValueError(f"the graph has a cycle: {' needs '.join(map(repr, circle))}")
            elif needed not in graph:
                raise KeyError(f"{needed!r}, which the graph's key {key!r} needs, is not in the graph")
            else:
                way[needed] = iter(_needs(graph, needed))
    return list(order)


# --- structures ------------------------------------------------------------------------------------------------------


def _flat(keys: Any) -> Iterator[Any]:
    if isinstance(keys, list):
        for each in keys:
            yield from _flat(each)
    else:
        yield keys


def _shaped(keys: Any, value: Callable[[Any], Any]) -> Any:
    return [_shaped(each, value) for each in keys] if isinstance(keys, list) else value(keys)


def _futures_in(built: Any) -> Iterator[Future[Any]]:
    if isinstance(built, list):
        for item in built:
            yield from _futures_in(item)
    elif isinstance(built, concurrent.futures.Future):
        yield built  # type: ignore[misc]


def _with_values(built: Any) -> Any:
    if isinstance(built, list):
        return [_with_values(item) for item in built]
    return built.result() if isinstance(built, concurrent.futures.Future) else built
