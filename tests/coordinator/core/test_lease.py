"""How long is waited, and that waiting for ourselves does not count."""

from __future__ import annotations

import pytest

from herder_coordinator.core import lease
from herder_coordinator.core.lease import loss_backoff_s, task_backoff_s
from herder_shared.states import Cause
from support.core_lab import Lab


@pytest.mark.parametrize(
    ("base_s", "failures", "expected_s"),
    [(0.0, 9, 0.0), (0.5, 1, 0.5), (0.5, 2, 1.0), (0.5, 4, 4.0), (1.0, 900, 300.0)],
)
def test_a_tasks_back_off_doubles_up_to_a_bound(base_s: float, failures: int, expected_s: float) -> None:
    assert task_backoff_s(base_s, failures) == expected_s


@pytest.mark.parametrize(("crashes", "expected_s"), [(1, 0.0), (2, 0.1), (3, 0.2), (99, 5.0)])
def test_the_first_loss_costs_no_wait(crashes: int, expected_s: float) -> None:
    assert loss_backoff_s(crashes) == expected_s


def test_a_late_tick_moves_every_deadline_by_as_much() -> None:
    lab = Lab()
    lab.client()
    lab.node()
    lab.open()
    node = next(iter(lab.state.nodes.values()))
    before_s, judge_s = node.lease_s, lab.state.judge_s
    assert judge_s > lab.now_s, "an agent has just come: others may follow"
    assert lease.forgive_stall(lab.state, lab.now_s + 0.9) == 0.0
    assert lease.forgive_stall(lab.state, lab.now_s + 10.5) == pytest.approx(10.0)
    assert node.lease_s == pytest.approx(before_s + 10.0)
    assert lab.state.judge_s == pytest.approx(judge_s + 10.0)


def test_nothing_is_forgiven_before_time_has_begun() -> None:
    lab = Lab()
    lab.state.now_s = 0.0
    assert lease.forgive_stall(lab.state, 1e6) == 0.0


def test_after_a_restart_agents_have_two_leases_to_be_back() -> None:
    lab = Lab()
    assert lease.restart_grace_s(lab.state) == 60.0
    lab.state.periods.lease_s = 100.0
    assert lease.restart_grace_s(lab.state) == 200.0


def test_a_new_life_calls_nothing_impossible_until_every_agent_can_have_left_the_old_one() -> None:
    lab = Lab()
    lab.restart()
    lab.client()
    lab.open(nodes=("even",))
    lab.submit(1)
    lab.node("odd")
    lab.pass_time(lab.state.periods.lease_s)
    assert not lab.outcomes()
    lab.pass_time(10.0)
    assert lab.failure().cause is Cause.UNSCHEDULABLE
