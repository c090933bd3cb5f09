"""`step(state, event, now_s) -> list[Effect]`: the coordinator's only decision maker, and the way back from a journal.

Same state, event and time, same effects, for ever: the simulator and the replay rest on it. The caller appends the
`Persist` effects to the journal in order, and carries out the others when they say. Start::

    state = new_state(cluster, journal.epoch)
    for record in journal.replay():
        replay_record(state, record)
    effects = finish_replay(state, now_s)
    journal.begin(snapshot(state))
"""

from __future__ import annotations

import heapq
from typing import assert_never

from herder_coordinator.core import (
    agents,
    apply,
    clients,
    ends,
    events,
    keys,
    lease,
    quarantine,
    ready,
    replay,
    shares,
    standstill,
)
from herder_coordinator.core.effects import Effect
from herder_coordinator.core.lease import next_deadline_s
from herder_coordinator.core.records import Record
from herder_coordinator.core.state import State
from herder_coordinator.core.turn import Turn
from herder_shared.states import AgentState

__all__ = ["finish_replay", "next_deadline_s", "replay_record", "step"]


def step(state: State, event: events.Event, now_s: float) -> list[Effect]:
    """Take in what happened at `now_s` (seconds of a monotonic clock, never less than the last) and say what to do.

    Raises:
        AssertionError: a bug of ours. The caller ends, and starts again from its journal.
    """
    turn = Turn(state)
    late_s = lease.forgive_stall(state, now_s)
    if late_s:
        turn.count("stalled", (), late_s)
    state.now_s = max(state.now_s, now_s)
    _take_in(turn, event)
    if state.orphans:
        clients.settle_orphans(turn)
    if state.loose:
        ends.settle_loose(turn)
    while turn.wake:
        turn.wake = False
        ready.dispatch(turn)
        ends.settle_loose(turn)
    return turn.finish()


def _take_in(turn: Turn, event: events.Event) -> None:
    match event:
        case events.AttemptsEnded():
            agents.attempts_ended(turn, event)
        case events.AttemptsStarted():
            agents.attempts_started(turn, event)
        case events.SlotsChanged():
            agents.slots_changed(turn, event)
        case events.TasksSubmitted():
            clients.tasks_submitted(turn, event)
        case events.EventsAcked():
            clients.events_acked(turn, event)
        case events.AgentHeard():
            agents.heard(turn, event)
        case events.Ticked():
            _tick(turn)
        case events.ClientConnected():
            clients.connected(turn, event)
        case events.ClientDisconnected():
            clients.disconnected(turn, event)
        case events.ClientLeft():
            clients.left(turn, event)
        case events.JobOpened():
            clients.job_opened(turn, event)
        case events.JobClosed():
            clients.job_closed(turn, event)
        case events.JobChangeRequested():
            clients.job_change_requested(turn, event)
        case events.CancelRequested():
            clients.cancel_requested(turn, event)
        case events.RetryRequested():
            clients.retry_requested(turn, event)
        case events.Attached():
            clients.attached(turn, event)
        case events.AgentConnected():
            agents.connected(turn, event)
        case events.AgentSynced():
            agents.synced(turn, event)
        case events.AgentDisconnected():
            agents.disconnected(turn, event)
        case events.WorkloadsReported():
            agents.reported(turn, event)
        case events.DrainRequested():
            ends.set_drain(turn, event.node, on=event.on)
        case events.KeysRevokeRequested():
            keys.revoke_requested(turn, event)
        case _:
            assert_never(event)


def _tick(turn: Turn) -> None:
    state = turn.state
    if state.unswept:
        state.unswept = False
        clients.sweep(turn)
    agents.check_leases(turn)
    shares.note(turn)
    standstill.check(turn)
    ends.drain_ending(turn)
    ready.recall(turn)
    if quarantine.trust_again(state):
        turn.wake = True
    clients.check_gone(turn)
    while state.delayed and state.delayed[0][0] <= state.now_s:
        _, ticket, task = heapq.heappop(state.delayed)
        if task.delay == ticket:
            task.delay = 0
            apply.queue(state, task)
            turn.wake = True
    if any(not group.schedulable for group in state.busy.values()):
        turn.wake = True
    lease.reset_alarm(state)


def replay_record(state: State, record: Record) -> None:
    """Make true again what a record of the journal says. Oldest first."""
    replay.replay(state, record)


def finish_replay(state: State, now_s: float) -> list[Effect]:
    """The journal is read: time begins. Every agent and client is away and has its grace to be back.

    Returns nothing that must be persisted, so it may be called before or after the fresh snapshot is written.
    """
    state.now_s = now_s
    replay.settle_loose(state)
    apply.forget_recent(state)
    state.restored_values.clear()
    state.unused.clear()
    shares.begin(state)
    for node in state.nodes.values():
        node.state = AgentState.DISCONNECTED
        node.lease_s = now_s + lease.restart_grace_s(state)
        node.heard_s = now_s
        node.grace_s = None
    for job in state.jobs.values():
        job.opened_s += now_s
        for chunk in job.chunks:
            chunk.since_s = now_s
        for task in job.tasks.values():
            task.since_s = now_s
    state.delayed = [(due_s + now_s, ticket, task) for due_s, ticket, task in state.delayed if task.delay == ticket]
    clients.set_grace(state)
    state.unswept = True
    if state.jobs or state.epoch > 1:
        state.judge_s = now_s + lease.judge_restart_s(state)
    lease.reset_alarm(state)
    return []
