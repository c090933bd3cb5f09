"""What is said, in which order, and what is said again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from herder.outbox import CANCEL_INDICES_MAX, Batch, Cancel, Close, Open, Outbox
from herder.payload import PickledFunction
from herder_shared.ids import BlobId, JobId, WorkloadKey, blob_id
from herder_shared.limits import BATCH_TASKS_MAX, BLOB_CHUNK_BYTES, BLOB_CHUNKS_IN_FLIGHT
from herder_shared.wire import messages as m

JOB = JobId("j")
FUNCTION = PickledFunction(m.Function(BlobId("f"), b"f"), None, (), False, "f")
SPEC = m.JobSpec(JOB, "name", m.WorkloadSpec(WorkloadKey("w")))


def batch(first: int, count: int = 1, *, blobs: list[bytes] | None = None, python: str = "") -> Batch:
    items = [m.TaskItem(m.Payload(inline=b"x", size_bytes=1)) for _ in range(count)]
    return Batch(JOB, first, FUNCTION, python, items, count, blobs=[(blob_id(each), each) for each in blobs or []])


def submits(messages: list[m.ClientToCoordinator]) -> list[tuple[int, int]]:
    return [(each.first, len(each.tasks)) for each in messages if isinstance(each, m.SubmitTasks)]


def test_neighbours_become_one_message() -> None:
    outbox = Outbox()
    outbox.add(Open(SPEC))
    for index in range(5):
        outbox.add(batch(index))
    messages = outbox.pump()
    assert [type(each) for each in messages] == [m.OpenJob, m.SubmitTasks]
    assert submits(messages) == [(0, 5)]
    assert outbox.pump() == []


def test_messages_stay_below_their_bounds() -> None:
    outbox = Outbox()
    for index in range(BATCH_TASKS_MAX + 1):
        outbox.add(batch(index))
    assert submits(outbox.pump()) == [(0, BATCH_TASKS_MAX), (BATCH_TASKS_MAX, 1)]


def test_other_interpreters_and_gaps_are_other_messages() -> None:
    outbox = Outbox()
    outbox.add(batch(0))
    outbox.add(batch(1, python="3.11/3.1"))
    outbox.add(batch(5))
    assert submits(outbox.pump()) == [(0, 1), (1, 1), (5, 1)]


def test_what_was_not_acknowledged_is_said_again_in_order() -> None:
    outbox = Outbox()
    outbox.add(Open(SPEC))
    outbox.add(batch(0, 2))
    outbox.pump()
    outbox.add(batch(2, 2))
    outbox.add(Cancel(JOB, (1,), True))
    outbox.pump()
    assert [each.first for each in outbox.submit_ok(JOB, 2)] == [0]
    outbox.add(Close(JOB, 4))
    outbox.rewind()
    assert outbox.pump() == [
        m.SubmitTasks(JOB, 2, FUNCTION.function, tuple(batch(2, 2).items)),
        m.CancelTasks(JOB, (1,), True),
        m.CloseJob(JOB, 4),
    ]
    outbox.cancel_ok(JOB, (1,), True)
    outbox.submit_ok(JOB, 4)
    outbox.rewind()
    assert outbox.pump() == [m.CloseJob(JOB, 4)]
    outbox.forget(JOB)
    outbox.rewind()
    assert outbox.pump() == []


def test_futures_that_are_cancelled_one_by_one_make_few_messages() -> None:
    outbox = Outbox()
    for index in range(CANCEL_INDICES_MAX + 2):
        outbox.add(Cancel(JOB, (index,), True))
    outbox.add(Cancel(JOB, (7,), False))
    outbox.add(Cancel(JOB, None, True))
    first, second, third, fourth = outbox.pump()
    assert isinstance(first, m.CancelTasks)
    assert first.indices == tuple(range(CANCEL_INDICES_MAX))
    rest = (CANCEL_INDICES_MAX, CANCEL_INDICES_MAX + 1)
    assert [second, third, fourth] == [
        m.CancelTasks(JOB, rest, True),
        m.CancelTasks(JOB, (7,), False),
        m.CancelTasks(JOB, None, True),
    ]
    outbox.cancel_ok(JOB, first.indices, True)
    outbox.rewind()
    assert outbox.pump() == [second, third, fourth]


def test_a_harder_cancellation_is_said_again_until_it_is_answered_itself() -> None:
    outbox = Outbox()
    outbox.add(Cancel(JOB, None, False))
    outbox.add(Cancel(JOB, None, True))
    outbox.pump()
    for _ in range(2):  # it was said on two connections
        outbox.cancel_ok(JOB, None, False)
        outbox.rewind()
        assert outbox.pump() == [m.CancelTasks(JOB, None, True)]


def test_a_job_of_which_nothing_was_said_is_not_known_to_the_coordinator() -> None:
    outbox = Outbox()
    assert not outbox.is_opened(JOB)  # a user thread has made the job, and its `Open` is still to be added
    outbox.add(Open(SPEC))
    outbox.pump()
    outbox.submit_ok(JOB, 0)
    outbox.forget(JOB)
    assert not outbox.is_opened(JOB)


def test_open_is_known_to_be_heard() -> None:
    outbox = Outbox()
    outbox.add(Open(SPEC))
    assert not outbox.is_opened(JOB)
    outbox.pump()
    assert not outbox.is_opened(JOB)
    outbox.submit_ok(JOB, 0)
    assert outbox.is_opened(JOB)


def test_submission_waits_for_its_blob_and_others_behind_it() -> None:
    outbox = Outbox()
    content = bytes(3 * BLOB_CHUNK_BYTES + 5)
    name = blob_id(content)
    outbox.add(batch(0, blobs=[content]))
    outbox.add(batch(1))
    chunks = outbox.pump()
    assert [(each.offset, len(each.data)) for each in chunks if isinstance(each, m.PutBlob)] == [
        (0, BLOB_CHUNK_BYTES),
        (BLOB_CHUNK_BYTES, BLOB_CHUNK_BYTES),
        (2 * BLOB_CHUNK_BYTES, BLOB_CHUNK_BYTES),
        (3 * BLOB_CHUNK_BYTES, 5),
    ]
    outbox.blob_stored(name, len(content) - 5)
    assert outbox.pump() == []
    outbox.blob_stored(name, len(content))
    assert submits(outbox.pump()) == [(0, 1), (1, 1)]


def test_a_window_of_chunks_is_under_way() -> None:
    outbox = Outbox()
    content = bytes((BLOB_CHUNKS_IN_FLIGHT + 3) * BLOB_CHUNK_BYTES)
    outbox.add(batch(0, blobs=[content]))
    assert len(outbox.pump()) == BLOB_CHUNKS_IN_FLIGHT
    outbox.blob_stored(blob_id(content), 2 * BLOB_CHUNK_BYTES)
    assert len(outbox.pump()) == 2


def test_blobs_start_again_after_a_lost_link() -> None:
    outbox = Outbox()
    content = bytes(BLOB_CHUNK_BYTES + 1)
    outbox.add(batch(0, blobs=[content]))
    outbox.pump()
    outbox.blob_stored(blob_id(content), len(content))
    assert submits(outbox.pump()) == [(0, 1)]
    outbox.rewind()
    first = outbox.pump()[0]
    assert isinstance(first, m.PutBlob)
    assert first.offset == 0
    outbox.blob_wanted(blob_id(content), BLOB_CHUNK_BYTES)
    (last,) = outbox.pump()
    assert isinstance(last, m.PutBlob)
    assert last.offset == BLOB_CHUNK_BYTES


@given(st.lists(st.sampled_from(["add", "pump", "ack", "lose"]), max_size=60), st.data())
def test_everything_arrives_once_and_in_order_however_often_the_link_is_lost(
    steps: list[str], data: st.DataObject
) -> None:
    outbox = Outbox()
    outbox.add(Open(SPEC))
    submitted, known, on_the_way = 0, 0, list[m.ClientToCoordinator]()
    for step in [*steps, "lose", "pump", "ack"]:
        match step:
            case "add":
                outbox.add(batch(submitted, 2))
                submitted += 2
            case "pump":
                on_the_way += outbox.pump()
            case "ack":
                for message in on_the_way:
                    if isinstance(message, m.SubmitTasks):
                        assert message.first <= known, "a gap"
                        known = max(known, message.first + len(message.tasks))
                on_the_way = []
                outbox.submit_ok(JOB, known)
            case _:
                arrived = data.draw(st.integers(0, len(on_the_way)))
                for message in on_the_way[:arrived]:
                    if isinstance(message, m.SubmitTasks):
                        known = max(known, message.first + len(message.tasks))
                on_the_way = []
                outbox.rewind()
    assert known == submitted
