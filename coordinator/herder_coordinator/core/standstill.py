"""Tasks that hold what the tasks for which they wait need: in words, and their end when nothing else can free it.

A task that waits for tasks of its own gives up its cores, and keeps its memory, GPUs and named resources: they could
not be taken from a process. So it may hold the very GPU which its child asks for, and both wait for ever.

What is a standstill: a set of tasks of which each waits, has no `timeout`, and has unended tasks before it (of its
client's jobs) of which none can do anything until another member of the set has ended. A task *can* do something if it
runs and does not wait itself; if it waits for a task outside of what is looked at; if it is in a back-off, or paused by
somebody who may resume it; or if it would have room on some node once everything but the set has ended there. Nodes
that are away may come back with room. The largest such set is found by leaving out, again and again, whoever does not
belong.

What cannot be seen: a thread of a member that computes while another one waits, and a wait that ends by itself
(`result(timeout=...)`). So a standstill must last for `STANDSTILL_S`, by the same members, before anything follows from
it. Then the tasks that cannot run and for which one member waits end as `Unschedulable`, which that member gets to see;
the deepest member, and of those the youngest: it has the least to lose, and what it holds may be enough for the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from herder_coordinator.core import placement
from herder_coordinator.core.ends import end_pending, recall_ahead
from herder_coordinator.core.state import UNITS, Group, Job, Node, Request, State, Task
from herder_coordinator.core.turn import Turn
from herder_shared.ids import AttemptId, JobId, NodeName, task_id
from herder_shared.states import Cause, TaskState
from herder_shared.wire.messages import Failure

#: For how long a standstill must have lasted: longer than a wait with a timeout of its own usually is.
STANDSTILL_S = 60.0
#: How often it is looked for.
LOOK_EVERY_S = 5.0
#: Holders that one explanation names.
HOLDERS_NAMED_MAX = 5


def check(turn: Turn) -> None:
    """Look for a standstill from time to time, and end one that lasts."""
    state = turn.state
    if not state.task_clients:
        state.standstill = ()
        return
    if state.now_s < state.standstill_look_s:
        return
    state.standstill_look_s = state.now_s + LOOK_EVERY_S
    _recall(turn)
    members = find(state)
    if tuple(members) != state.standstill:
        state.standstill, state.standstill_s = tuple(members), state.now_s
    elif members and state.now_s >= state.standstill_s + STANDSTILL_S:
        state.standstill = ()
        _end_one(turn, members)


def _recall(turn: Turn) -> None:
    """What was sent ahead, before somebody there began to wait, and now lies behind what that one holds."""
    state = turn.state
    for node in {node.name: node for node, _ in _waiting(state)}.values():
        ahead = [node.attempts[attempt] for attempt in node.ahead]
        recall_ahead(turn, [task for task in ahead if not fits_beside_waiting(state, node, task.request)])


def fits_beside_waiting(state: State, node: Node, wanted: Request) -> bool:
    """Whether there would be room on the node if all ended there but the tasks that wait for tasks of their own."""
    if not state.task_clients or not (wanted.memory_bytes or wanted.gpus or wanted.resources):
        return True
    attempts = sorted(state.task_clients.keys() & node.attempts.keys())
    kept = [node.attempts[attempt].request for attempt in attempts if node.attempts[attempt].lent]
    return not _is_taken(node, wanted, kept)


def _end_one(turn: Turn, members: dict[AttemptId, Task]) -> None:
    state = turn.state
    attempt, member = max(members.items(), key=lambda one: (one[1].job.depth, one[0]))
    name = task_id(member.job.id, member.index)
    look = _Look(state, members)
    for job in _watched(state, attempt):
        for queue in job.queues:
            if queue.pending and not job.paused and look.is_hopeless(queue.group):
                text = (
                    f"it can never run: it asks for {placement.asked_for(queue.group.request)}, and what it lacks is "
                    f"held by tasks that wait, this one's parent {name} among them, for tasks that cannot run either: "
                    f"{'; '.join(holders(state, queue.group.request))}. Ask for less in the parent, which gives up its "
                    "cores while it waits and nothing else, or return from it before its tasks need what it holds"
                )
                end_pending(turn, queue, Failure(cause=Cause.UNSCHEDULABLE, message=text))


# --- in words ---------------------------------------------------------------------------------------------------------


def holders(state: State, request: Request) -> list[str]:
    """Tasks that wait, and hold what the request lacks on nodes that could run it: which, where, and what."""
    found = []
    for node, task in _waiting(state):
        if placement.could_ever_fit(node, request) and (held := _held_of_lacking(node, task.request, request)):
            name, what = task_id(task.job.id, task.index), " and ".join(held)
            found.append(f"{name} on {node.name} holds {what} while it waits for tasks of its own")
    more = len(found) - HOLDERS_NAMED_MAX
    return found[:HOLDERS_NAMED_MAX] + ([f"and {more} more"] if more > 0 else [])


def remaining_s(state: State) -> float | None:
    """In how long a standstill is ended; None: there is none, as far as is known."""
    return max(0.0, state.standstill_s + STANDSTILL_S - state.now_s) if state.standstill else None


def _held_of_lacking(node: Node, held: Request, wanted: Request) -> list[str]:
    words = []
    if held.memory_bytes and wanted.memory_bytes > node.free_memory_bytes:
        words.append(f"{held.memory_bytes} bytes of memory")
    if held.gpus and wanted.gpus > node.free_gpus:
        words.append(f"{held.gpus} GPU{'s' * (held.gpus != 1)}")
    has = dict(held.resources)
    for name, amount in wanted.resources:
        if has.get(name) and amount > node.free_resources.get(name, 0):
            words.append(f"{has[name] / UNITS:g} {name}")
    return words


# --- the largest set --------------------------------------------------------------------------------------------------


def find(state: State) -> dict[AttemptId, Task]:
    """The members, in the order of their attempts. Costs nothing to speak of where no task that waits holds more than
    cores."""
    waiting = _waiting(state)
    if not any(task.request.memory_bytes or task.request.gpus or task.request.resources for _, task in waiting):
        return {}
    members = {task.attempt: task for _, task in waiting if task.request.limit_s == math.inf and not task.cancel}
    while members:
        look = _Look(state, members)
        staying = {attempt: task for attempt, task in members.items() if look.is_stuck(attempt)}
        if len(staying) == len(members):
            break
        members = staying
    return dict(sorted(members.items()))


def _waiting(state: State) -> list[tuple[Node, Task]]:
    """Tasks that wait for tasks of their own, and where."""
    return [
        (node, node.attempts[attempt])
        for node in state.nodes.values()
        if node.session
        for attempt in sorted(state.task_clients.keys() & node.attempts.keys())
        if node.attempts[attempt].lent
    ]


def _watched(state: State, attempt: AttemptId) -> list[Job]:
    """The jobs whose ends the attempt's client hears of."""
    client = state.clients.get(state.task_clients[attempt])
    return [state.jobs[job] for job in client.watched if job in state.jobs] if client is not None else []


@dataclass(slots=True)
class _Look:
    """One look at who is stuck if all of `members` are."""

    state: State
    members: dict[AttemptId, Task]
    _hopeless: dict[int, bool] = field(default_factory=dict)
    _kept: dict[NodeName, list[Request]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for task in self.members.values():
            assert task.node is not None
            self._kept.setdefault(task.node.name, []).append(task.request)

    def is_stuck(self, attempt: AttemptId) -> bool:
        """Whether it waits for something, and nothing for which it may wait can do anything."""
        jobs = [job for job in _watched(self.state, attempt) if job.ended < job.count]
        inside = {job.id for job in jobs}
        return bool(jobs) and all(self._is_job_stuck(job, inside) for job in jobs)

    def _is_job_stuck(self, job: Job, inside: set[JobId]) -> bool:
        if job.paused or (job.pending and not self.is_hopeless(job.queue.group)):
            return False
        return all(self._is_task_stuck(task, inside) for task in job.tasks.values())

    def _is_task_stuck(self, task: Task, inside: set[JobId]) -> bool:
        if task.node is not None:
            return task.attempt in self.members
        if task.state is TaskState.WAITING:  # for what is stuck as well, if that is all looked at
            return all(key[0] in inside for key in self._unended(task))
        return not task.delay and self.is_hopeless(task.queue.group)

    def _unended(self, task: Task) -> list[tuple[JobId, int]]:
        found = []
        for key in task.values or {}:
            job = self.state.jobs.get(key[0])
            if job is not None and not job.outcomes[key[1]]:
                found.append(key)
        return found

    def is_hopeless(self, group: Group) -> bool:
        """Whether a task of the group would have no room anywhere, though everything but the members ended."""
        known = self._hopeless.get(group.number)
        if known is None:
            able = [node for node in self.state.nodes.values() if placement.could_ever_fit(node, group.request)]
            known = bool(able) and all(self._is_taken(node, group.request) for node in able)
            self._hopeless[group.number] = known
        return known

    def _is_taken(self, node: Node, wanted: Request) -> bool:
        if node.facts is None or not node.session or not node.synced:
            return False
        return _is_taken(node, wanted, self._kept.get(node.name, []))


def _is_taken(node: Node, wanted: Request, kept: list[Request]) -> bool:
    """Whether too little is left of the node's memory, GPUs and named resources beside these."""
    named = dict(node.resources)
    for request in kept:
        for name, amount in request.resources:
            named[name] = named.get(name, 0) - amount
    return (
        wanted.memory_bytes > node.memory_bytes - sum(request.memory_bytes for request in kept)
        or wanted.gpus > node.gpus - sum(request.gpus for request in kept)
        or any(amount > named.get(name, 0) for name, amount in wanted.resources)
    )
