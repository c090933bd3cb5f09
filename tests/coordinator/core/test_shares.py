"""The account by which owners and jobs take their part."""

from __future__ import annotations

import pytest

from herder_coordinator.core import shares
from herder_coordinator.core.state import UNITS, Policy, Share, new_state
from herder_shared.ids import Incarnation, JobId
from support.core_lab import CLIENT, CLUSTER, JOB, Lab, starts, success

OTHER = Incarnation("client2")
JOB2, JOB3 = JobId("job2"), JobId("job3")


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.client()
    lab.client(OTHER, owner="you", session=2)
    return lab


def held(lab: Lab, owner: str) -> float:
    return lab.state.owners[owner].held / UNITS


def finish(lab: Lab, count: int = 1, wall_s: float = 5.0, after_s: float = 5.0) -> None:
    """Let time go by, and then the oldest attempts on n1 end."""
    lab.pass_time(after_s)
    lab.heard("n1")
    node = next(iter(lab.state.nodes.values()))
    for attempt, task in list(node.attempts.items())[:count]:
        lab.ended(success(attempt, task.index, task.job.id, wall_s=wall_s))


def test_two_owners_get_halves_whoever_came_first(lab: Lab) -> None:
    lab.open(JOB)
    lab.open(JOB2, client=OTHER)
    lab.submit(400, JOB)
    lab.submit(100, JOB2, client=OTHER)
    given = [start.job for _, start, _ in starts(lab.node(cores=100))]
    assert (given.count(JOB), given.count(JOB2)) == (50, 50)


def test_weights_divide_the_cores(lab: Lab) -> None:
    lab.state.policy.weights["you"] = 3.0
    lab.open(JOB)
    lab.client(Incarnation("client3"), owner="you", session=3)
    lab.open(JOB2, client=Incarnation("client3"))
    lab.state.owners["you"].weight = shares.weight_of(lab.state, "you")
    lab.submit(400, JOB)
    lab.submit(400, JOB2, client=Incarnation("client3"))
    given = [start.job for _, start, _ in starts(lab.node(cores=100))]
    assert (given.count(JOB), given.count(JOB2)) == (25, 75)


def test_parts_are_of_cores_not_of_tasks(lab: Lab) -> None:
    lab.open(JOB, cores=4.0)
    lab.open(JOB2, client=OTHER)
    lab.submit(100, JOB)
    lab.submit(100, JOB2, client=OTHER)
    given = [start.job for _, start, _ in starts(lab.node(cores=40))]
    assert (given.count(JOB), given.count(JOB2)) == (5, 20)


def test_an_owner_divides_his_part_between_his_jobs(lab: Lab) -> None:
    lab.open(JOB)
    lab.open(JOB2)
    lab.open(JOB3, client=OTHER)
    for job, client in ((JOB, CLIENT), (JOB2, CLIENT), (JOB3, OTHER)):
        lab.submit(100, job, client=client)
    given = [start.job for _, start, _ in starts(lab.node(cores=40))]
    assert [given.count(job) for job in (JOB, JOB2, JOB3)] == [10, 10, 20]


def test_slots_that_become_free_go_to_whoever_uses_least(lab: Lab) -> None:
    lab.state.policy.half_life_s = 50.0
    lab.node(cores=8)
    lab.open(JOB)
    lab.submit(100, JOB)
    lab.open(JOB2, client=OTHER)
    lab.submit(100, JOB2, client=OTHER)
    assert (held(lab, "me"), held(lab, "you")) == (8, 0)
    for _ in range(2):
        lab.pass_time(15.0)
        lab.heard("n1")
    for _ in range(6):
        finish(lab)
    # The newcomer gets more than half first, as the other had all of it for a while.
    assert held(lab, "you") > held(lab, "me")
    for _ in range(60):
        finish(lab, after_s=4.0)
        lab.submit(1, JOB)
        lab.submit(1, JOB2, client=OTHER)
    assert held(lab, "me") == pytest.approx(held(lab, "you"), abs=1)


def test_the_mean_follows_what_is_held_and_forgets_by_halves() -> None:
    state = new_state(CLUSTER, 1, policy=Policy(half_life_s=100.0))
    share = Share(held=8 * UNITS, at_s=0.0)
    state.now_s = 100.0
    assert shares.use(share, state) == pytest.approx((8 + 4) * UNITS)
    share.held = 0
    state.now_s = 200.0
    assert shares.use(share, state) == pytest.approx(2 * UNITS)
    state.now_s = 100_000.0
    assert shares.use(share, state) == 0.0


def test_many_jobs_of_one_owner_are_taken_up_one_after_the_other(lab: Lab) -> None:
    for number in range(100):
        job = JobId(f"many{number:02}")
        lab.open(job)
        lab.submit(2, job)
    given = [start.job for _, start, _ in starts(lab.node(cores=64))]
    assert sorted(set(given)) == [f"many{number:02}" for number in range(len(set(given)))]


def test_look_ahead_is_divided_as_well(lab: Lab) -> None:
    lab.node(cores=2)
    for job, client in ((JOB, CLIENT), (JOB2, OTHER)):
        lab.open(job, client=client)
        lab.submit(500, job, client=client)
    node = lab.state.nodes[next(iter(lab.state.nodes))]
    for _ in range(40):
        attempt, task = next(iter(node.attempts.items()))
        lab.ended(success(attempt, task.index, task.job.id, wall_s=0.001))
    ahead = [node.attempts[attempt].job.id for attempt in node.ahead]
    assert min(ahead.count(JOB), ahead.count(JOB2)) > 0.35 * len(ahead)


def test_accounts_of_owners_without_jobs_are_forgotten(lab: Lab) -> None:
    for number in range(shares.OWNERS_KEPT_MAX + 50):
        shares.owner_of(lab.state, f"owner{number}")
    assert len(lab.state.owners) <= shares.OWNERS_KEPT_MAX
    lab.open()
    assert lab.state.jobs[JOB].owner_share is lab.state.owners["me"]


def test_the_account_begins_anew_with_each_life(lab: Lab) -> None:
    lab.node(cores=4)
    lab.open(detached=True)
    lab.submit(8)
    lab.restart(by_snapshot=True)
    assert lab.state.owners["me"].held == 0
