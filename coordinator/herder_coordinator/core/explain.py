"""Why a task waits, why it runs where it runs, or why it ended as it did: a pure read, in words.

Nothing is kept for this but what each attempt's end has left behind (`Task.past`) and one fixed text about its last
placement: a reason to wait is found by asking again what the scheduler would ask, of the state as it is now.
"""

from __future__ import annotations

import math

from msgspec.structs import replace

from herder_coordinator.core import placement, reserve, shares, standstill, views
from herder_coordinator.core.apply import chunk_of
from herder_coordinator.core.state import OUTCOMES, UNITS, Chunk, Group, Job, Node, Queue, Request, State, Task
from herder_shared import limits
from herder_shared.ids import JobId, task_id
from herder_shared.states import AgentState, Outcome, TaskState
from herder_shared.wire.messages import Explanation, NodeVerdict, PastAttempt, TaskEnd

#: Nodes and dependencies that one answer lists.
NODES_LISTED_MAX = 50
DEPENDENCIES_LISTED_MAX = 20


def explain(state: State, job_id: JobId, index: int) -> Explanation | None:
    """Of one task. None: the job is not known (any more), or has no such task."""
    job = state.jobs.get(job_id)
    if job is None:
        end = state.end_of((job_id, index))
        return _of_end(job_id, end) if end is not None else None
    if not 0 <= index < job.count:
        return None
    if job.outcomes[index]:
        end = state.end_of((job_id, index))
        return _of_end(job_id, end) if end is not None else _forgotten(job, index)
    task = job.tasks.get(index)
    if task is None:
        found = chunk_of(job, index)
        assert found is not None
        return _pending(state, job, job.queue, index, None, before=_before(job.queue, *found))
    if task.node is not None:
        return _placed(state, task, task.node)
    if task.state is TaskState.WAITING:
        return _waiting(state, task)
    if task.delay:
        return _delayed(state, task)
    return _pending(state, job, task.queue, index, task)


# --- ended -----------------------------------------------------------------------------------------------------------


def _of_end(job: JobId, end: TaskEnd) -> Explanation:
    usage, failure = end.usage, end.failure
    last = PastAttempt(
        attempt=usage.attempt,
        node=usage.node,
        outcome=end.outcome,
        cause=failure.cause if failure is not None else None,
        message=failure.message if failure is not None else "",
        start_method=usage.start_method,
        queued_s=usage.queued_s,
        start_s=usage.start_s,
        wall_s=usage.wall_s,
        peak_memory_bytes=usage.peak_memory_bytes,
    )
    attempts = (*end.past, last) if usage.node else end.past
    where = f" on {usage.node}, attempt {usage.attempt}" if usage.node else ""
    why = f": {failure.message}" if failure is not None and failure.message else ""
    return Explanation(
        job=job,
        index=end.index,
        state=TaskState.ENDED,
        kind=end.outcome.value,
        summary=f"it {_WORDS[end.outcome]}{where}{why}",
        outcome=end.outcome,
        cause=failure.cause if failure is not None else None,
        node=usage.node or None,
        attempt=usage.attempt,
        attempts=attempts,
        failure=failure,
        waits_for=(failure.root,) if failure is not None and failure.root else (),
    )


_WORDS = {
    Outcome.SUCCEEDED: "succeeded",
    Outcome.FAILED: "failed",
    Outcome.CRASHED: "crashed",
    Outcome.OUT_OF_MEMORY: "ran out of memory",
    Outcome.TIMED_OUT: "timed out",
    Outcome.CANCELLED: "was cancelled",
    Outcome.LOST: "was lost",
}


def _forgotten(job: Job, index: int) -> Explanation:
    outcome = OUTCOMES[job.outcomes[index]]
    return Explanation(
        job=job.id,
        index=index,
        state=TaskState.ENDED,
        kind=outcome.value,
        summary=f"it {_WORDS[outcome]}; its client has the record, and no more of it is kept here",
        outcome=outcome,
    )


# --- with an attempt -------------------------------------------------------------------------------------------------


def _placed(state: State, task: Task, node: Node) -> Explanation:
    since_s = max(0.0, state.now_s - task.since_s - task.queued_s)
    details = [f"it is there because: {task.why}"] if task.why else []
    if task.lent:
        kind = "waiting_inside"
        summary = f"attempt {task.ordinal} runs on {node.name} and waits for tasks that it has submitted itself"
        details.append("its cores are given to others meanwhile")
    elif task.state is TaskState.RUNNING:
        kind, summary = "running", f"attempt {task.ordinal} runs on {node.name}, where it has been for {since_s:.1f} s"
    elif task.attempt in node.ahead:
        place = list(node.ahead).index(task.attempt)
        kind = "look_ahead"
        summary = f"attempt {task.ordinal} waits on {node.name} for a slot, behind {place} others that were sent ahead"
        details += standstill.holders(state, task.request)
    else:
        kind = "starting"
        summary = f"attempt {task.ordinal} was sent to {node.name} {since_s:.1f} s ago and has not started its code yet"
        report = node.reports.get(task.job.spec.workload.key)
        if report is not None and report.error:
            details.append(f"its workload cannot be started there: {report.error}")
        elif report is None or not any(template.state == "ready" for template in report.templates):
            details.append("its workload's template is not ready there yet")
    if node.state is AgentState.DISCONNECTED:
        details.append(f"the agent on {node.name} is disconnected; its attempts are kept until it is back or given up")
    if task.cancel or task.cancel_pending:
        details.append("it is being cancelled")
    if task.quarantine_s:
        details.append(
            "an earlier attempt was lost with its node: it runs beside no other such task until it is trusted"
        )
    return replace(_unended(task.job, task.index, task, (kind, summary), details), node=node.name, since_s=since_s)


def _unended(job: Job, index: int, task: Task | None, why: tuple[str, str], details: list[str]) -> Explanation:
    kind, summary = why
    return Explanation(
        job=job.id,
        index=index,
        state=task.state if task is not None else TaskState.PENDING,
        kind=kind,
        summary=summary,
        details=tuple(details),
        priority=job.priority,
        attempt=task.ordinal if task is not None else 0,
        attempts=task.past if task is not None else (),
    )


# --- without one -----------------------------------------------------------------------------------------------------


def _waiting(state: State, task: Task) -> Explanation:
    unended = [key for key in task.values or {} if (job := state.jobs.get(key[0])) and not job.outcomes[key[1]]]
    names = tuple(task_id(*key) for key in unended[:DEPENDENCIES_LISTED_MAX])
    details = []
    for key in unended[:DEPENDENCIES_LISTED_MAX]:
        other = explain(state, *key)
        if other is not None:
            details.append(f"{task_id(*key)}: {other.summary}")
    count = len(unended)
    summary = f"it waits for {count} task{'s' * (count != 1)} that it depends on" + (
        f", first {names[0]}" if names else ""
    )
    return replace(_unended(task.job, task.index, task, ("dependencies", summary), details), waits_for=names)


def _delayed(state: State, task: Task) -> Explanation:
    due_s = next((due_s for due_s, ticket, _ in state.delayed if ticket == task.delay), state.now_s)
    left_s = max(0.0, due_s - state.now_s)
    last = task.past[-1] if task.past else None
    why = f" after attempt {last.attempt}, which {_WORDS[last.outcome]} on {last.node}" if last is not None else ""
    summary = f"it is tried again in {left_s:.1f} s{why}"
    details = [last.message] if last is not None and last.message else []
    return replace(_unended(task.job, task.index, task, ("back_off", summary), details), back_off_s=left_s)


def _pending(state: State, job: Job, queue: Queue, index: int, task: Task | None, *, before: int = 0) -> Explanation:
    group = queue.group
    kind, summary = _why_pending(state, job, queue, task)
    nodes = tuple(verdict(state, node, group) for node in list(state.nodes.values())[:NODES_LISTED_MAX])
    details: list[str] = []
    if before:
        details.append(f"{before} task{'s' * (before != 1)} of its job come before it")
    if kind in {"turn", "no_room", "kept"}:
        details += _rank(state, job, group)
    if kind == "no_room":
        details += _standing_still(state, group)
    if group.reserved is not None:
        details.append(f"the node {group.reserved.name} is kept for it until there is room")
    if task is not None and task.avoid:
        details.append(f"it avoids {', '.join(task.avoid)} where there is a choice: earlier attempts ended badly there")
    if task is not None and task.grown is not None:
        details.append(f"it is given {group.request.memory_bytes} bytes of memory now, as it ran out of less")
    own, least = shares.use(job.owner_share, state) / UNITS, _least_use(state, group, job.owner) / UNITS
    explained = _unended(job, index, task, (kind, summary), details)
    return replace(explained, nodes=nodes, before=before, owner_use=own, least_use=least)


def _why_pending(state: State, job: Job, queue: Queue, task: Task | None) -> tuple[str, str]:
    if job.paused:
        return "paused", f"its job is paused: `herder resume {job.id}` lets it go on"
    if not state.nodes:
        return "no_agents", "no agent has ever connected: start some with `herder up` or `herder agent`"
    usable = [node for node in state.nodes.values() if placement.takes_attempts(node)]
    if not usable:
        counts: dict[str, int] = {}
        for node in state.nodes.values():
            counts[node.state] = counts.get(node.state, 0) + 1
        there = ", ".join(f"{count} {name}" for name, count in counts.items())
        return "no_agents", f"no node takes anything new now: {there}"
    able = [node for node in usable if placement.could_ever_fit(node, queue.group.request)]
    asked = placement.asked_for(queue.group.request)
    if not able:
        which = "the node that takes" if len(usable) == 1 else f"all {len(usable)} nodes that take"
        return "no_room", f"it asks for {asked}, which is more than {which} tasks now could ever give; others may come"
    fitting = [node for node in able if placement.room(node, queue.group.request, 1) and not node.ahead]
    others = [node for node in fitting if node.reserved is not None and node.reserved is not queue.group]
    if others and len(others) == len(fitting):
        return "kept", f"there is room ({asked}) only on nodes that are kept for others which have waited longer"
    if not fitting:
        if len(able) == 1:
            return (
                "no_room",
                f"it asks for {asked}, and {able[0].name}, the only node that could run it, does not have that free",
            )
        return "no_room", f"it asks for {asked}, and none of the {len(able)} nodes that could run it has that free"
    if task is not None and task.quarantine_s:
        return "turn", "it may have cost its last node, so it waits for a node without another such task"
    return "turn", "its turn has not come yet"


def _standing_still(state: State, group: Group) -> list[str]:
    """Waiting tasks that hold what is short, and what comes of it."""
    found = standstill.holders(state, group.request)
    if not found:
        return []
    details = [*found, "a task that waits gives up its cores, and keeps its memory, GPUs and named resources"]
    left_s = standstill.remaining_s(state)
    if left_s is not None:
        details.append(
            "nothing else can free that: in "
            f"{left_s:.0f} s tasks that wait for it begin to end as Unschedulable, if nothing changes"
        )
    return details


def _rank(state: State, job: Job, group: Group) -> list[str]:
    """Who goes before it."""
    details = []
    above = sum(1 for other in state.busy.values() if other.key.priority > group.key.priority)
    if above:
        details.append(
            f"{above} kind{'s' * (above != 1)} of tasks of a higher priority wait as well (its own: {job.priority})"
        )
    own, least = shares.use(job.owner_share, state), _least_use(state, group, job.owner)
    if least < own:
        details.append(
            f"others come first: its owner {job.owner!r} uses {own / UNITS:.2f} cores for his weight (now and lately), "
            f"whoever is next {least / UNITS:.2f}"
        )
    return details


def _least_use(state: State, group: Group, owner: str) -> float:
    owners = {other.key.owner for other in state.busy.values() if other.key.priority == group.key.priority}
    return min((shares.use(state.owners[name], state) for name in sorted(owners | {owner})), default=0.0)


def _before(queue: Queue, chunk: Chunk, offset: int) -> int:
    """Pending tasks of its queue that come before this entry of a chunk."""
    before = sum(task.queued is lane for lane in (queue.again, queue.careful, queue.suspects) for task in lane)
    for other in queue.chunks:
        if other is chunk:
            break
        before += other.left
    return before + sum(chunk.pending[chunk.next : offset])


def verdict(state: State, node: Node, group: Group) -> NodeVerdict:
    """What the node has to say to the group's tasks."""
    text = _shortage(state, node, group)
    return NodeVerdict(node.name, not text, text or "has room")


def _shortage(state: State, node: Node, group: Group) -> str:
    request = group.request
    if node.state in {AgentState.DISCONNECTED, AgentState.LOST}:
        return f"is {node.state}"
    if node.state is AgentState.DRAINING:
        reason = views.why_draining(state, node)
        return "is draining" + (f": {reason}" if reason else "")
    if not node.synced:
        return "has just connected"
    if request.nodes and node.labels.isdisjoint(request.nodes):
        return f"has none of the names or labels {list(request.nodes)}"
    if not placement.could_ever_fit(node, request):
        return "is too small: " + "; ".join(_lacks(request, node, free=False))
    lacks = _lacks(request, node, free=True)
    if lacks:
        return "; ".join(lacks)
    if node.ends_s < math.inf and not placement.ends_in_time(state, node, request, math.inf):
        left_s = node.ends_s - state.now_s - limits.NODE_END_MARGIN_S
        return f"ends too soon: in {left_s:.0f} s, and the task may take {request.limit_s:g} s"
    if (
        node.reserved is not None
        and node.reserved is not group
        and not reserve.backfill(state, node, group, math.inf, 1)
    ):
        return f"is kept for a task of job {next(iter(node.reserved.queues), '?')}"
    if node.ahead:
        return f"has {len(node.ahead)} attempts in its look-ahead, which come first"
    return ""


def _lacks(request: Request, node: Node, *, free: bool) -> list[str]:
    """What is missing there: of what is free, or of what the node has at all."""
    word = "free" if free else "there"
    cores, memory_bytes, gpus = node.cores, node.memory_bytes, node.gpus
    named = node.resources
    if free:
        cores, memory_bytes, gpus, named = node.free_cores, node.free_memory_bytes, node.free_gpus, node.free_resources
    lacks = []
    if request.cores > cores:
        lacks.append(f"{cores / UNITS:g} of {node.cores / UNITS:g} cores {word}, it needs {request.cores / UNITS:g}")
    if request.memory_bytes > memory_bytes:
        lacks.append(f"{memory_bytes} of {node.memory_bytes} bytes of memory {word}, it needs {request.memory_bytes}")
    if request.gpus > gpus:
        lacks.append(f"{gpus} of {node.gpus} GPUs {word}, it needs {request.gpus}")
    for name, amount in request.resources:
        has = named.get(name, 0)
        if amount > has:
            total = node.resources.get(name, 0)
            lacks.append(f"{has / UNITS:g} of {total / UNITS:g} {name} {word}, it needs {amount / UNITS:g}")
    if free and not lacks and not placement.room(node, request, 1):
        lacks.append("has no room")
    return lacks
