"""Was it the fork? What crashes of forked children say of their workload, and when they end its forking.

A forked child that dies of a signal, or is proved deadlocked, died of the fork or of its task; its free rerun in a
fresh interpreter tells which. A rerun that crashes as well, or runs out of memory or time, acquits the fork: it was the
task's own doing, and counts for nothing. A rerun that the task survives (it gives a value, or raises) is evidence:

=======================================================  ==========
a proved deadlock which the rerun survived               weight 2
a signal which the rerun survived                        weight 1
a proved deadlock of a task which may not be run again   weight 1
=======================================================  ==========

`WEIGHT_LIMIT` within the last `WINDOW` forked attempts demote the workload to fresh interpreters on every node: so one
deadlock, or two crashes. A crash in thousands of forks does not, as its rerun is cheaper than fresh interpreters for
all. A task is run again so once only, so that each piece of evidence is of another task. Nothing promotes a workload
again: the verdict is in the journal, and forgotten with the workload itself, when none of its jobs is known any more.
"""

from __future__ import annotations

from herder_coordinator.core import apply, records
from herder_coordinator.core.state import Evidence, KeptWorkload, Task
from herder_coordinator.core.turn import Turn
from herder_shared.states import Cause, Outcome
from herder_shared.wire.messages import AttemptEnd, Notice, StartAttempts

WEIGHT_LIMIT = 2
#: In forked attempts. At two crashes in a thousand the reruns cost as much as all the forks, and users begin to notice.
WINDOW = 1000
_WEIGHTS = {Cause.DEADLOCK: 2, Cause.SIGNAL: 1}
_WORDS = {
    Cause.DEADLOCK: "deadlocked (every thread waited for a lock that no thread held)",
    Cause.SIGNAL: "died of a signal",
}


def note_end(turn: Turn, task: Task, end: AttemptEnd) -> None:
    """An attempt has ended: note what it says of forking, and demote the workload if that is enough."""
    is_forked = end.usage.start_method == "fork"
    if not is_forked and task.suspect is None:
        return
    kept = turn.state.workloads.get(task.job.spec.workload.key)
    if kept is None:
        return
    kept.forked += is_forked
    found = _unrepeatable(task, end, kept) if is_forked else _judged(task, end, kept)
    if found is None or kept.demoted:
        return
    kept.evidence = [one for one in kept.evidence if found.at - one.at < WINDOW]
    kept.evidence.append(found)
    reason = verdict(kept.evidence)
    if reason:
        _demote(turn, kept, found.cause, reason)


def verdict(evidence: list[Evidence]) -> str:
    """Why a workload with this evidence is not to be forked any more; "" as long as it may."""
    if sum(one.weight for one in evidence) < WEIGHT_LIMIT:
        return ""
    counts = {cause: sum(one.cause is cause for one in evidence) for cause in _WORDS}
    seen = " and ".join(
        f"{count} forked child{'ren' * (count > 1)} {_WORDS[cause]}" for cause, count in counts.items() if count
    )
    return f"{seen} where fresh interpreters did not: its tasks are given fresh interpreters from now on"


def _judged(task: Task, end: AttemptEnd, kept: KeptWorkload) -> Evidence | None:
    """The end of the free rerun. One that was lost or cancelled says nothing yet."""
    cause = task.suspect
    assert cause is not None
    if end.outcome in {Outcome.LOST, Outcome.CANCELLED}:
        return None
    task.suspect = None
    is_own = end.failure is not None and end.failure.cause is Cause.EXCEPTION
    return Evidence(kept.forked, _WEIGHTS[cause], cause) if end.outcome is Outcome.SUCCEEDED or is_own else None


def _unrepeatable(task: Task, end: AttemptEnd, kept: KeptWorkload) -> Evidence | None:
    is_proved = end.failure is not None and end.failure.cause is Cause.DEADLOCK
    spec = task.job.spec
    if is_proved and spec.workload.start == "auto" and not spec.options.idempotent:
        return Evidence(kept.forked, 1, Cause.DEADLOCK)
    return None


def _demote(turn: Turn, kept: KeptWorkload, cause: Cause, reason: str) -> None:
    """Tell every agent that knows the workload, and the clients that use it. Other agents are told with it."""
    state, key = turn.state, kept.spec.key
    apply.demote(state, key, reason)
    turn.record(records.WorkloadDemoted(key, reason))
    turn.count("workload_demoted", (("workload", kept.spec.name), ("reason", cause.value)))
    spec = apply.told_spec(state, kept.spec)
    for node in state.nodes.values():
        if node.session and key in node.told_workloads:
            turn.to_agent(node, StartAttempts(node.session, (), (spec,)))
    text = f"workload {kept.spec.name!r} is not forked any more: {reason}"
    for client in dict.fromkeys(job.client for job in state.jobs.values() if job.spec.workload.key == key):
        turn.to_client(client, Notice("warning", text), durable=False)
