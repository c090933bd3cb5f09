"""Joining and cutting messages never changes what they say."""

from __future__ import annotations

from herder_coordinator.server.coalesce import coalesce, halve
from herder_shared.ids import AttemptId, JobId
from herder_shared.limits import BATCH_BYTES_MAX
from herder_shared.states import Outcome
from herder_shared.wire import messages as m
from support.coordinators import FUNCTION, JOB

OTHER = JobId("feedfeedfeedfeed")


def end(index: int, size_bytes: int = 0) -> m.TaskEnd:
    return m.TaskEnd(index, Outcome.SUCCEEDED, m.Payload(inline=bytes(size_bytes)))


def start(n: int) -> m.AttemptStart:
    return m.AttemptStart(AttemptId(1, n), JOB, n, 1, FUNCTION.id, m.Payload())


def test_neighbouring_ends_of_one_job_are_joined() -> None:
    sent: list[m.Message] = [m.TasksEnded(JOB, 0, (end(3),)), m.TasksEnded(JOB, 1, (end(1), end(2)))]
    assert coalesce(sent) == [m.TasksEnded(JOB, 0, (end(3), end(1), end(2)))]


def test_ends_with_a_gap_or_of_another_job_are_not_joined() -> None:
    sent: list[m.Message] = [
        m.TasksEnded(JOB, 0, (end(0),)),
        m.TasksEnded(JOB, 5, (end(5),)),
        m.TasksEnded(OTHER, 6, (end(6),)),
    ]
    assert coalesce(sent) == sent


def test_order_between_kinds_is_kept() -> None:
    sent: list[m.Message] = [m.SubmitOk(JOB, 1), m.CancelOk(JOB), m.SubmitOk(JOB, 2)]
    assert coalesce(sent) == sent


def test_of_acknowledged_submissions_the_highest_counts() -> None:
    assert coalesce([m.SubmitOk(JOB, 1), m.SubmitOk(JOB, 7), m.SubmitOk(OTHER, 2)]) == [
        m.SubmitOk(JOB, 7),
        m.SubmitOk(OTHER, 2),
    ]


def test_orders_of_one_session_are_joined_with_what_they_carry() -> None:
    first = m.StartAttempts(4, (start(1),), functions=(FUNCTION,))
    assert coalesce([first, m.StartAttempts(4, (start(2),))]) == [
        m.StartAttempts(4, (start(1), start(2)), functions=(FUNCTION,))
    ]
    assert len(coalesce([first, m.StartAttempts(5, (start(2),))])) == 2


def test_other_lists_are_joined() -> None:
    one, two = AttemptId(1, 1), AttemptId(1, 2)
    assert coalesce([m.AckAttempts((one,)), m.AckAttempts((two,))]) == [m.AckAttempts((one, two))]
    assert coalesce([m.CancelAttempts((one,)), m.CancelAttempts((two,))]) == [m.CancelAttempts((one, two))]
    apart: list[m.Message] = [m.CancelAttempts((one,)), m.CancelAttempts((two,), waiting_only=True)]
    assert coalesce(apart) == apart
    assert coalesce([apart[1], m.CancelAttempts((one,), waiting_only=True)]) == [
        m.CancelAttempts((two, one), waiting_only=True)
    ]
    assert coalesce([m.ForgetJobs((JOB,)), m.ForgetJobs((OTHER,))]) == [m.ForgetJobs((JOB, OTHER))]
    started: list[m.Message] = [m.TasksStarted(JOB, ((n, "n"),)) for n in range(2)]  # type: ignore[arg-type]
    assert coalesce(started) == [m.TasksStarted(JOB, ((0, "n"), (1, "n")))]  # type: ignore[arg-type]


def test_joined_messages_stay_below_the_batch_limit() -> None:
    half = BATCH_BYTES_MAX // 2 - 1000
    sent: list[m.Message] = [m.TasksEnded(JOB, n, (end(n, half),)) for n in range(4)]
    joined = coalesce(sent)
    assert [len(one.ends) for one in joined if isinstance(one, m.TasksEnded)] == [2, 2]


def test_halves_say_the_same() -> None:
    ends = m.TasksEnded(JOB, 4, tuple(map(end, range(5))))
    halves = halve(ends)
    assert halves is not None
    assert coalesce(halves) == [ends]
    order = m.StartAttempts(4, (start(1), start(2)), functions=(FUNCTION,))
    cut = halve(order)
    assert cut is not None
    assert coalesce(cut) == [order]


def test_a_single_task_cannot_be_halved() -> None:
    assert halve(m.TasksEnded(JOB, 0, (end(0),))) is None
    assert halve(m.SubmitOk(JOB, 1)) is None
