"""Which node, how many, and who holds what."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herder_coordinator.core import events, placement
from herder_coordinator.core.state import UNITS, Node, Request
from herder_shared import limits
from herder_shared.ids import Incarnation, JobId, NodeName
from herder_shared.states import AgentState, Cause, Outcome
from herder_shared.wire.messages import Drain, TaskOptions, TemplateInfo, WorkloadReport
from support.core_lab import JOB, WORKLOAD, Lab, failed, starts, success, to_agent


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.client()
    return lab


def shares(lab: Lab, count: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for node, _, _ in starts(lab.submit(count)):
        found[node] = found.get(node, 0) + 1
    return found


def test_tasks_are_spread_so_that_nodes_fill_evenly(lab: Lab) -> None:
    lab.node("n1", cores=4)
    lab.node("n2", session=2, cores=4)
    lab.node("n3", session=3, cores=2)
    lab.open()
    assert shares(lab, 6) == {"n1": 3, "n2": 3}
    assert shares(lab, 4) == {"n1": 1, "n2": 1, "n3": 2}


def test_a_node_with_the_template_ready_comes_first(lab: Lab) -> None:
    lab.node("n1", cores=4)
    lab.node("n2", session=2, cores=4)
    ready = WorkloadReport(WORKLOAD.key, "auto", templates=(TemplateInfo("ready"),))
    lab.do(events.WorkloadsReported(NodeName("n2"), 2, (ready,)))
    lab.open()
    assert shares(lab, 5) == {"n2": 4, "n1": 1}


def test_nodes_with_something_rare_are_left_to_those_that_need_it(lab: Lab) -> None:
    lab.node("n1", cores=4, gpus=2)
    lab.node("n2", session=2, cores=4)
    lab.open()
    assert shares(lab, 3) == {"n2": 3}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"cores": 2.0}, 2),
        ({"cores": 0.5}, 8),
        ({"cores": 0.3}, 13),
        ({"memory_bytes": 300}, 3),
        ({"gpus": 1}, 2),
        ({"resources": {"licence": 1.5}}, 2),
        ({"nodes": ("big",)}, 4),
        ({"nodes": ("n1", "elsewhere")}, 4),
    ],
)
def test_as_many_run_as_their_request_fits(lab: Lab, options: dict[str, Any], expected: int) -> None:
    lab.node("n1", cores=4, memory_bytes=1000, gpus=2, resources={"licence": 3.0}, labels=("big",))
    lab.open(**options)
    assert shares(lab, 40) == {"n1": expected}


def test_a_retry_avoids_the_node_where_it_failed_if_another_has_room(lab: Lab) -> None:
    lab.node("n1", cores=4)
    lab.node("n2", session=2, cores=1)
    lab.open()
    lab.submit(1)
    assert lab.place() == "n1"
    lab.ended(failed(lab.attempt(), Cause.TEMPLATE_LOST, Outcome.LOST))
    assert lab.place() == "n2"


def test_facts_that_shrink_turn_holders_into_look_ahead(lab: Lab) -> None:
    lab.node("n1", cores=4)
    lab.open()
    lab.submit(4)
    lab.connect("n1", session=2, cores=2)
    node = lab.state.nodes[NodeName("n1")]
    assert (len(node.attempts), len(node.ahead), node.free_cores) == (4, 2, 0)


def test_what_an_attempt_held_goes_to_the_look_ahead_first(lab: Lab) -> None:
    lab.node("n1", cores=1)
    lab.open()
    lab.submit(10)
    lab.ended(success(lab.attempt(0), 0, wall_s=0.02))
    node = lab.state.nodes[NodeName("n1")]
    assert [task.index for task in node.attempts.values()] == [1, 2, 3]
    assert len(node.ahead) == 2
    lab.ended(success(lab.attempt(1), 1, wall_s=0.02))
    assert lab.attempt(2) not in node.ahead


def test_a_request_is_counted_in_whole_units() -> None:
    assert placement.request_of(TaskOptions(cores=0.1)).cores * 10 == UNITS


@given(
    free=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8), wanted=st.integers(0, 200)
)
def test_a_division_gives_all_that_is_wanted_and_no_node_more_than_fits(
    free: list[tuple[int, int]], wanted: int
) -> None:
    candidates = [
        (cores * UNITS, UNITS, Node(NodeName(f"n{number}"), Incarnation("i"), AgentState.READY), min(cores, most))
        for number, (cores, most) in enumerate(free)
    ]
    given_out = {node.name: count for node, count in placement.level(candidates, wanted)}
    assert sum(given_out.values()) == min(wanted, sum(most for _, _, _, most in candidates))
    for _, _, node, most in candidates:
        assert given_out.get(node.name, 0) <= most


@given(cores=st.integers(0, 5 * UNITS), free=st.integers(0, 5 * UNITS))
def test_hold_takes_what_room_says_is_there(cores: int, free: int) -> None:
    node = Node(NodeName("n"), Incarnation("i"), AgentState.READY, free_cores=free)
    request = Request(cores=cores)
    fits = placement.room(node, request, 1) == 1
    assert placement.hold(node, request) is fits
    assert node.free_cores == (free - cores if fits else free) >= 0


def test_the_attempts_of_a_job_without_a_node_wait(lab: Lab) -> None:
    lab.open()
    lab.submit(3)
    assert lab.state.jobs[JOB].pending == 3


def test_pack_fills_one_node_after_the_other(lab: Lab) -> None:
    lab.node("n1", cores=4)
    lab.node("n2", session=2, cores=4)
    lab.open(placement="pack")
    assert shares(lab, 3) == {"n1": 3}
    assert shares(lab, 3) == {"n1": 1, "n2": 2}


def test_tasks_that_may_outlast_their_node_go_elsewhere(lab: Lab) -> None:
    lab.node("n1", cores=8, ends_in_s=3600.0)
    lab.node("n2", session=2, cores=2)
    lab.open(timeout_s=7200.0)
    assert shares(lab, 4) == {"n2": 2}
    short = JobId("short")
    lab.open(short, timeout_s=600.0)
    lab.submit(1, short)
    assert lab.place(0, short) == "n1"


def test_a_node_is_drained_before_it_ends(lab: Lab) -> None:
    lab.node("n1", ends_in_s=limits.NODE_END_MARGIN_S + 5.0)
    lab.open()
    assert shares(lab, 1) == {"n1": 1}
    lab.pass_time(4.0)
    lab.heard()
    assert lab.state.nodes[NodeName("n1")].state is AgentState.READY
    some = lab.pass_time(2.0)
    assert lab.state.nodes[NodeName("n1")].state is AgentState.DRAINING
    assert Drain(on=True) in to_agent(some)
    assert shares(lab, 1) == {}
    # Draining by hand, and taking that back, does not start anything there.
    lab.do(events.DrainRequested(NodeName("n1"), on=True))
    lab.do(events.DrainRequested(NodeName("n1"), on=False))
    assert lab.state.nodes[NodeName("n1")].state is AgentState.DRAINING


def test_a_node_that_comes_back_at_its_end_is_draining_at_once(lab: Lab) -> None:
    lab.node("n1", ends_in_s=10.0)
    assert lab.state.nodes[NodeName("n1")].state is AgentState.DRAINING
    lab.node("n1", session=2, incarnation="new")
    assert lab.state.nodes[NodeName("n1")].state is AgentState.READY
