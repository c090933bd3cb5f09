"""The account by which owners and jobs take their part."""

from __future__ import annotations

import pytest

from herder_coordinator.core import records, shares
from herder_coordinator.core.state import UNITS, Policy, Share, new_state
from herder_shared.ids import Incarnation, JobId, NodeName
from herder_shared.states import Cause, Outcome
from support.core_lab import CLIENT, CLUSTER, JOB, Lab, failed, starts, success

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


def test_a_weight_is_of_an_owner_or_of_his_name_on_every_machine(lab: Lab) -> None:
    lab.state.policy.weights.update({"ann": 3.0, "ann@old": 0.5})
    weights = [shares.weight_of(lab.state, owner) for owner in ("ann", "ann@desk", "ann@old", "anna@desk")]
    assert weights == [3.0, 3.0, 0.5, 1.0]


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


def greedy_lab(lab: Lab) -> None:
    """I have had eight cores for minutes; you come only now."""
    lab.node(cores=8)
    lab.open(detached=True)
    lab.submit(100)
    for _ in range(40):
        lab.pass_time(10.0)
        lab.heard("n1")


def kept_records(lab: Lab) -> list[records.SharesKept]:
    return [record for record in lab.records if isinstance(record, records.SharesKept)]


@pytest.mark.parametrize("by_snapshot", [True, False], ids=["snapshot", "journal"])
def test_what_each_had_lately_outlives_the_coordinator(lab: Lab, by_snapshot: bool) -> None:
    greedy_lab(lab)
    before = shares.kept(lab.state)
    # 400 s of 8 cores: of the half-life's 600 s.
    assert dict(before.owners) == pytest.approx({"me": 8 * UNITS * (1 - 2 ** (-400 / 600))}, abs=shares.GRAIN)
    lab.now_s += 100_000.0  # how long it was away takes nothing from anybody
    lab.restart(by_snapshot=by_snapshot)
    tolerance = shares.GRAIN if by_snapshot else 8 * UNITS * (1 - 2 ** (-shares.KEEP_EVERY_S / 600))
    assert lab.state.owners["me"].mean == pytest.approx(before.owners[0][1], abs=tolerance)
    assert lab.state.jobs[JOB].share.mean == lab.state.owners["me"].mean
    assert lab.state.owners["me"].held == 0  # its agents say so when they are back
    lab.restart(by_snapshot=True)
    assert lab.state.owners["me"].mean == pytest.approx(before.owners[0][1], abs=tolerance)
    # So the one who had nothing goes first.
    lab.client(session=11)
    lab.client(OTHER, owner="you", session=12)
    lab.open(JOB2, client=OTHER)
    lab.submit(100, JOB2, client=OTHER)
    given = [start.job for _, start, _ in starts(lab.node("n2", session=13, cores=3))]
    assert given == [JOB2] * 3


def test_the_account_is_recorded_once_a_minute_and_only_while_it_changes(lab: Lab) -> None:
    lab.pass_time(300.0)
    assert kept_records(lab) == []
    greedy_lab(lab)
    assert len(kept_records(lab)) == pytest.approx(400 / shares.KEEP_EVERY_S, abs=1)
    lab.cancel()
    for attempt in list(lab.state.nodes[NodeName("n1")].attempts):
        lab.ended(failed(attempt, Cause.CANCELLED, Outcome.CANCELLED, attempt.n - 1))
    for _ in range(300):
        lab.pass_time(30.0)
        lab.heard("n1")
    assert kept_records(lab)[-1] == records.SharesKept((), ())
    count = len(kept_records(lab))
    for _ in range(20):
        lab.pass_time(30.0)
        lab.heard("n1")
    assert len(kept_records(lab)) == count


def test_of_many_jobs_those_that_held_most_are_recorded(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "JOBS_RECORDED_MAX", 2)
    for number, job in enumerate((JOB, JOB2, JOB3), start=1):
        lab.open(job)
        lab.state.jobs[job].share.mean = float(number * UNITS)
    assert shares.kept(lab.state).jobs == ((JOB3, 3 * UNITS), (JOB2, 2 * UNITS))
    shares.restore(lab.state, shares.kept(lab.state))
    assert [lab.state.jobs[job].share.mean for job in (JOB, JOB2, JOB3)] == [0, 2 * UNITS, 3 * UNITS]
