"""What a repair says that it drops."""

from __future__ import annotations

from coordinator.journal.test_codec import END, JOB
from herder_coordinator.core import records
from herder_coordinator.journal.codec import encode_batch
from herder_coordinator.journal.repair import Dropped
from herder_shared.ids import JobId
from herder_shared.wire.messages import Payload, TaskItem


def test_jobs_whose_tasks_or_ends_are_dropped_are_named() -> None:
    dropped = Dropped()
    assert not dropped
    dropped.begin("batch 7, 500 bytes into the journal")
    dropped.add(7, b"rotten")
    dropped.add(8, encode_batch(8, [records.TasksSubmitted(JobId("new"), 0, None, (TaskItem(Payload(b"")),) * 3)]))
    dropped.add(9, encode_batch(9, [records.TasksEnded(JOB, 4, (END, END)), records.EventsAcked(JOB, 5)]))
    assert dropped
    assert dropped.report()[0] == "damaged: batch 7, 500 bytes into the journal"
    assert dropped.report()[1].startswith("dropped from there on: 3 rows (1 of them unreadable), ")
    assert dropped.report()[2:] == [
        "dropped records: 1 EventsAcked",
        "dropped records: 1 TasksEnded",
        "dropped records: 1 TasksSubmitted",
        f"job {JOB}: 2 ends: these tasks run again",
        "job new: 3 tasks as submitted, 0 ends: submit these again",
    ]
