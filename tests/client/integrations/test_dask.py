"""Herder as a scheduler of Dask's: what it asks of a client. (`tests/system/test_graphs.py` computes collections.)"""

from __future__ import annotations

from typing import Any, cast

import pytest

from herder.client import View
from herder.integrations.dask import get
from herder_shared.errors import DependencyFailed


class Graphs:
    """A client that is asked for graphs."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def graph(self, dsk: Any, keys: Any) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer, dsk, keys


def ask(answer: Any) -> Any:
    return get({"a": 1}, ["a"], client=cast("View", Graphs(answer)), num_workers=3, cache=None)


def test_what_dask_tells_other_schedulers_has_no_meaning() -> None:
    assert ask("values") == ("values", {"a": 1}, ["a"])


def test_the_exception_of_the_root_is_raised_as_dask_does() -> None:
    failed = DependencyFailed("task j.0 failed", task_id="j.0")
    failed.__cause__ = LookupError("no")
    failed.add_note("the key 'a'")
    with pytest.raises(LookupError) as caught:
        ask(failed)
    assert caught.value.__notes__ == ["the key 'a'"]


def test_without_a_cause_it_is_raised_as_it_is() -> None:
    with pytest.raises(DependencyFailed):
        ask(DependencyFailed("lost"))
