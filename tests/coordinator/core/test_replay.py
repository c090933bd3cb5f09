"""Replaying records needs no decision, and what a cut tail left undone is finished afterwards."""

from __future__ import annotations

import pytest

from herder_coordinator.core import events, records
from herder_coordinator.core.state import new_state
from herder_coordinator.core.step import finish_replay, replay_record
from herder_shared.ids import JobId
from herder_shared.states import Cause, Outcome
from support.core_lab import CLIENT, CLUSTER, JOB, Lab, failed, item


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.client()
    lab.open()
    return lab


def cut(lab: Lab, *kinds: type) -> None:
    """Start anew from a journal whose tail of these records is lost."""
    while isinstance(lab.records[-1], kinds):
        lab.records.pop()
    lab.restart()


def test_a_cancellation_whose_ends_were_lost_is_finished(lab: Lab) -> None:
    lab.submit(3)
    lab.do(events.CancelRequested(CLIENT, JOB, None, running=True))
    cut(lab, records.TasksEnded)
    assert lab.outcomes() == {}
    lab.pass_time(0.5)
    assert set(lab.outcomes().values()) == {Outcome.CANCELLED}


def test_a_dependant_whose_end_was_lost_ends_again(lab: Lab) -> None:
    lab.node(cores=1)
    lab.submit(1)
    other = JobId("job2")
    lab.open(other)
    lab.submit(1, other, items=[item(other, 0, [(JOB, 0)])])
    lab.ended(failed(lab.attempt(), Cause.EXCEPTION))
    last = lab.records.pop()
    assert isinstance(last, records.TasksEnded)
    assert last.job == other
    lab.restart()
    lab.pass_time(0.5)
    assert lab.failure(0, other).cause is Cause.DEPENDENCY_FAILED


def test_assigned_tasks_are_where_they_were_and_nothing_is_due_at_once(lab: Lab) -> None:
    lab.node(cores=1)
    lab.submit(2)
    attempt = lab.attempt()
    lab.restart()
    assert (lab.place(0), lab.attempt(0)) == ("n1", attempt)
    assert lab.pass_time(1.0) == []


def test_the_end_of_a_replay_asks_for_nothing_to_be_persisted(lab: Lab) -> None:
    lab.submit(2)
    state = new_state(CLUSTER, 2)
    for record in lab.records:
        replay_record(state, record)
    assert finish_replay(state, 5.0) == []


def test_another_clusters_records_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        replay_record(new_state(CLUSTER, 1), records.EpochStarted("d" * 32, 1))  # type: ignore[arg-type]
