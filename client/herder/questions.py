"""Queries on their way: each is asked again on every new link until it is answered. No I/O, no clock."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable

from herder_shared import errors
from herder_shared.errors import HerderError
from herder_shared.wire.messages import Answer, ClientToCoordinator

#: The message that asks, made of the number by which its answer is known.
Question = Callable[[int], ClientToCoordinator]


class Questions:
    """What was asked and is not answered."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Question, concurrent.futures.Future[Answer]]] = {}
        self._count = 0

    def ask(self, question: Question, answered: concurrent.futures.Future[Answer]) -> ClientToCoordinator:
        """The message to send; `answered` gets its answer."""
        self._count += 1
        self._open[self._count] = (question, answered)
        return question(self._count)

    def again(self) -> list[ClientToCoordinator]:
        """There is a new link: what to ask on it."""
        return [question(number) for number, (question, _) in self._open.items()]

    def answered(self, answer: Answer) -> None:
        """An answer came. A second one, to what was asked twice, is passed over."""
        _, answered = self._open.pop(answer.id, (None, None))
        if answered is not None:
            answered.set_result(answer)

    def give_up(self, error: HerderError) -> None:
        """Nothing will be answered any more."""
        for _, answered in self._open.values():
            answered.set_exception(error)
        self._open.clear()


def error_named(name: str, message: str) -> HerderError:
    """The error class that a coordinator named."""
    cls = getattr(errors, name, HerderError)
    if not (isinstance(cls, type) and issubclass(cls, HerderError)):
        cls = HerderError
    error: HerderError = cls(message)
    return error
