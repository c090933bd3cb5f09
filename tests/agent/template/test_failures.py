"""What a task's failure is told as: exceptions, what cannot be pickled or unpickled, versions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from agent.template import driver


@pytest.fixture(scope="module")
def one_for_all() -> Iterator[driver.Template]:
    with driver.ready() as running:
        yield running


@pytest.fixture
def child(one_for_all: driver.Template) -> Iterator[driver.Child]:
    """A child for one task."""
    yield one_for_all.fork()
    one_for_all.drop_children()


def test_exception_comes_with_its_type_and_a_traceback_of_the_users_frames_only(child: driver.Child) -> None:
    def inner() -> None:
        raise KeyError("lost")

    def outer() -> None:
        inner()

    child.send(outer)
    head, error = child.answer()
    assert head["cause"] == "exception"
    assert head["type"] == "KeyError"
    assert isinstance(error, KeyError)
    assert error.args == ("lost",)
    assert "in outer" in head["traceback"]
    assert "in inner" in head["traceback"]
    assert "herder_agent/template" not in head["traceback"]
    assert head["traceback"].startswith("Traceback (most recent call last):\n")


def test_the_whole_chain_of_causes_and_notes_is_in_the_traceback(child: driver.Child) -> None:
    def chained() -> None:
        try:
            raise ValueError("first")
        except ValueError as first:
            error = TypeError("second")
            error.add_note("a note")
            raise error from first

    child.send(chained)
    head, error = child.answer()
    assert "ValueError: first" in head["traceback"]
    assert "direct cause" in head["traceback"]
    assert "a note" in head["traceback"]
    assert error.__notes__ == ["a note"]


def test_exception_whose_init_takes_other_arguments_comes_back_with_what_it_holds(child: driver.Child) -> None:
    def broken() -> None:
        class Picky(ValueError):
            def __init__(self, code: int, *, detail: str) -> None:
                super().__init__(f"code {code}")
                self.code, self.detail = code, detail

        raise Picky(3, detail="more")

    child.send(broken)
    _, error = child.answer()
    assert isinstance(error, ValueError)
    assert (str(error), error.args) == ("code 3", ("code 3",))
    assert vars(error) == {"code": 3, "detail": "more"}


def test_exception_that_does_not_unpickle_comes_as_text(child: driver.Child) -> None:
    def broken() -> None:
        class Picky(Exception):
            def __reduce__(self) -> tuple[Any, ...]:
                return int, ("not a number",)

        raise Picky("picky text")

    child.send(broken)
    head, error = child.answer()
    assert head["pickled"] == -1
    assert error is None
    assert head["type"].endswith("Picky")
    assert head["message"] == "picky text"


def test_exception_that_holds_what_does_not_pickle_comes_as_text(child: driver.Child) -> None:
    def locked() -> None:
        import threading

        raise RuntimeError("holds a lock", threading.Lock())

    child.send(locked)
    head, _ = child.answer()
    assert head["pickled"] == -1
    assert head["type"] == "RuntimeError"


def test_exception_whose_str_raises_is_still_told(child: driver.Child) -> None:
    def hostile() -> None:
        class Hostile(Exception):
            def __str__(self) -> str:
                raise ZeroDivisionError

        raise Hostile

    child.send(hostile)
    head, _ = child.answer()
    assert head["type"].endswith("Hostile")
    assert "ZeroDivisionError" in head["message"]


def test_endless_recursion_is_a_recursion_error(child: driver.Child) -> None:
    def endless(n: int = 0) -> int:
        return endless(n + 1)

    child.send(endless)
    head, error = child.answer()
    assert isinstance(error, RecursionError)
    assert len(head["traceback"]) < 70_000


def test_keyboard_interrupt_raised_by_the_task_is_its_exception(child: driver.Child) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    child.send(interrupt)
    assert isinstance(child.answer()[1], KeyboardInterrupt)


@pytest.mark.parametrize(("types", "retryable"), [(None, True), ((ValueError,), True), ((OSError, TypeError), False)])
def test_retry_on_is_judged_in_the_child(child: driver.Child, types: Any, retryable: bool) -> None:
    def fail() -> None:
        raise UnicodeError("a ValueError")

    child.send(fail, retry_on=types)
    assert child.answer()[0]["retryable"] is retryable


def test_result_that_does_not_pickle_names_the_object_and_its_path(child: driver.Child) -> None:
    def build() -> dict[str, Any]:
        import threading

        return {"fine": 1, "model": [0, {"lock": threading.Lock()}]}

    child.send(build)
    head, _ = child.answer()
    assert head["cause"] == "not_serializable"
    assert "result['model'][1]['lock']" in head["message"]
    assert "_thread.lock" in head["message"]


def test_result_whose_reduce_raises_is_told(child: driver.Child) -> None:
    def build() -> Any:
        class Broken:
            def __reduce__(self) -> Any:
                raise LookupError("no reduction")

        return Broken()

    child.send(build)
    head, _ = child.answer()
    assert head["cause"] == "not_serializable"
    assert "no reduction" in head["message"]


def test_lambda_and_local_class_come_back_by_value(child: driver.Child) -> None:
    def build() -> Any:
        class Local:
            value = 5

        return Local(), lambda: 7

    made, function = child.run(build)
    assert (made.value, function()) == (5, 7)


def test_missing_module_names_it_and_the_cures(child: driver.Child) -> None:
    child.send(len, raw_function=b"cno_such_module_anywhere\nthing\n.")
    head, _ = child.answer()
    assert head["cause"] == "cannot_unpickle"
    assert "'no_such_module_anywhere' is not importable" in head["message"]
    assert "working_dir" in head["message"]
    assert head["type"] == "ModuleNotFoundError"


def test_arguments_that_do_not_unpickle_are_told(child: driver.Child) -> None:
    child.send(len, raw_args=b"\x80\x05cut short")
    head, _ = child.answer()
    assert head["cause"] == "cannot_unpickle"
    assert "arguments" in head["message"]


def test_version_mismatch_names_both_sides_and_the_cures(child: driver.Child) -> None:
    child.send(len, "abc", python="3.8/2.2")
    head, _ = child.answer()
    assert head["cause"] == "version_mismatch"
    assert "Python 3.8 with cloudpickle 2.2" in head["message"]
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in head["message"]
    assert "Workload(python=...)" in head["message"]


def test_same_version_runs(child: driver.Child, one_for_all: driver.Template) -> None:
    assert child.run(len, "abc", python=one_for_all.ready["python"]) == 3
