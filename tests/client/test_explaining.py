"""Explanations in words."""

from __future__ import annotations

from herder.explaining import NODES_SHOWN_MAX, Explanation, lines
from herder_shared.ids import JobId, NodeName
from herder_shared.states import Cause, Outcome, TaskState
from herder_shared.wire.messages import NodeVerdict, PastAttempt

JOB = JobId("00ff00ff00ff00ff")


def test_a_waiting_task_shows_nodes_with_room_first_and_says_how_many_are_left_out() -> None:
    nodes = [NodeVerdict(NodeName(f"n{number}"), False, "0 of 4 cores free") for number in range(NODES_SHOWN_MAX + 3)]
    nodes.append(NodeVerdict(NodeName("last"), True, "has room"))
    told = Explanation(
        JOB, 3, TaskState.PENDING, "turn", "its turn has not come yet", ("5 before it",), nodes=tuple(nodes)
    )
    shown = str(told).splitlines()
    assert shown[0] == f"{JOB}.3 pending: its turn has not come yet"
    assert shown[1:4] == ["  5 before it", "  nodes:", "    last: has room"]
    assert shown[-1] == "    and 4 more"


def test_attempts_are_listed_with_their_times_and_causes() -> None:
    past = PastAttempt(1, NodeName("n1"), Outcome.FAILED, Cause.EXCEPTION, "boom", "fork", 0.5, 0.001, 2.0, 1000, 2000)
    told = Explanation(JOB, 0, TaskState.ENDED, "failed", "it failed", outcome=Outcome.FAILED, attempts=(past,))
    assert lines(told)[-1] == (
        "    1. on n1 (fork), failed; queued 0.5 s, start 0.001 s, ran 2 s, peak 1000 bytes, limit 2000 bytes: boom"
    )
