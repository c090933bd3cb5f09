"""A query is answered once, whatever happens to the link on which it was asked."""

from __future__ import annotations

import concurrent.futures

import pytest

import herder
from herder.questions import Questions, error_named
from herder_shared.wire.messages import Answer, ClientToCoordinator, Query


def _question(number: int) -> ClientToCoordinator:
    return Query(number, "status")


def test_what_is_not_answered_is_asked_again_and_answered_once() -> None:
    questions = Questions()
    first, second = concurrent.futures.Future[Answer](), concurrent.futures.Future[Answer]()
    assert questions.ask(_question, first) == _question(1)
    assert questions.ask(_question, second) == _question(2)
    assert questions.again() == [_question(1), _question(2)]
    questions.answered(Answer(1, count=1))
    questions.answered(Answer(1, message="said twice"))
    assert first.result(0) == Answer(1, count=1)
    assert questions.again() == [_question(2)]
    assert not second.done()


def test_at_the_end_nobody_waits_on() -> None:
    questions, answered = Questions(), concurrent.futures.Future[Answer]()
    questions.ask(_question, answered)
    questions.give_up(herder.Unreachable("gone"))
    assert questions.again() == []
    with pytest.raises(herder.Unreachable, match="gone"):
        answered.result(0)


def test_an_error_is_raised_as_the_class_that_was_named() -> None:
    assert type(error_named("JobNotFound", "no such job")) is herder.JobNotFound
    assert type(error_named("Exception", "of a newer version")) is herder.HerderError
