"""Deadlines: how long an agent is trusted, a client waited for, a retry held back; and how our own stalls are forgiven.

An agent is *heard* with every message of its session and lost when its lease is over. A connection that closes says
more than silence does (the kernel closes a killed process's at once), so attempts which may run twice wait for the same
incarnation only for the reconnect grace; those that may not (`idempotent=False`) have nothing to gain by hurry and
wait for the whole lease. After a restart of the coordinator every agent has the restart grace to be back.

A coordinator that was stopped itself (SIGSTOP, a paused machine, a slow disk) must not conclude that everybody else
was: when it is called later than it should have been, every deadline moves by as much. After a long stall agents will
have left it and dialled in vain: that their connections are closed says nothing then, and the lease alone counts.
"""

from __future__ import annotations

import math

from herder_coordinator.core.state import Node, State
from herder_shared import limits
from herder_shared.states import AgentState

#: The shell steps at least this often.
TICK_S = 0.5
#: A task's back-off between attempts never grows beyond this.
TASK_BACKOFF_S_MAX = 300.0
#: First and longest wait after a loss or a failed start, from the second on: so that a broken node does not spin.
LOSS_BACKOFF_S = 0.1
LOSS_BACKOFF_S_MAX = 5.0
#: Ended jobs of a client that is gone are kept for this long, should it come back and ask.
FORGET_S = 600.0
#: A request is judged impossible only when no new agent came for this long; after a restart, they may be slower.
JUDGE_S = 2.0
JUDGE_RESTART_S = 10.0
#: A closed connection is no news for this long after a stall of half a lease: so long a dialler may wait for an answer
#: that does not come, and then before it dials again.
EXCUSED_S = limits.HANDSHAKE_TIMEOUT_S + limits.BACKOFF_S_MAX


def judge_restart_s(state: State) -> float:
    """How long a new life waits before it says that no node could ever run a task. An agent on which nothing runs is
    not in the journal, and hangs for a lease on a coordinator that was stopped, and from which this one took over; then
    it may dial that one once more."""
    return max(JUDGE_RESTART_S, state.periods.lease_s + EXCUSED_S)


def task_backoff_s(base_s: float, failures: int) -> float:
    """The wait before the attempt that follows failure number `failures` (from 1): doubles each time, capped."""
    if base_s <= 0:
        return 0.0
    return float(min(base_s * 2.0 ** min(failures - 1, 30), TASK_BACKOFF_S_MAX))


def loss_backoff_s(crashes: int) -> float:
    """The wait after loss number `crashes` (from 1): none after the first."""
    if crashes <= 1:
        return 0.0
    return float(min(LOSS_BACKOFF_S * 2.0 ** min(crashes - 2, 30), LOSS_BACKOFF_S_MAX))


def heard(state: State, node: Node) -> None:
    """A message came: the lease begins anew."""
    node.heard_s = state.now_s
    node.lease_s = state.now_s + state.periods.lease_s
    node.grace_s = None


def restart_grace_s(state: State) -> float:
    """For how long assigned tasks stay bound to their agents after a restart."""
    return max(state.periods.restart_grace_s, 2 * state.periods.lease_s)


def next_deadline_s(state: State) -> float | None:
    """When `Ticked` is due at the latest, because something will have to be decided then; None: at the usual tick."""
    due_s = min(state.alarm_s, state.delayed[0][0]) if state.delayed else state.alarm_s
    if state.judge_s > state.now_s and any(not group.schedulable for group in state.busy.values()):
        due_s = min(due_s, state.judge_s)
    return due_s if due_s < math.inf else None


def alarm(state: State, due_s: float) -> None:
    """A deadline was set: see to it that the next tick comes in time."""
    state.alarm_s = min(state.alarm_s, due_s)


def reset_alarm(state: State) -> None:
    """All deadlines were looked at: the next one of agents and clients. Leases that are renewed only move it back."""
    times = [node.lease_s for node in state.nodes.values() if node.state is not AgentState.LOST]
    times += [node.grace_s for node in state.nodes.values() if node.grace_s is not None]
    times += [client.gone_s for client in state.clients.values() if client.gone_s is not None]
    state.alarm_s = min(times, default=math.inf)


def forgive_stall(state: State, now_s: float) -> float:
    """If this step comes later than it should have, move every deadline by as much. Returns the seconds moved."""
    late_s = now_s - state.now_s - TICK_S
    if late_s <= limits.SELF_STALL_S or not state.now_s:
        return 0.0
    for node in state.nodes.values():
        node.lease_s += late_s
        if node.grace_s is not None:
            node.grace_s += late_s
    for client in state.clients.values():
        if client.gone_s is not None:
            client.gone_s += late_s
    for job in state.jobs.values():
        if job.forget_s is not None:
            job.forget_s += late_s
    if state.judge_s > state.now_s:  # agents may have come meanwhile, and are about to be heard of
        state.judge_s += late_s
    if late_s >= state.periods.lease_s / 2:
        state.excused_until_s = now_s + EXCUSED_S
    reset_alarm(state)
    return late_s
