"""Batches come back as they were written, or not at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herder_coordinator.core import records
from herder_coordinator.journal.codec import DamagedBatch, decode_batch, encode_batch, encode_rows, encode_snapshot
from herder_shared.ids import AttemptId, BlobId, ClusterId, Incarnation, JobId, NodeName, WorkloadKey
from herder_shared.states import Cause, Outcome, TaskState
from herder_shared.wire.messages import (
    Failure,
    Function,
    JobInfo,
    JobSpec,
    Key,
    PastAttempt,
    Payload,
    TaskEnd,
    TaskItem,
    WorkloadSpec,
)

JOB = JobId("3f9a0c1d2e4b5a69")
SPEC = JobSpec(JOB, "digits", WorkloadSpec(WorkloadKey("w1")))
END = TaskEnd(3, Outcome.FAILED, None, Failure(cause=Cause.EXCEPTION, message="boom"))
PAST = PastAttempt(1, NodeName("n1"), Outcome.FAILED, Cause.EXCEPTION, "boom")
ONE_OF_EACH: list[records.Record] = [
    records.EpochStarted(ClusterId("c" * 32), 7),
    records.JobOpened(Incarnation("client"), "me", SPEC),
    records.FunctionKept(Function(BlobId("f"), b"code")),
    records.FunctionsDropped((BlobId("f"),)),
    records.TasksSubmitted(JOB, 0, None, (TaskItem(Payload(b"args"), ((JOB, 1),)),), "3.11/3.1"),
    records.JobClosed(JOB),
    records.TasksReset(JOB, (3,)),
    records.JobChanged(JOB, paused=True, priority=3),
    records.CancelRequested(JOB, (1, 2), running=True),
    records.AttemptsAssigned(
        NodeName("n1"), Incarnation("i1"), (records.Assignment(JOB, 0, AttemptId(7, 1), 1, fresh=True),)
    ),
    records.TasksRetried(
        (
            records.Retry(
                JOB, 0, AttemptId(7, 1), 1, 0, 1, (NodeName("n1"),), backoff_s=0.5, memory_bytes=9, past=(PAST,)
            ),
        )
    ),
    records.TasksEnded(JOB, 4, (END,)),
    records.EventsAcked(JOB, 5),
    records.JobForgotten(JOB),
    records.DrainSet(NodeName("n1"), on=True),
    records.KeysRevoked((Key("5e1a", "agent", "n1"),)),
    records.SharesKept((("me", 80_000),), ((JOB, 40_000),)),
    records.WorkloadDemoted(WorkloadKey("w1"), "two died"),
    records.JobRestored(Incarnation("client"), "me", SPEC, 5, closed=True),
    records.TasksRestored(JOB, 0, None, (None, TaskItem(Payload(b"args"))), "", b"\1\0"),
    records.EndsRestored(JOB, (END,)),
    records.EndsRemembered(JOB, (END,)),
    records.SpentKept(JOB, (records.SpentTask(3, TaskItem(Payload(b"args")), None, "", AttemptId(7, 1), 1),)),
    records.DependencyKept(JOB, 1, Payload(b"value")),
    records.CancelKept(JOB, (1,), running=False),
    records.JobSummarized(JobInfo(JOB, "digits", "me", "auto", "done", {TaskState.ENDED: 3})),
]


def test_every_kind_of_record_comes_back_equal() -> None:
    assert {type(record) for record in ONE_OF_EACH} == set(records.Record.__args__)
    assert decode_batch(9, encode_batch(9, ONE_OF_EACH)) == ONE_OF_EACH


def test_the_encoded_form_is_the_one_that_older_versions_wrote() -> None:
    # Changed only by adding fields with defaults at the end: what is on disk must stay readable.
    assert encode_batch(1, [records.EventsAcked(JobId("j"), 2)])[12:] == b"\x91\x93\xabEventsAcked\xa1j\x02"
    assert (
        encode_batch(1, [records.AttemptsAssigned(NodeName("n"), Incarnation("i"), ())])[12:]
        == b"\x91\x94\xb0AttemptsAssigned\xa1n\xa1i\x90"
    )
    assert (
        encode_batch(1, [records.KeysRevoked((Key("5e", "agent", "n"),))])[12:]
        == b"\x91\x92\xabKeysRevoked\x91\x83\xa6serial\xa25e\xa4role\xa5agent\xa4name\xa1n"
    )
    assert (
        encode_batch(1, [records.SharesKept((("me", 9),), ((JobId("j"), 8),))])[12:]
        == b"\x91\x93\xaaSharesKept\x91\x92\xa2me\x09\x91\x92\xa1j\x08"
    )


def test_a_snapshot_is_written_as_anything_else_a_row_at_a_time() -> None:
    assert list(encode_snapshot(5, iter(ONE_OF_EACH))) == list(encode_rows(5, ONE_OF_EACH))
    large = [records.TasksRestored(JOB, 0, None, (TaskItem(Payload(bytes(3_000_000))),), "", b"\0")] * 5
    rows = encode_snapshot(5, iter([*large, *ONE_OF_EACH]))
    assert [(number, len(decode_batch(number, content))) for number, content in rows] == [
        (5, 2),
        (6, 2),
        (7, 1 + len(ONE_OF_EACH)),
    ]


@pytest.mark.parametrize("length", range(0, 120, 7))
def test_a_batch_that_is_cut_is_refused(length: int) -> None:
    content = encode_batch(1, ONE_OF_EACH)
    with pytest.raises(DamagedBatch):
        decode_batch(1, content[:length])


@given(place=st.integers(min_value=0), flip=st.integers(min_value=1, max_value=255))
def test_a_batch_with_any_byte_changed_is_refused(place: int, flip: int) -> None:
    content = bytearray(encode_batch(1, ONE_OF_EACH))
    content[place % len(content)] ^= flip
    with pytest.raises(DamagedBatch):
        decode_batch(1, bytes(content))


def test_a_batch_in_the_place_of_another_is_refused() -> None:
    with pytest.raises(DamagedBatch, match="batch 2 stands where batch 1 should be"):
        decode_batch(1, encode_batch(2, ONE_OF_EACH))
