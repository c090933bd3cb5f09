"""Identities: their spelling, their order."""

from __future__ import annotations

import pytest

from herder_shared.ids import AttemptId, JobId, blob_id, parse_task_id, task_id


def test_a_task_id_reads_back() -> None:
    assert task_id(JobId("3f9a"), 17) == "3f9a.17"
    assert parse_task_id("3f9a.17") == (JobId("3f9a"), 17)


@pytest.mark.parametrize("text", ["", "3f9a", ".17", "3f9a.", "3f9a.-1", "3f9a.x", "3f9a. 1"])
def test_what_is_no_task_id_is_a_value_error_that_shows_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"<job>\.<index>"):
        parse_task_id(text)


def test_attempts_of_a_later_life_come_after_all_of_an_earlier_one() -> None:
    assert AttemptId(1, 10**9) < AttemptId(2, 1) < AttemptId(2, 2)
    assert str(AttemptId(2, 7)) == "2.7"


def test_a_blob_is_named_by_its_content_in_whatever_buffer() -> None:
    assert blob_id(b"x") == blob_id(bytearray(b"x")) == blob_id(memoryview(b"x"))
    assert blob_id(b"x") != blob_id(b"y")
    assert len(blob_id(b"")) == 40
