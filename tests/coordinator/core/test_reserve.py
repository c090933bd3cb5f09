"""Nodes that are kept for those who would wait for ever, and what may use them meanwhile."""

from __future__ import annotations

import pytest

from herder_coordinator.core import reserve
from herder_shared.ids import Incarnation, JobId, NodeName
from support.core_lab import CLIENT, JOB, Lab, starts, success

OTHER = Incarnation("client2")
WIDE, LIMITED, LATER = JobId("wide"), JobId("limited"), JobId("later")


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.client()
    lab.client(OTHER, owner="you", session=2)
    return lab


def end_one(lab: Lab, name: str, wall_s: float = 3.0, job: JobId | None = None) -> None:
    """The oldest attempt on this node (of this job) ends."""
    lab.pass_time(1.0)
    lab.heard(name, lab.state.nodes[NodeName(name)].session)
    node = lab.state.nodes[NodeName(name)]
    session = node.session
    for attempt, task in node.attempts.items():
        if job is None or task.job.id == job:
            lab.ended(success(attempt, task.index, task.job.id, wall_s=wall_s), name=name, session=session)
            return
    raise AssertionError("nothing runs there")


def kept(lab: Lab) -> list[str]:
    return list(lab.state.reservations)


def narrow_and_wide(lab: Lab, nodes: int = 1) -> None:
    """Nodes of 4 cores full of long tasks with more behind them, and then one task that needs all 4."""
    for number in range(1, nodes + 1):
        lab.node(f"n{number}", session=number, cores=4)
    lab.open(JOB)
    lab.submit(100, JOB)
    lab.open(WIDE, client=OTHER, cores=4.0)
    lab.submit(1, WIDE, client=OTHER)


@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_narrow_tasks_never_starve_a_wide_one(lab: Lab, nodes: int) -> None:
    narrow_and_wide(lab, nodes)
    for turn in range(4 * nodes):
        if lab.place(0, WIDE) is not None:
            break
        end_one(lab, f"n{turn % nodes + 1}")
    assert lab.place(0, WIDE) is not None
    assert kept(lab) == []


def test_other_nodes_go_on_while_one_is_kept(lab: Lab) -> None:
    narrow_and_wide(lab, nodes=2)
    end_one(lab, "n1")
    end_one(lab, "n2")
    (name,) = kept(lab)
    other = {"n1": "n2", "n2": "n1"}[name]
    assert len(lab.state.nodes[NodeName(other)].attempts) == 4
    assert len(lab.state.nodes[NodeName(name)].attempts) == 3


def test_on_the_kept_node_runs_what_is_over_before_there_is_room(lab: Lab) -> None:
    lab.node(cores=4)
    lab.open(JOB, timeout_s=100.0)
    lab.submit(3, JOB)
    lab.open(WIDE, cores=4.0)
    lab.submit(1, WIDE)
    lab.open(LIMITED, timeout_s=50.0)
    lab.open(LATER, timeout_s=500.0)
    lab.submit(1, LATER)
    assert kept(lab) == ["n1"]
    assert lab.place(0, LATER) is None
    lab.submit(1, LIMITED)
    assert lab.place(0, LIMITED) == "n1"


def test_on_the_kept_node_runs_what_fits_beside(lab: Lab) -> None:
    lab.node(cores=8)
    lab.open(JOB, cores=5.0)
    lab.submit(1, JOB)
    lab.open(WIDE, cores=6.0)
    lab.submit(1, WIDE)
    lab.open(LATER)
    lab.submit(10, LATER)
    # When the first has ended, 8 cores are free: 6 for the wide one, 2 for others, however long they take.
    assert [lab.place(index, LATER) for index in range(3)] == ["n1", "n1", None]
    end_one(lab, "n1", job=JOB)
    assert lab.place(0, WIDE) == "n1"


def test_what_lacks_a_gpu_does_not_hold_up_those_who_need_none(lab: Lab) -> None:
    lab.node(cores=8, gpus=1)
    lab.open(JOB, gpus=1)
    lab.submit(2, JOB)
    lab.open(LATER)
    lab.submit(4, LATER)
    assert [lab.place(index, LATER) for index in range(4)] == ["n1"] * 4


def test_higher_priority_ignores_the_reservation(lab: Lab) -> None:
    narrow_and_wide(lab)
    end_one(lab, "n1")
    assert kept(lab) == ["n1"]
    urgent = JobId("urgent")
    lab.open(urgent, priority=1)
    lab.submit(1, urgent)
    assert lab.place(0, urgent) == "n1"
    assert lab.place(0, WIDE) is None


def test_a_short_backfill_is_let_through_where_nobody_knows_when_there_is_room(lab: Lab) -> None:
    lab.node(cores=4)
    lab.open(JOB)
    lab.submit(2, JOB)
    lab.open(WIDE, client=OTHER, cores=4.0)
    lab.submit(1, WIDE, client=OTHER)
    short, slow = JobId("short"), JobId("slow")
    lab.open(short, timeout_s=0.5)  # with the grace of a kill more than the slack
    lab.submit(1, short)
    assert lab.place(0, short) is None
    lab.open(slow, timeout_s=reserve.SLACK_S + 5)
    lab.submit(1, slow)
    assert lab.place(0, slow) is None
    lab.state.paces[lab.state.jobs[short].spec.workload.key, lab.state.jobs[short].chunks[0].function] = 0.2
    lab.submit(1, slow)
    assert lab.place(0, short) == "n1"


def test_a_long_task_gets_its_turn_although_short_ones_fill_the_look_ahead(lab: Lab) -> None:
    lab.node(cores=1)
    lab.open(JOB)
    lab.submit(1000, JOB)
    end_one(lab, "n1", wall_s=0.005)
    assert lab.state.nodes[NodeName("n1")].ahead
    lab.open(LATER, client=OTHER, idempotent=False)
    lab.submit(1, LATER, client=OTHER)
    for _ in range(20):
        if lab.place(0, LATER) is not None:
            break
        end_one(lab, "n1", wall_s=0.005)
    assert lab.place(0, LATER) == "n1"


def test_a_kept_node_that_goes_away_is_given_up(lab: Lab) -> None:
    narrow_and_wide(lab, nodes=2)
    end_one(lab, "n1")
    (name,) = kept(lab)
    node = lab.state.nodes[NodeName(name)]
    lab.node(name, session=9, incarnation="again", cores=2)
    end_one(lab, {"n1": "n2", "n2": "n1"}[name])
    assert node.reserved is None or node.reserved.request.cores <= node.cores


def test_a_reservation_ends_with_those_who_waited(lab: Lab) -> None:
    narrow_and_wide(lab)
    end_one(lab, "n1")
    assert kept(lab) == ["n1"]
    lab.cancel(WIDE, OTHER)
    end_one(lab, "n1")
    assert kept(lab) == []
    lab.pass_time(5.0)
    assert len(lab.state.nodes[NodeName("n1")].attempts) == 4


def test_no_more_than_half_of_the_nodes_are_kept(lab: Lab) -> None:
    for number in range(1, 5):
        lab.node(f"n{number}", session=number, cores=4)
    lab.open(JOB)
    lab.submit(100, JOB)
    for number in range(6):
        job = JobId(f"wide{number}")
        lab.open(job, client=OTHER, cores=3.0, memory_bytes=number)
        lab.submit(5, job, client=OTHER)
    for number in range(1, 5):
        end_one(lab, f"n{number}")
    assert len(kept(lab)) == 2


def test_the_node_that_will_have_room_first_is_kept(lab: Lab) -> None:
    lab.node("n1", session=1, cores=4)
    lab.open(JOB, timeout_s=1000.0)
    lab.submit(3, JOB)
    lab.node("n2", session=2, cores=4)
    lab.open(LIMITED, timeout_s=10.0, nodes=("n2",))
    lab.submit(3, LIMITED)
    lab.open(LATER)
    lab.open(WIDE, client=OTHER, cores=4.0)
    lab.submit(1, WIDE, client=OTHER)
    lab.submit(2, LATER)
    assert kept(lab) == ["n2"]


def test_an_empty_step_starts_nothing(lab: Lab) -> None:
    narrow_and_wide(lab)
    assert starts(lab.pass_time(1.0)) == []
    assert lab.state.jobs[WIDE].pending == 1
    assert CLIENT in lab.state.clients


def test_a_node_that_ends_too_soon_is_not_kept_for_what_would_not_end_there_in_time(lab: Lab) -> None:
    lab.node("n1", cores=2, ends_in_s=60.0)
    lab.open(WIDE, client=OTHER, timeout_s=100.0)
    lab.submit(1, WIDE, client=OTHER)
    lab.open(JOB, timeout_s=5.0)
    assert len(starts(lab.submit(3))) == 2
    assert kept(lab) == []
    assert lab.place(0, WIDE) is None


def test_a_node_that_was_kept_is_given_back_when_it_ends_too_soon(lab: Lab) -> None:
    lab.node("n1", cores=2, ends_in_s=160.0)
    lab.open(JOB, timeout_s=50.0)
    lab.submit(4)
    lab.open(WIDE, client=OTHER, cores=2.0, timeout_s=100.0)
    lab.submit(1, WIDE, client=OTHER)
    end_one(lab, "n1", wall_s=60.0)
    assert kept(lab) == ["n1"]
    for _ in range(15):
        lab.pass_time(3.0)
        lab.heard("n1")
    end_one(lab, "n1", wall_s=60.0)
    assert kept(lab) == []
    assert lab.place(0, WIDE) is None
    assert lab.place(3) == "n1"
