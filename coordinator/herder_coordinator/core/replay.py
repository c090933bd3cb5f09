"""The way back from a journal: each record makes true again, by the functions of `apply`, what it says.

A record never needs a decision. What a cut tail left undecided (a task whose dependency failed, a cancellation
without its ends) stays in `State.loose` or is found by the sweep of the first tick.
"""

from __future__ import annotations

from typing import assert_never

from herder_coordinator.core import apply, records, shares, views
from herder_coordinator.core.room import Ends
from herder_coordinator.core.state import OUTCOMES, Feed, Spent, State, Task
from herder_shared.ids import JobId
from herder_shared.states import TaskState


def replay(state: State, record: records.Record) -> None:
    """Make true again what `record` says: the whole of a replay is this, record by record."""
    if state.loose and not isinstance(record, records.RESTORED):
        settle_loose(state)
    match record:
        case records.EpochStarted() | records.JobClosed() | records.EventsAcked() | records.JobForgotten():
            _apply_job(state, record)
        case records.JobOpened():
            apply.open_job(state, record.client, record.owner, record.spec, record.attempt, record.depth)
            state.clients[record.client].grace_s = record.grace_s
        case records.FunctionKept():
            apply.keep_function(state, record.function)
        case records.FunctionsDropped():
            apply.drop_functions(state, record.functions)
        case records.TasksSubmitted():
            apply.add_tasks(
                state,
                state.jobs[record.job],
                record.first,
                function=record.function,
                tasks=record.tasks,
                python=record.python,
            )
            settle_loose(state)
        case records.TasksReset():
            apply.reset_tasks(state, state.jobs[record.job], record.indices)
            settle_loose(state)
        case records.JobChanged():
            apply.change_job(state, state.jobs[record.job], paused=record.paused, priority=record.priority)
        case records.CancelRequested():
            apply.cancel_tasks(state.jobs[record.job], record.indices, record.running)
        case records.AttemptsAssigned():
            _apply_assigned(state, record)
        case records.TasksRetried():
            for account in record.tasks:
                apply.retry(state, _replayed_task(state, account.job, account.index), account)
        case records.TasksEnded():
            job = state.jobs[record.job]
            assert record.cursor == job.cursor
            for end in record.ends:
                apply.end_task(state, job, end)
            settle_loose(state)
        case records.DrainSet():
            apply.set_drain(state, record.node, record.on, record.reason)
        case records.KeysRevoked():
            apply.revoke(state, record.keys)
        case records.SharesKept():
            shares.restore(state, record)
        case records.WorkloadDemoted():
            apply.demote(state, record.workload, record.reason, record.spec)
        case _:
            _apply_restored(state, record)


def _apply_job(
    state: State, record: records.EpochStarted | records.JobClosed | records.EventsAcked | records.JobForgotten
) -> None:
    match record:
        case records.EpochStarted():
            assert record.cluster == state.cluster
        case records.JobClosed():
            state.jobs[record.job].closed = True
        case records.EventsAcked():
            apply.ack_events(state, state.jobs[record.job], record.cursor)
        case records.JobForgotten():
            job = state.jobs[record.job]
            apply.forget_job(state, job, views.job_info(job, state.now_s))
        case _:
            assert_never(record)


def _apply_assigned(state: State, record: records.AttemptsAssigned) -> None:
    node = apply.node_of(state, record.node, record.incarnation)
    if node.incarnation != record.incarnation:
        # The attempts of the older incarnation were settled by records before this one.
        node.incarnation = record.incarnation
    for one in record.attempts:
        task = _replayed_task(state, one.job, one.index)
        apply.assign(state, task, node, one.attempt, ordinal=one.ordinal, fresh=one.fresh)


def _replayed_task(state: State, job: JobId, index: int) -> Task:
    task = apply.task_of(state, state.jobs[job], index)
    assert task is not None, f"a record names {job}.{index}, which has ended"
    return task


def settle_loose(state: State) -> None:
    """In a replay: what needs no decision. What ends for a broken dependency has its own record, or gets it later."""
    kept: list[Task] = []
    loose, state.loose = state.loose, []
    for task in loose:
        if task.state is not TaskState.WAITING:
            continue
        if task.values is None:
            apply.resolve(state, task)
        if task.broken is not None:
            kept.append(task)
        elif not task.waiting:
            apply.make_ready(state, task)
    state.loose = kept


def _apply_restored(
    state: State,
    record: records.JobRestored
    | records.TasksRestored
    | records.EndsRestored
    | records.EndsRemembered
    | records.SpentKept
    | records.DependencyKept
    | records.CancelKept
    | records.JobSummarized,
) -> None:
    match record:
        case records.JobRestored():
            job = apply.open_job(state, record.client, record.owner, record.spec, record.attempt, record.depth)
            job.acked = record.cursor
            job.ends = Ends(state.room, record.cursor)
            job.resets = record.resets
            state.clients[record.client].grace_s = record.grace_s
            job.feeds[record.client] = Feed(record.cursor, record.cursor)
            job.closed, job.cancelled, job.opened_s = record.closed, record.cancelled, state.now_s - record.age_s
        case records.TasksRestored():
            _restore_tasks(state, record)
        case records.EndsRestored():
            job = state.jobs[record.job]
            for end in record.ends:
                job.ends.add(end)
                if not job.outcomes[end.index]:  # it begins anew
                    job.ends.forget(end.index)
                if end.result is not None and end.result.blob is not None:
                    apply.use_blob(state, end.result.blob)
        case records.EndsRemembered():
            for end in record.ends:
                apply.remember(state, record.job, end)
        case records.SpentKept():
            for one in record.tasks:
                spent = Spent(one.item, one.function, one.python, one.attempt, one.ordinal)
                apply.keep_spent(state, state.jobs[record.job], one.index, spent)
        case records.DependencyKept():
            state.restored_values[record.job, record.index] = record.value
        case records.CancelKept():
            for index in record.indices:
                task = state.jobs[record.job].tasks[index]
                task.cancel = record.running
                task.cancel_pending = True
        case records.JobSummarized():
            apply.summarize(state, record.info)
        case _:
            assert_never(record)


def _restore_tasks(state: State, record: records.TasksRestored) -> None:
    job = state.jobs[record.job]
    tasks = record.tasks or (None,) * len(record.outcomes)
    apply.add_tasks(state, job, record.first, function=record.function, tasks=tasks, python=record.python)
    job.outcomes[record.first :] = record.outcomes
    for code, outcome in OUTCOMES.items():
        count = record.outcomes.count(code)
        if count:
            job.ended += count
            job.ended_by[outcome] = job.ended_by.get(outcome, 0) + count
