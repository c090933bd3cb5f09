"""The error tree: one root, attributes that survive pickling, and the picture in the docstring."""

from __future__ import annotations

import pickle
import re

import pytest

from herder_shared import errors
from herder_shared.errors import HerderError, TaskCrashed, TaskOutOfMemory, TaskPoisoned, TaskTimeout, Unreachable

TREE: list[type[HerderError]] = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, HerderError)
]


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_an_error_keeps_message_and_attributes_through_pickling(kind: type[HerderError]) -> None:
    error = kind("what happened", task_id="j.1", node="n1", attempt=2)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert (str(back), back.task_id, back.node, back.attempt) == ("what happened", "j.1", "n1", 2)


def test_errors_that_have_a_cousin_in_the_standard_library_are_that_too() -> None:
    assert issubclass(TaskTimeout, TimeoutError)
    assert issubclass(TaskOutOfMemory, MemoryError)
    assert issubclass(Unreachable, ConnectionError)
    assert issubclass(TaskPoisoned, TaskCrashed)


def test_the_picture_in_the_docstring_is_the_tree() -> None:
    """Each line of the picture: its depth in the tree, and the class's name."""
    assert errors.__doc__ is not None
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in errors.__doc__.splitlines():
        found = re.match(r"    ([│ ├└─]*)([A-Z][A-Za-z]+)", line)
        if found:
            path[len(found[1]) // 4 :] = [found[2]]
            drawn[found[2]] = path[-2] if len(path) > 1 else ""
    actual = {
        kind.__name__: next((b.__name__ for b in kind.__bases__ if issubclass(b, HerderError)), "") for kind in TREE
    }
    assert drawn == actual
