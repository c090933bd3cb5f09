"""What follows an end: who pays for it, and when it is the task's."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from herder_coordinator.core import events, records
from herder_coordinator.core.effects import Persist, SendToAgent
from herder_coordinator.core.ends import NOTHING_STARTS
from herder_shared.ids import AttemptId, JobId, NodeName
from herder_shared.states import AgentState, Cause, Outcome
from herder_shared.wire.messages import AckAttempts, CancelAttempts, JobSpec, PastAttempt
from support.core_lab import CLIENT, JOB, Lab, failed, item, job_spec, starts, success, to_agent, told_ends

N1 = NodeName("n1")
BOOM = (Cause.EXCEPTION, Outcome.FAILED)
KILLED = (Cause.SIGNAL, Outcome.CRASHED)


@pytest.fixture
def lab() -> Lab:
    lab = Lab()
    lab.client()
    lab.node("n1", cores=1)
    return lab


def test_an_exception_is_final_without_retries(lab: Lab) -> None:
    lab.open()
    lab.submit(1)
    (end,) = told_ends(lab.ended(failed(lab.attempt(), *BOOM)))
    assert end.outcome is Outcome.FAILED
    assert end.usage.attempt == 1


def test_a_retry_is_recorded_before_the_attempt_is_acknowledged(lab: Lab) -> None:
    lab.open(retries=1)
    lab.submit(1)
    first = lab.attempt()
    some = lab.ended(failed(first, *BOOM))
    past = PastAttempt(1, N1, Outcome.FAILED, Cause.EXCEPTION, "it ended by exception", "fresh")
    assert some[0] == Persist(records.TasksRetried((records.Retry(JOB, 0, first, 1, 1, 0, past=(past,)),)))
    assert SendToAgent(N1, 1, AckAttempts((first,)), "durable") in some
    (order,) = starts(some)
    assert order[1].ordinal == 2
    (end,) = told_ends(lab.ended(failed(lab.attempt(), *BOOM)))
    assert (end.outcome, end.usage.attempt) == (Outcome.FAILED, 2)


def test_an_exception_which_retry_on_does_not_name_is_final(lab: Lab) -> None:
    lab.open(retries=3)
    lab.submit(1)
    assert told_ends(lab.ended(failed(lab.attempt(), *BOOM, retryable=False)))


@pytest.mark.parametrize(
    ("cause", "outcome"),
    [
        (Cause.COMMAND_EXIT, Outcome.FAILED),
        (Cause.EXIT, Outcome.CRASHED),
        (Cause.SIGNAL, Outcome.CRASHED),
        (Cause.OUT_OF_MEMORY, Outcome.OUT_OF_MEMORY),
        (Cause.TIMEOUT, Outcome.TIMED_OUT),
    ],
)
def test_every_end_of_the_tasks_own_uses_a_retry(lab: Lab, cause: Cause, outcome: Outcome) -> None:
    lab.open(retries=1)
    lab.submit(1)
    assert starts(lab.ended(failed(lab.attempt(), cause, outcome)))
    (end,) = told_ends(lab.ended(failed(lab.attempt(), cause, outcome)))
    assert end.outcome is outcome


@pytest.mark.parametrize(
    "cause", [Cause.SETUP_FAILED, Cause.FORK_UNSAFE, Cause.VERSION_MISMATCH, Cause.CANNOT_UNPICKLE]
)
def test_what_would_end_the_same_way_again_is_final_at_once(lab: Lab, cause: Cause) -> None:
    lab.open(retries=5)
    lab.submit(1)
    assert told_ends(lab.ended(failed(lab.attempt(), cause)))


def test_the_back_off_doubles(lab: Lab) -> None:
    lab.open(retries=3, backoff_s=1.0)
    lab.submit(1)
    assert starts(lab.ended(failed(lab.attempt(), *BOOM))) == []
    assert starts(lab.pass_time(0.5)) == []
    assert starts(lab.pass_time(0.5))
    assert starts(lab.ended(failed(lab.attempt(), *BOOM))) == []
    assert starts(lab.pass_time(1.5)) == []
    assert starts(lab.pass_time(0.5))


def test_losses_use_max_crashes_and_no_retry(lab: Lab) -> None:
    lab.open(max_crashes=1)
    lab.submit(1)
    assert starts(lab.ended(failed(lab.attempt(), Cause.TEMPLATE_LOST, Outcome.LOST)))
    (end,) = told_ends(lab.ended(failed(lab.attempt(), Cause.TEMPLATE_LOST, Outcome.LOST)))
    assert end.outcome is Outcome.LOST
    assert lab.failure().cause is Cause.NODE_LOST
    assert "max_crashes is 1" in lab.failure().message


def test_a_task_that_may_run_once_is_lost_with_its_template(lab: Lab) -> None:
    lab.open(idempotent=False)
    lab.submit(1)
    (end,) = told_ends(lab.ended(failed(lab.attempt(), Cause.TEMPLATE_LOST, Outcome.LOST)))
    assert end.outcome is Outcome.LOST
    assert "idempotent=False" in lab.failure().message


def test_a_task_that_may_run_once_is_tried_again_if_it_certainly_never_started(lab: Lab) -> None:
    lab.open(idempotent=False)
    lab.submit(1)
    assert starts(lab.ended(failed(lab.attempt(), Cause.START_FAILED, Outcome.LOST)))


def test_a_forked_child_that_died_of_a_signal_runs_once_more_fresh_and_unblamed(lab: Lab) -> None:
    lab.open()
    lab.submit(1)
    (order,) = starts(lab.ended(failed(lab.attempt(), *KILLED, start_method="fork")))
    assert order[1].start == "fresh"
    account = lab.state.jobs[JOB].tasks[0]
    assert (account.failures, account.crashes, account.killed_on, account.reran) == (0, 0, (), True)
    (end,) = told_ends(lab.ended(failed(lab.attempt(), *KILLED, start_method="fresh")))
    assert end.outcome is Outcome.CRASHED


@pytest.mark.parametrize(
    "options", [{"start": "fork"}, {"start": "fresh"}, {"idempotent": False}], ids=["fork", "fresh", "once"]
)
def test_the_free_rerun_is_for_auto_and_idempotent_only(lab: Lab, options: dict[str, Any]) -> None:
    lab.open(**options)
    lab.submit(1)
    assert told_ends(lab.ended(failed(lab.attempt(), *KILLED, start_method="fork")))


def test_a_task_that_killed_its_process_on_three_nodes_is_poison_whatever_retries_remain(lab: Lab) -> None:
    lab.node("n2", session=2, cores=1)
    lab.node("n3", session=3, cores=1)
    lab.open(retries=100)
    lab.submit(1)
    places = []
    for _ in range(3):
        place = lab.place()
        assert place is not None
        places.append(place)
        lab.ended(failed(lab.attempt(), *KILLED), name=place, session=int(place[1:]))
        if lab.outcomes():
            break
    assert sorted(places) == ["n1", "n2", "n3"]
    assert lab.outcomes() == {0: Outcome.CRASHED}
    assert lab.failure().cause is Cause.POISONED
    assert "on 3 nodes (" in lab.failure().message


def test_a_result_of_an_attempt_that_was_given_up_is_welcome_and_the_newer_attempt_is_stopped(lab: Lab) -> None:
    lab.open()
    lab.submit(1)
    old = lab.attempt()
    lab.node("n2", session=2)
    lab.do(events.AgentDisconnected(N1, 1))
    lab.pass_time(1.5)
    assert lab.place() == "n2"
    new = lab.attempt()
    lab.connect("n1", session=3, cores=1)
    some = lab.sync("n1", session=3, ended=[success(old)])
    assert [end.outcome for end in told_ends(some)] == [Outcome.SUCCEEDED]
    assert AckAttempts((new,)) in to_agent(some, "n2")
    assert AckAttempts((old,)) in to_agent(some, "n1")


def test_a_late_failure_of_an_attempt_that_was_given_up_is_only_acknowledged(lab: Lab) -> None:
    lab.open()
    lab.submit(1)
    old = lab.attempt()
    lab.node("n2", session=2)
    lab.do(events.AgentDisconnected(N1, 1))
    lab.pass_time(1.5)
    lab.connect("n1", session=3, cores=1)
    some = lab.sync("n1", session=3, ended=[failed(old, *BOOM)])
    assert told_ends(some) == []
    assert AckAttempts((old,)) in to_agent(some)
    assert lab.place() == "n2"


def test_a_cancelled_task_ends_as_cancelled_whatever_its_agent_says_but_success(lab: Lab) -> None:
    lab.open(retries=5)
    lab.submit(2)
    first = lab.attempt(0)
    lab.do(events.CancelRequested(CLIENT, JOB, (0,), running=True))
    lab.ended(failed(first, *KILLED))
    assert lab.outcomes() == {0: Outcome.CANCELLED}
    second = lab.attempt(1)
    lab.do(events.CancelRequested(CLIENT, JOB, (1,), running=True))
    lab.ended(success(second, 1))
    assert lab.outcomes()[1] is Outcome.SUCCEEDED


def test_cancelling_what_has_not_started_leaves_an_attempt_alone_but_makes_it_the_last(lab: Lab) -> None:
    lab.open(retries=5)
    lab.submit(1)
    (cancel,) = to_agent(lab.do(events.CancelRequested(CLIENT, JOB, None, running=False)))
    assert isinstance(cancel, CancelAttempts)
    assert cancel.waiting_only
    lab.ended(failed(lab.attempt(), *BOOM))
    assert lab.outcomes() == {0: Outcome.CANCELLED}


def test_a_node_on_which_nothing_starts_is_drained_while_another_can_take_over(lab: Lab) -> None:
    lab.open(max_crashes=99, nodes=("n1",))
    lab.do(events.JobOpened(CLIENT, _other_workload()))
    lab.node("n2", session=2, cores=1)
    lab.submit(1)
    lab.submit(1, JobId("job2"))
    for _ in range(12):
        lab.pass_time(6.0)
        lab.heard("n1")
        lab.heard("n2", 2)
        for attempt, task in list(lab.state.nodes[N1].attempts.items()):
            lab.ended(failed(attempt, Cause.START_FAILED, Outcome.LOST, task.index, job=task.job.id))
    assert lab.state.nodes[N1].state is AgentState.DRAINING
    assert records.DrainSet(N1, True, NOTHING_STARTS) in lab.records
    for by_snapshot in (False, True):  # the reason is not forgotten
        lab.restart(by_snapshot=by_snapshot)
        assert lab.state.drained == {N1: NOTHING_STARTS}


def _other_workload() -> JobSpec:
    spec = job_spec(JobId("job2"), max_crashes=99, nodes=("n1",))
    return msgspec.structs.replace(spec, workload=msgspec.structs.replace(spec.workload, key="w2"))


# --- dependencies ----------------------------------------------------------------------------------------------------


def chain(lab: Lab) -> None:
    """Task 1 depends on task 0, and task 2 on task 1."""
    lab.submit(items=[item(index=0), item(index=1, deps=[(JOB, 0)]), item(index=2, deps=[(JOB, 1)])])


def test_a_dependant_starts_with_the_values_when_all_have_succeeded(lab: Lab) -> None:
    lab.open()
    chain(lab)
    assert lab.place(1) is None
    (order,) = starts(lab.ended(success(lab.attempt(0), 0)))
    assert order[1].index == 1
    assert [(job, index, value.inline) for job, index, value in order[1].deps] == [(JOB, 0, b"value of 0")]


def test_a_failure_goes_down_the_chain_and_names_its_root(lab: Lab) -> None:
    lab.open(retries=0)
    chain(lab)
    ends = told_ends(lab.ended(failed(lab.attempt(0), *BOOM)))
    assert [end.index for end in ends] == [0, 1, 2]
    for end in ends[1:]:
        assert end.failure is not None
        assert end.failure.cause is Cause.DEPENDENCY_FAILED
        assert end.failure.root == f"{JOB}.0"
        assert end.failure.root_failure == ends[0].failure


def test_a_cancelled_dependency_cancels(lab: Lab) -> None:
    lab.open()
    lab.submit(1)
    lab.submit(items=[item(index=1), item(index=2, deps=[(JOB, 1)])])
    lab.do(events.CancelRequested(CLIENT, JOB, (1,), running=True))
    assert lab.outcomes() == {1: Outcome.CANCELLED, 2: Outcome.CANCELLED}


@pytest.mark.parametrize("dep", [(JobId("ghost"), 0), (JOB, 0), (JOB, 7)], ids=["no job", "itself", "later"])
def test_a_dependency_that_is_not_there_fails_with_data_lost(lab: Lab, dep: tuple[JobId, int]) -> None:
    lab.open()
    lab.submit(items=[item(index=0, deps=[dep])])
    root = lab.failure().root_failure
    assert root is not None
    assert (lab.failure().cause, root.cause) == (Cause.DEPENDENCY_FAILED, Cause.DATA_LOST)


def test_the_value_of_an_acknowledged_task_is_still_there_for_a_late_dependant(lab: Lab) -> None:
    lab.open()
    lab.submit(1)
    lab.ended(success(lab.attempt()))
    lab.do(events.EventsAcked(CLIENT, JOB, 1))
    (order,) = starts(lab.submit(items=[item(index=1, deps=[(JOB, 0), (JOB, 0)])]))
    assert [value.inline for _, _, value in order[1].deps] == [b"value of 0"]


def test_a_higher_attempt_that_an_earlier_life_forgot_is_as_good_as_any(lab: Lab) -> None:
    lab.open()
    lab.submit(2)
    lab.restart()
    lab.client(session=2)
    lab.node(session=2, cores=1)
    unknown = AttemptId(1, 99)
    lab.ended(success(unknown, 1), session=2)
    assert lab.outcomes() == {1: Outcome.SUCCEEDED}


def test_a_failure_that_an_earlier_life_forgot_is_not_taken_for_that_of_a_task_run_again(lab: Lab) -> None:
    lab.open()
    lab.submit(2)
    lab.restart()
    lab.client(session=2)
    lab.node(session=2, cores=1)
    unknown = failed(AttemptId(1, 99), *BOOM, index=1)
    lab.ended(unknown, session=2)
    assert lab.outcomes() == {1: Outcome.FAILED}
    lab.do(events.RetryRequested(CLIENT, 7, JOB))
    lab.restart()
    lab.node(session=3, cores=1)
    lab.ended(unknown, session=3)
    assert not lab.state.jobs[JOB].outcomes[1]


def test_a_failed_setup_is_tried_on_a_second_node_and_on_no_third(lab: Lab) -> None:
    for name in ("n2", "n3"):
        lab.node(name, cores=1)
    lab.open()
    lab.submit(1)
    tried = []
    ended: list[Any] = []
    while not ended:
        tried.append(lab.place())
        assert tried[-1] is not None
        end = failed(lab.attempt(), Cause.SETUP_FAILED, retryable=False)
        ended = told_ends(lab.ended(end, name=tried[-1]))
    assert len(tried) == len(set(tried)) == 2
    assert lab.failure().cause is Cause.SETUP_FAILED


def test_out_of_memory_is_tried_again_with_more_without_using_a_retry(lab: Lab) -> None:
    lab.open(memory_bytes=100, memory_max_bytes=350, memory_growth=2.0)
    lab.submit(1)
    held, ordered = [], []
    for _ in range(3):
        held.append((1 << 30) - lab.state.nodes[N1].free_memory_bytes)
        some = lab.ended(failed(lab.attempt(), Cause.OUT_OF_MEMORY, Outcome.OUT_OF_MEMORY))
        ordered += [start.memory_bytes for _, start, _ in starts(some)]
    assert (held, ordered) == ([100, 200, 350], [200, 350])
    (end,) = lab.state.jobs[JOB].ends
    assert (end.outcome, [past.memory_bytes for past in end.past]) == (Outcome.OUT_OF_MEMORY, [100, 200])


def test_more_memory_than_any_node_has_is_not_asked_for(lab: Lab) -> None:
    lab.open(memory_bytes=1 << 29, memory_max_bytes=1 << 40, memory_growth=8.0)
    lab.submit(1)
    lab.ended(failed(lab.attempt(), Cause.OUT_OF_MEMORY, Outcome.OUT_OF_MEMORY))
    assert lab.state.jobs[JOB].tasks[0].request.memory_bytes == 1 << 30
    lab.ended(failed(lab.attempt(), Cause.OUT_OF_MEMORY, Outcome.OUT_OF_MEMORY))
    assert lab.outcomes() == {0: Outcome.OUT_OF_MEMORY}


def test_without_a_maximum_memory_does_not_grow(lab: Lab) -> None:
    lab.open(memory_bytes=100)
    lab.submit(1)
    lab.ended(failed(lab.attempt(), Cause.OUT_OF_MEMORY, Outcome.OUT_OF_MEMORY))
    assert lab.outcomes() == {0: Outcome.OUT_OF_MEMORY}


@pytest.mark.parametrize("by_snapshot", [False, True])
def test_the_memory_that_a_task_was_given_survives_a_restart(lab: Lab, by_snapshot: bool) -> None:
    lab.open(memory_bytes=100, memory_max_bytes=1000, detached=True)
    lab.node("n2", session=2)
    lab.submit(2)
    lab.ended(failed(lab.attempt(0), Cause.OUT_OF_MEMORY, Outcome.OUT_OF_MEMORY))
    lab.restart(by_snapshot=by_snapshot)
    assert [lab.state.jobs[JOB].tasks[index].request.memory_bytes for index in (0, 1)] == [200, 100]
    lab.change(priority=2)
    assert lab.state.jobs[JOB].tasks[0].queue.group.key.priority == 2


def test_a_grown_task_waits_in_its_own_queue_and_is_cancelled_with_its_job(lab: Lab) -> None:
    lab.node("n1", session=2, cores=2)
    lab.open(memory_bytes=1 << 29, memory_max_bytes=1 << 30)
    lab.submit(3)
    lab.ended(failed(lab.attempt(0), Cause.OUT_OF_MEMORY, Outcome.OUT_OF_MEMORY), session=2)
    assert lab.place(0) is None
    lab.cancel()
    assert not lab.state.busy
    assert lab.outcomes()[0] is Outcome.CANCELLED
