"""Which tasks and jobs are shown, and how a job or a task of it is named."""

from __future__ import annotations

import click
import msgspec
import pytest
from click.testing import CliRunner

from herder.cli.jobs import failed_count, interesting, job_row, parse_job_or_task, progress_text, state_of
from herder.cli.main import cli
from herder.cli.nodes import node_row, remarks, running_on
from herder_shared.ids import JobId, NodeName
from herder_shared.states import AgentState, Outcome, TaskState
from herder_shared.wire.messages import JobInfo, NodeFacts, NodeInfo, NodeReport, TaskInfo

JOB = JobInfo(
    JobId("00ff"),
    "fits",
    "ann",
    "auto",
    "failed",
    counts={TaskState.ENDED: 4},
    outcomes={Outcome.SUCCEEDED: 1, Outcome.CRASHED: 2, Outcome.CANCELLED: 1},
    tasks=4,
    age_s=3.0,
)


def test_failed_count_is_of_all_that_did_not_succeed() -> None:
    assert failed_count(JOB) == 3
    assert job_row(JOB) == ("00ff", "fits", "ann", "failed", "4", "4", "3", "3.0 s")
    assert progress_text(JOB) == "4 of 4 tasks ended, 3 not well"


def test_tasks_that_did_not_end_well_are_shown_first_then_running_ones() -> None:
    tasks = [TaskInfo(index, TaskState.ENDED, Outcome.SUCCEEDED) for index in range(30)]
    tasks += [TaskInfo(30, TaskState.RUNNING), TaskInfo(31, TaskState.ENDED, Outcome.FAILED)]
    shown = [task.index for task in interesting(tasks)]
    assert shown[:3] == [31, 30, 0]
    assert len(shown) == 20


def test_job_or_task_is_read() -> None:
    assert parse_job_or_task("00ff") == ("00ff", None)
    assert parse_job_or_task("00ff.17") == ("00ff", 17)
    with pytest.raises(click.BadParameter):
        parse_job_or_task("00ff.x")


def test_node_without_a_report_is_shown_all_the_same() -> None:
    node = NodeInfo(NodeFacts(NodeName("n1"), 4, 2**30, host="h"), AgentState.READY, 1, 1.5)
    assert node_row(node) == ("n1", "ready", "4", "1", "2.5", "1.0 GiB", "-", "-", "0 ms ago", "h")


def test_share_of_a_node_is_that_of_its_tasks_code() -> None:
    report = NodeReport({"task": 3.0, "idle": 1.0}, memory_used_bytes=0)
    node = NodeInfo(NodeFacts(NodeName("n1"), 4, 2**30), AgentState.READY, report=report)
    assert node_row(node)[7] == "75.0 %"


def test_nothing_runs_on_a_lost_node() -> None:
    facts = NodeFacts(NodeName("n1"), 4, 0)
    assert running_on([NodeInfo(facts, AgentState.LOST, 3)], "n1") == 0
    assert running_on([NodeInfo(facts, AgentState.DRAINING, 3)], "n1") == 3
    assert running_on([NodeInfo(facts, AgentState.DRAINING, 3)], "n2") == 0


def test_undone_drain_cannot_be_waited_for() -> None:
    assert CliRunner().invoke(cli, ["drain", "n1", "--undo", "--wait"]).exit_code == 2


def test_what_else_is_to_be_said_of_a_node() -> None:
    facts = NodeFacts(NodeName("n1"), 4, 2**30)
    assert remarks(NodeInfo(facts, AgentState.READY)) == []
    told = NodeInfo(
        facts,
        AgentState.DRAINING,
        kept_for="job1",
        ends_in_s=90.0,
        why="the disk is full",
        suspect="job2.7",
        report=NodeReport(fault="the disk is full"),
    )
    assert remarks(told) == [
        "takes nothing new: the disk is full",
        "is ours for another 1 min 30 s",
        "is kept for a task of job job1, which would wait for ever otherwise",
        "runs job2.7, which may have cost another node",
    ]


@pytest.mark.parametrize(
    ("state", "shown"), [("running", "running, paused"), ("open", "open, paused"), ("done", "done")]
)
def test_a_pause_is_shown_while_it_holds_something_back(state: str, shown: str) -> None:
    assert state_of(msgspec.structs.replace(JOB, state=state, paused=True)) == shown
