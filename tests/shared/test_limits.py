"""The bounds agree with each other."""

from __future__ import annotations

from herder_shared import limits


def test_what_travels_in_one_message_fits_into_one_frame() -> None:
    assert limits.FRAME_BYTES_MAX_HELLO < limits.FRAME_BYTES_MAX
    assert limits.BATCH_BYTES_MAX + limits.INLINE_BYTES_MAX < limits.FRAME_BYTES_MAX
    assert limits.BLOB_CHUNK_BYTES < limits.FRAME_BYTES_MAX
    one_end = (
        limits.INLINE_BYTES_MAX * 2
        + limits.ERROR_TEXT_BYTES_MAX * 2
        + 2 * (limits.LOG_HEAD_BYTES + limits.LOG_TAIL_BYTES)
        + limits.STDERR_TAIL_BYTES
    )
    assert one_end < limits.FRAME_BYTES_MAX


def test_a_sender_that_keeps_to_its_bounds_is_not_dropped_for_them() -> None:
    assert limits.UNACKED_SUBMIT_BYTES_MAX < limits.SEND_BUFFER_BYTES_MAX
    assert limits.BLOB_CHUNKS_IN_FLIGHT * limits.BLOB_CHUNK_BYTES < limits.SEND_BUFFER_BYTES_MAX


def test_several_heartbeats_fit_into_a_lease_and_a_lease_into_the_grace_of_a_restart() -> None:
    assert limits.HEARTBEAT_S * 5 <= limits.LEASE_S
    assert limits.LEASE_S * 2 <= limits.RESTART_GRACE_S
    assert limits.BACKOFF_S_MIN < limits.BACKOFF_S_MAX < limits.LEASE_S
    assert limits.SELF_STALL_S < limits.HEARTBEAT_S
