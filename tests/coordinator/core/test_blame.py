"""Which crashes of forked children are the fork's fault, and when they end a workload's forking."""

from __future__ import annotations

import pytest

from herder_coordinator.core import blame, records
from herder_coordinator.core.state import Evidence
from herder_shared.ids import JobId, WorkloadKey
from herder_shared.states import Cause, Outcome
from herder_shared.wire.messages import AttemptEnd, Notice, StartAttempts
from support.core_lab import CLIENT, JOB, Lab, failed, starts, success, to_agent, to_client

KEY = WorkloadKey("w1")


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.client()
    lab.node("n1", cores=1)
    return lab


def crash(lab: Lab, index: int, cause: Cause = Cause.SIGNAL, method: str = "fork", job: JobId = JOB) -> AttemptEnd:
    return failed(lab.attempt(index, job), cause, Outcome.CRASHED, index, job=job, start_method=method)


def survived(lab: Lab, index: int, cause: Cause = Cause.SIGNAL) -> list[object]:
    """The task's forked child dies, and its rerun in a fresh interpreter gives a value. Returns what that brought."""
    (order,) = starts(lab.ended(crash(lab, index, cause)))
    assert order[1].start == "fresh"
    return list(lab.ended(success(lab.attempt(index), index, start_method="fresh")))


def demoted(lab: Lab) -> str:
    return lab.state.workloads[KEY].demoted


def test_one_proved_deadlock_which_the_rerun_survives_demotes(lab: Lab) -> None:
    lab.open()
    lab.submit(1)
    lab.ended(crash(lab, 0, Cause.DEADLOCK))
    assert not demoted(lab)
    some = lab.ended(success(lab.attempt(0), 0, start_method="fresh"))
    assert lab.outcomes() == {0: Outcome.SUCCEEDED}
    assert "deadlocked" in demoted(lab)
    assert records.WorkloadDemoted(KEY, demoted(lab)) in lab.records
    (told,) = [m for m in to_agent(some) if isinstance(m, StartAttempts)]
    assert [spec.demoted for spec in told.workloads] == [demoted(lab)]
    (notice,) = [m for m in to_client(some, CLIENT) if isinstance(m, Notice)]
    assert demoted(lab) in notice.text


def test_two_signals_of_different_tasks_demote(lab: Lab) -> None:
    lab.open()
    lab.submit(2)
    survived(lab, 0)
    assert not demoted(lab)
    survived(lab, 1)
    assert demoted(lab).startswith("2 forked children died of a signal")
    counted = [one for one in lab.observed if one.kind == "workload_demoted"]
    assert [dict(one.labels)["reason"] for one in counted] == ["signal"]


def test_a_crash_which_the_rerun_repeats_acquits_the_fork(lab: Lab) -> None:
    lab.open()
    lab.submit(3)
    for index in range(3):
        lab.ended(crash(lab, index, Cause.DEADLOCK))
        lab.ended(crash(lab, index, Cause.SIGNAL, "fresh"))
        assert lab.outcomes()[index] is Outcome.CRASHED
    assert not demoted(lab)
    assert lab.state.workloads[KEY].evidence == []


@pytest.mark.parametrize("outcome", [Outcome.OUT_OF_MEMORY, Outcome.TIMED_OUT])
def test_a_rerun_which_is_ended_by_its_limits_says_nothing_against_the_fork(lab: Lab, outcome: Outcome) -> None:
    lab.open()
    lab.submit(1)
    lab.ended(crash(lab, 0, Cause.DEADLOCK))
    cause = Cause.TIMEOUT if outcome is Outcome.TIMED_OUT else Cause.OUT_OF_MEMORY
    lab.ended(failed(lab.attempt(0), cause, outcome, 0, start_method="fresh"))
    assert not demoted(lab)


def test_a_rerun_which_raises_was_survived(lab: Lab) -> None:
    lab.open()
    lab.submit(1)
    lab.ended(crash(lab, 0, Cause.DEADLOCK))
    lab.ended(failed(lab.attempt(0), Cause.EXCEPTION, index=0, start_method="fresh"))
    assert demoted(lab)


def test_the_verdict_waits_for_a_rerun_that_was_lost(lab: Lab) -> None:
    lab.open()
    lab.submit(1)
    lab.ended(crash(lab, 0, Cause.DEADLOCK))
    lab.ended(failed(lab.attempt(0), Cause.NODE_LOST, Outcome.LOST, 0, start_method="fresh"))
    lab.pass_time(5.0)
    assert not demoted(lab)
    lab.ended(success(lab.attempt(0), 0, start_method="fresh"))
    assert demoted(lab)


def test_crashes_that_lie_far_apart_do_not_demote(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blame, "WINDOW", 5)
    lab.open()
    lab.submit(8)
    survived(lab, 0)
    for index in range(1, 6):
        lab.ended(success(lab.attempt(index), index, start_method="fork"))
    survived(lab, 6)
    assert not demoted(lab)
    survived(lab, 7)
    assert demoted(lab)


@pytest.mark.parametrize("start", ["fork", "fresh"])
def test_only_auto_learns(lab: Lab, start: str) -> None:
    lab.open(start=start)
    lab.submit(2)
    for index in range(2):
        lab.ended(crash(lab, index, Cause.DEADLOCK))
        assert lab.outcomes()[index] is Outcome.CRASHED
    assert not demoted(lab)


def test_two_proved_deadlocks_of_tasks_that_may_run_once_demote(lab: Lab) -> None:
    lab.open(idempotent=False)
    lab.submit(2)
    lab.ended(crash(lab, 0, Cause.DEADLOCK))
    assert not demoted(lab)
    lab.ended(crash(lab, 1, Cause.DEADLOCK))
    assert demoted(lab)
    assert lab.outcomes() == {0: Outcome.CRASHED, 1: Outcome.CRASHED}


def test_a_node_that_has_not_met_the_workload_is_told_with_it(lab: Lab) -> None:
    lab.open()
    lab.submit(1)
    survived(lab, 0, Cause.DEADLOCK)
    lab.node("n2", cores=1)
    orders = [m for m in to_agent(lab.submit(2), "n2") if isinstance(m, StartAttempts)]
    assert [spec.demoted for m in orders for spec in m.workloads] == [demoted(lab)]


@pytest.mark.parametrize("by_snapshot", [True, False])
def test_suspicion_and_verdict_outlive_the_coordinator(lab: Lab, by_snapshot: bool) -> None:
    lab.open()
    lab.submit(2)
    lab.ended(crash(lab, 0, Cause.DEADLOCK))
    lab.restart(by_snapshot=by_snapshot)
    lab.client(session=2)
    lab.node("n1", cores=1, session=2, incarnation="n1-2")
    lab.pass_time(5.0)
    lab.ended(success(lab.attempt(0), 0, start_method="fresh"), session=2)
    reason = demoted(lab)
    assert reason
    lab.restart(by_snapshot=by_snapshot)
    assert demoted(lab) == reason


def test_the_verdict_counts_what_was_seen() -> None:
    deadlock, signal = Evidence(1, 2, Cause.DEADLOCK), Evidence(2, 1, Cause.SIGNAL)
    assert blame.verdict([]) == blame.verdict([signal]) == ""
    assert blame.verdict([deadlock, signal, signal]).startswith("1 forked child deadlocked")
    assert " and 2 forked children died of a signal " in blame.verdict([deadlock, signal, signal])
