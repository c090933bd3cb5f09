"""What a running task sees, and what a function says about itself.

A child provides the module `_herder_task`; here is only the door to it, so that this module stays as light as a forked
child needs it. (It is not called `task`: importing a submodule of that name would hide the function `herder.task`.)
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # `typing` is too heavy for a child

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any, TypeVar

    from herder.client import Client

    _F = TypeVar("_F", bound="Callable[..., Any]")

#: Where `task_options` leaves a function's defaults for the client.
OPTIONS_ATTRIBUTE = "__herder_options__"


def shared() -> Any:
    """The value of the workload's `setup`, or None when it has none.

    Raises:
        RuntimeError: not called from inside a task.
    """
    return _task_module("shared").shared()


def task() -> Any:
    """The running task: its id, attempt, node, cpus, gpus and scratch directory.

    Raises:
        RuntimeError: not called from inside a task.
    """
    return _task_module("task").task()


def current_client() -> Client:
    """The running task as a client: it may submit further tasks, and its cores are given up while it waits for them.
    Each call gives a client of its own, to be kept: what is submitted through one makes few jobs.

    What it submits belongs to the task's owner, and starts as the task itself did unless options say otherwise. It
    ends with the task, unless `detached=True`: a task that returns waits for it, one that fails cancels it.

    Raises:
        RuntimeError: not called from inside a task, or its interpreter lacks a package that a client needs.
    """
    module = _task_module("current_client")
    try:
        from herder.task_client import make_client
    except ImportError as error:
        raise RuntimeError(
            f"herder.current_client() needs the package {error.name!r} in the task's interpreter ({sys.executable}): "
            "install Herder there with its dependencies (pip install herder)"
        ) from error
    made: Client = module.client(make_client).fresh()
    return made


def task_options(**options: Any) -> Callable[[_F], _F]:
    """Fix a function's default options: `@herder.task_options(cores=2, retries=3)`.

    They come before the client's own and behind those of `client.options(...)`.

    Raises:
        TypeError: an option that does not exist; the nearest one is named.
    """
    from herder.options import check_options

    check_options(options)

    def decorate(function: _F) -> _F:
        setattr(function, OPTIONS_ATTRIBUTE, {**getattr(function, OPTIONS_ATTRIBUTE, {}), **options})
        return function

    return decorate


def is_in_task() -> bool:
    """Whether the caller runs in a task."""
    module = sys.modules.get("_herder_task")
    return module is not None and module.is_in_task()


def _task_module(name: str) -> ModuleType:
    module = sys.modules.get("_herder_task")
    if module is None:
        raise RuntimeError(f"herder.{name}() works only inside a task: call it in a function which Herder runs")
    return module
