"""Cores that tasks give up while they wait for tasks of their own, and take back before they go on.

Only cores change hands. Memory, GPUs and named resources stay with the task, as its process does: they could not be
taken from it. While its cores are lent an attempt asks for none, so that every account of what is held goes on as for
any other; what it asked for is kept in `State.lent`. Tasks that want their cores back stand in `State.returning` and go
before anything that is queued, first come, first served: each of them is a process in memory with work half done, and
what is queued has nothing yet. None can be overtaken for ever: whatever takes cores ends, or waits and gives them up.
"""

from __future__ import annotations

from msgspec.structs import replace

from herder_agent.core import launchers
from herder_agent.core.effects import Effect, RefuseClient, ReportSlot, ResumeTask
from herder_agent.core.state import CORE_STATE, Attempt, Phase, State
from herder_shared.limits import LENT_MAX


def wait_began(state: State, attempt: Attempt, now_s: float, effects: list[Effect]) -> None:
    """The task waits: others may have its cores."""
    launchers.start_running(state, attempt, now_s, effects)  # whatever it has not said yet
    if attempt.phase is not Phase.RUNNING or attempt.slot is None:
        return
    if attempt.id in state.lent:
        if state.returning.pop(attempt.id, None) is not None:
            effects.append(ReportSlot(attempt.id, lent=True))
        return
    if len(state.lent) >= LENT_MAX:
        text = (
            f"{LENT_MAX} tasks of node {state.node} wait for tasks of their own already, each in a process: submit "
            "more before you wait, or nest less deeply"
        )
        effects.append(RefuseClient(attempt.id, text))
        return
    request = attempt.request
    state.account.move(request.cores, CORE_STATE[attempt.phase], None)
    attempt.charged_core_s += request.cores * max(0.0, now_s - (attempt.held_s or attempt.slot_s))
    state.lent[attempt.id] = request
    attempt.request = replace(request, cores=0.0)
    attempt.slot = state.slots.lend(attempt.slot)
    effects.append(ReportSlot(attempt.id, lent=True))


def wait_ended(state: State, attempt: Attempt, n: int, effects: list[Effect]) -> None:
    """The task wants to go on; `n` tells this wait from others."""
    if attempt.slot is None:
        return  # it has not started: whoever says so is not it
    if attempt.id not in state.lent:
        effects.append(_resumed(state, attempt, n))
    elif attempt.id in state.returning:
        state.returning[attempt.id] = n
    else:
        state.returning[attempt.id] = n
        effects.append(ReportSlot(attempt.id, lent=False))


def take_back(state: State, now_s: float, effects: list[Effect]) -> None:
    """Give cores to those that want theirs back, as far as there are free ones."""
    while state.returning and not state.slots.is_full:
        attempt_id, n = next(iter(state.returning.items()))
        attempt = state.attempts[attempt_id]
        assert attempt.slot is not None
        request = state.lent[attempt_id]
        slot = state.slots.retake(attempt.slot, request)
        if slot is None:
            return
        del state.returning[attempt_id], state.lent[attempt_id]
        attempt.slot, attempt.request, attempt.held_s = slot, request, now_s
        state.account.move(request.cores, None, CORE_STATE[attempt.phase])
        effects.append(_resumed(state, attempt, n))


def _resumed(state: State, attempt: Attempt, n: int) -> ResumeTask:
    return ResumeTask(attempt.id, n, launchers.grant(state, attempt).cpus)
