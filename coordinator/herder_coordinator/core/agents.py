"""Agents come, say what they have, report, fall silent and go.

What is late is normal here. A message of an older session is dropped: whatever it said, the newer session's `Sync` says
better. An attempt is kept only while the agent that was given it can still have it: a new incarnation of the agent has
none of the old one's, and a `Sync` lists all that there is.
"""

from __future__ import annotations

import math

from herder_coordinator.core import apply, events, lease, placement, quarantine
from herder_coordinator.core.ends import attempt_ended, is_foreign, lost, never_arrived, note_fault
from herder_coordinator.core.state import Node, State, Task
from herder_coordinator.core.turn import Turn
from herder_shared.ids import AttemptId, NodeName
from herder_shared.limits import NODE_END_MARGIN_S, SD_LOST_AGENT_S
from herder_shared.states import AGENT_TRANSITIONS, AgentState, Cause, TaskState
from herder_shared.wire.messages import Drain, RunningAttempt, SyncOk

#: Reports of workloads that are kept of one node.
REPORTS_MAX = 200


def move(node: Node, to: AgentState) -> None:
    """The one place where an agent's state changes, but for draining."""
    assert node.state is to or to in AGENT_TRANSITIONS[node.state], f"{node.name}: {node.state} to {to}"
    node.state = to


def connected(turn: Turn, event: events.AgentConnected) -> None:
    """Hello and welcome are through. Nothing is sent before the agent's `Sync`."""
    state = turn.state
    name = event.facts.node
    if event.serial in state.revoked:  # it came in the very turn in which it was revoked, and is turned out by now
        return
    node = state.nodes.get(name)
    if node is None:
        node = apply.node_of(state, name, event.incarnation)
        state.judge_s = max(state.judge_s, state.now_s + lease.JUDGE_S)
    if node.session:
        # The newer connection is the true one: the older has not been noticed to be dead, or it is a second agent.
        turn.drop_agent(name, node.session, "another connection of this node replaced it")
    if node.incarnation != event.incarnation:
        _lose_all(turn, node, list(node.attempts.values()), "its agent was started anew")
        node.incarnation = event.incarnation
        node.reports.clear()
        node.warm.clear()
        node.start_failures.clear()
    node.session = event.session
    node.serial = event.serial
    node.synced = False
    node.fault = ""
    node.ends_s = math.inf if event.facts.ends_in_s is None else state.now_s + event.facts.ends_in_s
    node.is_ending = node.ends_s - state.now_s <= NODE_END_MARGIN_S
    node.draining = name in state.drained or node.is_ending
    node.doubtful.clear()
    node.told_workloads.clear()
    node.told_jobs.clear()
    node.report = None
    move(node, AgentState.DRAINING if node.draining else AgentState.READY)
    lease.heard(state, node)
    placement.set_facts(state, node, event.facts)
    turn.count("node_up", (("node", name),))
    turn.wake = True


def session_of(state: State, name: NodeName, session: int) -> Node | None:
    """The node, if this is its current session; it has been heard of then."""
    node = state.nodes.get(name)
    if node is None or not session or node.session != session:
        return None
    lease.heard(state, node)
    return node


def synced(turn: Turn, event: events.AgentSynced) -> None:
    """The agent's inventory: keep, adopt or drop each attempt; what it does not have has never arrived there."""
    node = session_of(turn.state, event.node, event.session)
    if node is None or node.synced:
        return
    before = dict(node.attempts)
    node.synced = True
    drop: list[AttemptId] = []
    for one in event.running:
        before.pop(one.attempt, None)
        if not _keep(turn, node, one):
            drop.append(one.attempt)
    # What is dropped has a terminal record or a newer attempt, which must be on disk before the agent forgets.
    turn.to_agent(node, SyncOk(event.session, tuple(drop)), durable=bool(drop))
    if node.draining:
        turn.to_agent(node, Drain(on=True))
    for end in event.ended:
        before.pop(end.attempt, None)
        attempt_ended(turn, node, end)
    unlisted = {attempt: task for attempt, task in before.items() if attempt in node.attempts}
    if event.more:
        node.doubtful = unlisted
    else:
        _settle(turn, node, unlisted)
    placement.refresh(turn.state, node)
    turn.wake = True


def _keep(turn: Turn, node: Node, one: RunningAttempt) -> bool:
    """Whether an attempt that the agent has is wanted."""
    state = turn.state
    job = state.jobs.get(one.job)
    if job is None or not 0 <= one.index < job.count or job.outcomes[one.index]:
        return False
    task = job.tasks.get(one.index)
    if task is None or task.attempt != one.attempt or task.node is not node:
        if is_foreign(state, node, task, one.attempt) or (task is not None and not _adoptable(task, one.attempt)):
            return False
        task = apply.task_of(state, job, one.index)
        assert task is not None
        if task.node is not None:
            turn.ack(task.node, task.attempt)
        ordinal = task.ordinal + (task.attempt != one.attempt)
        task.quarantine_s = 0.0  # the node is not lost after all
        turn.assign(task, node, one.attempt, ordinal=max(ordinal, 1), fresh=task.fresh)
    if task.cancel or ((task.cancel_pending or job.cancelled) and not one.started):
        turn.cancel(node, one.attempt, waiting_only=not task.cancel)
    if one.started:
        _started(turn, node, task)
    if one.lent:
        placement.lend(state, node, task)
    return True


def _adoptable(task: Task, attempt: AttemptId) -> bool:
    """An attempt is unknown here if a life of the coordinator lost its record, or was given up and is back again."""
    if task.state is TaskState.WAITING:
        return False
    return attempt > task.attempt or (attempt == task.attempt and task.node is None)


def _settle(turn: Turn, node: Node, unlisted: dict[AttemptId, Task]) -> None:
    for attempt, task in unlisted.items():
        if node.attempts.get(attempt) is not task:
            continue
        if task.state is TaskState.RUNNING:
            lost(turn, task, Cause.NODE_LOST, f"the agent on {node.name} no longer has the attempt")
        else:
            never_arrived(turn, task)


def heard(turn: Turn, event: events.AgentHeard) -> None:
    node = session_of(turn.state, event.node, event.session)
    if node is None:
        return
    if event.report is not None:
        node.report = event.report
        if event.report.fault != node.fault:
            note_fault(turn, node, event.report.fault)
    if node.doubtful:
        doubtful, node.doubtful = node.doubtful, {}
        _settle(turn, node, doubtful)


def attempts_started(turn: Turn, event: events.AttemptsStarted) -> None:
    node = session_of(turn.state, event.node, event.session)
    if node is None:
        return
    for attempt in event.attempts:
        task = node.attempts.get(attempt)
        if task is not None:
            _started(turn, node, task)


def slots_changed(turn: Turn, event: events.SlotsChanged) -> None:
    """Attempts wait for tasks of their own, or have waited enough."""
    node = session_of(turn.state, event.node, event.session)
    if node is None:
        return
    for attempts, change in ((event.lent, placement.lend), (event.reclaimed, placement.reclaim)):
        for attempt in attempts:
            task = node.attempts.get(attempt)
            if task is not None:
                change(turn.state, node, task)
                turn.wake = True


def _started(turn: Turn, node: Node, task: Task) -> None:
    if task.state is TaskState.ASSIGNED:
        apply.move(task, TaskState.RUNNING)
        turn.started(task.job, task.index, node.name)


def attempts_ended(turn: Turn, event: events.AttemptsEnded) -> None:
    node = session_of(turn.state, event.node, event.session)
    if node is None:
        return
    for end in event.ends:
        attempt_ended(turn, node, end)


def reported(turn: Turn, event: events.WorkloadsReported) -> None:
    node = session_of(turn.state, event.node, event.session)
    if node is None:
        return
    for report in event.reports:
        node.reports[report.key] = report
        if any(template.state == "ready" for template in report.templates):
            node.warm.add(report.key)
        else:
            node.warm.discard(report.key)
    while len(node.reports) > REPORTS_MAX:
        oldest = next(iter(node.reports))
        del node.reports[oldest]
        node.warm.discard(oldest)


def disconnected(turn: Turn, event: events.AgentDisconnected) -> None:
    """The connection closed. A killed agent's does so at once, so what may run twice waits for a short grace only."""
    state = turn.state
    node = state.nodes.get(event.node)
    if node is None or node.session != event.session:
        return
    node.session = 0
    node.synced = False
    move(node, AgentState.DISCONNECTED)
    if state.now_s >= state.excused_until_s:
        node.grace_s = state.now_s + state.periods.reconnect_grace_s
        lease.alarm(state, node.grace_s)
    placement.refresh(state, node)
    turn.count("node_disconnected", (("node", node.name),))


def check_leases(turn: Turn) -> None:
    """Give up what was waited for in vain, and forget nodes that have been lost for long."""
    state = turn.state
    for node in list(state.nodes.values()):
        if node.state is AgentState.LOST:
            if state.now_s >= node.lease_s + SD_LOST_AGENT_S and not node.attempts:
                _forget(state, node)
            continue
        if node.grace_s is not None and state.now_s >= node.grace_s:
            node.grace_s = None
            repeatable = [task for task in node.attempts.values() if task.job.spec.options.idempotent]
            _lose_all(turn, node, repeatable, "its agent's connection closed and did not come back")
        if state.now_s >= node.lease_s:
            _lapse(turn, node)


def _lapse(turn: Turn, node: Node) -> None:
    """The lease is over."""
    if node.session:
        turn.drop_agent(node.name, node.session, f"nothing was heard of it for {turn.state.periods.lease_s:g} s")
    give_up(turn, node, "nothing was heard of its agent for a whole lease")


def give_up(turn: Turn, node: Node, why: str, part: quarantine.Part | None = None) -> None:
    """The node is lost, with all that it has. `part`: what each of its attempts had to do with that, where it is
    known."""
    if node.session:
        node.session = 0
        node.synced = False
    move(node, AgentState.LOST)
    node.grace_s = None
    placement.refresh(turn.state, node)
    _lose_all(turn, node, list(node.attempts.values()), why, part)
    turn.count("node_lost", (("node", node.name),))


def _lose_all(turn: Turn, node: Node, tasks: list[Task], why: str, part: quarantine.Part | None = None) -> None:
    parts = quarantine.parts_in_loss(turn.state, node)
    for task in tasks:
        text = f"the node {node.name} was lost: {why}"
        lost(turn, task, Cause.NODE_LOST, text, part or parts[task.attempt])


def _forget(state: State, node: Node) -> None:
    del state.nodes[node.name]
    for group in state.groups.values():
        group.schedulable = False
