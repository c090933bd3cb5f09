"""The state tables: complete, and nothing in them that cannot be reached."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import pytest

from herder_shared.states import (
    AGENT_TRANSITIONS,
    INFRASTRUCTURE,
    TASK_TRANSITIONS,
    AgentState,
    Cause,
    Outcome,
    TaskState,
)

TABLES: list[Any] = [(TaskState, TASK_TRANSITIONS), (AgentState, AGENT_TRANSITIONS)]


@pytest.mark.parametrize(("states", "table"), TABLES)
def test_a_table_has_every_state_and_leads_to_every_state_but_the_first(
    states: type[StrEnum], table: dict[StrEnum, frozenset[StrEnum]]
) -> None:
    assert set(table) == set(states)
    reached = frozenset[StrEnum]().union(*table.values())
    assert set(states) - reached <= {next(iter(states))}
    assert all(state not in following for state, following in table.items())


def test_nothing_follows_the_end_of_a_task_and_everything_leads_there() -> None:
    assert TASK_TRANSITIONS[TaskState.ENDED] == frozenset()
    assert all(TaskState.ENDED in TASK_TRANSITIONS[state] for state in TaskState if state is not TaskState.ENDED)


def test_outcomes_are_the_seven_words_of_the_api() -> None:
    words = "succeeded failed crashed out_of_memory timed_out cancelled lost"
    assert [outcome.value for outcome in Outcome] == words.split()


def test_what_lies_with_the_task_is_not_infrastructure() -> None:
    assert not INFRASTRUCTURE & {Cause.EXCEPTION, Cause.SIGNAL, Cause.EXIT, Cause.OUT_OF_MEMORY, Cause.TIMEOUT}
