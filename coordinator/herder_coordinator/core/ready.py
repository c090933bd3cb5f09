"""Who is next: pending groups in order, each given to `placement` for as many tasks as there are slots.

Order: priority, then the owners in turn, then submission. A group that fits nowhere does not hold up those behind it.
When no free slot fits, agents get a little more than they can start at once (look-ahead), so that a slot which becomes
free need not wait for the way to the coordinator and back: only tasks that may run twice, and only where it is known
that the attempts are short; never more than covers `LOOK_AHEAD_S`, so that little is stuck behind a slot if another
node runs dry.
"""

from __future__ import annotations

from collections.abc import Iterable

from herder_coordinator.core import apply, placement, quarantine
from herder_coordinator.core.ends import end_failed
from herder_coordinator.core.state import UNITS, Chunk, Group, Node, Request, State, Task
from herder_coordinator.core.turn import Turn
from herder_shared import limits
from herder_shared.ids import AttemptId, BlobId
from herder_shared.states import Cause, Outcome
from herder_shared.wire.messages import Failure

#: Attempts that one owner gets before it is the next one's turn.
OWNER_SLICE = 8
_ALL = limits.ARRAY_TASKS_MAX


def dispatch(turn: Turn) -> None:
    """Give out whatever has room somewhere."""
    state = turn.state
    judge(turn)
    if not state.busy:
        return
    groups = in_order(state.busy.values())
    if state.open_nodes:
        _place_all(turn, groups)
    if state.busy and state.hungry_nodes:
        for group in groups:
            if group.pending and group.key.idempotent:
                _look_ahead(turn, group)
        if state.busy:
            # They have got what they may have; each comes back when one of its attempts ends.
            state.hungry_nodes.clear()


def in_order(groups: Iterable[Group]) -> list[Group]:
    """By priority; then what running tasks wait for, the deepest first, so that few wait at a time; then by the
    submission of what is at their heads."""
    return sorted(groups, key=lambda group: (-group.key.priority, -group.key.depth, _head_number(group), group.number))


def _head_number(group: Group) -> int:
    if group.again or group.careful or group.suspects:
        return 0
    while group.chunks and not group.chunks[0].left:
        group.chunks.popleft()
    return group.chunks[0].number if group.chunks else 0


def _place_all(turn: Turn, groups: list[Group]) -> None:
    state = turn.state
    start = 0
    while start < len(groups) and state.open_nodes:
        priority = groups[start].key.priority
        stop = start
        while stop < len(groups) and groups[stop].key.priority == priority:
            stop += 1
        _place_fairly(turn, groups[start:stop])
        start = stop


def _place_fairly(turn: Turn, groups: list[Group]) -> None:
    """Groups of one priority: a slice to each owner in turn, beginning after the one that had the last."""
    by_owner: dict[str, list[Group]] = {}
    for group in groups:
        by_owner.setdefault(group.key.owner, []).append(group)
    if len(by_owner) == 1:
        for group in groups:
            _place(turn, group, _ALL)
        return
    owners = list(by_owner)
    if turn.state.last_owner in by_owner:
        place = owners.index(turn.state.last_owner) + 1
        owners = owners[place:] + owners[:place]
    while owners and turn.state.open_nodes:
        for owner in list(owners):
            left = OWNER_SLICE
            for group in by_owner[owner]:
                left -= _place(turn, group, left)
                if left <= 0:
                    break
            if left == OWNER_SLICE:
                owners.remove(owner)
            else:
                turn.state.last_owner = owner


def _place(turn: Turn, group: Group, wanted: int) -> int:
    """Start up to `wanted` tasks of the group in free slots. Returns how many."""
    state = turn.state
    placed = _place_suspects(turn, group, wanted) if group.suspects else 0
    while group.careful and placed < wanted:
        task = group.careful[0]
        if not task.queued:
            group.careful.popleft()
            continue
        shares = placement.spread(state.open_nodes.values(), group.key.workload, group.request, 1, task.avoid)
        if not shares:
            return placed
        group.careful.popleft()
        _start(turn, task, shares[0][0])
        placement.refresh(state, shares[0][0])
        placed += 1
    wanted = min(wanted - placed, group.pending)
    if wanted <= 0:
        return placed
    for node, count in placement.spread(state.open_nodes.values(), group.key.workload, group.request, wanted):
        for _ in range(count):
            next_task = _next_task(state, group)
            if next_task is None:
                break
            _start(turn, next_task, node)
            placed += 1
        placement.refresh(state, node)
    return placed


def _place_suspects(turn: Turn, group: Group, wanted: int) -> int:
    """Start tasks that may have cost their node, on nodes that have no other such task."""
    state = turn.state
    placed = 0
    while group.suspects and placed < wanted:
        task = group.suspects[0]
        if task.queued:
            nodes = [node for node in state.open_nodes.values() if not quarantine.holds_suspect(node)]
            shares = placement.spread(nodes, group.key.workload, group.request, 1, task.avoid)
            if not shares:
                return placed
            _start(turn, task, shares[0][0])
            placement.refresh(state, shares[0][0])
            placed += 1
        group.suspects.popleft()
    return placed


def _next_task(state: State, group: Group) -> Task | None:
    """Take the first pending task; the caller starts it. (Not those which had better avoid some nodes.)"""
    while group.again:
        task = group.again.popleft()
        if task.queued:
            return task
    while group.chunks:
        chunk = group.chunks[0]
        if not chunk.left:
            group.chunks.popleft()
            continue
        while chunk.tasks[chunk.next] is None:
            chunk.next += 1
        return apply.take(state, chunk, chunk.next)
    return None


def _start(turn: Turn, task: Task, node: Node) -> None:
    state = turn.state
    attempt = AttemptId(state.epoch, state.next_attempt)
    state.next_attempt += 1
    turn.assign(task, node, attempt, ordinal=task.ordinal + 1, fresh=task.fresh)
    turn.start(task, node)
    turn.value("queue_wait", (), task.queued_s)


# --- look-ahead ------------------------------------------------------------------------------------------------------


def _look_ahead(turn: Turn, group: Group) -> None:
    state = turn.state
    while (head := _head(group)) is not None:
        function, available = head
        pace_s = state.paces.get((group.key.workload, function))
        if pace_s is None or pace_s > limits.LOOK_AHEAD_S:
            return
        candidates = []
        for node in state.hungry_nodes.values():
            count = placement.ahead_room(node, group.request, pace_s)
            if count:
                price = max(1, round(pace_s * 1e6 * max(group.request.cores, 1) / node.cores))
                candidates.append((round((limits.LOOK_AHEAD_S - node.ahead_s) * 1e6), price, node, count))
        if not candidates:
            return
        for node, count in placement.level(candidates, available):
            for _ in range(count):
                task = _next_task(state, group)
                if task is None:
                    break
                _start(turn, task, node)
            placement.refresh(state, node)


def _head(group: Group) -> tuple[BlobId | None, int] | None:
    """The function of the first pending task, and how many with the same one stand there together."""
    while group.again and not group.again[0].queued:
        group.again.popleft()
    if group.again:
        return group.again[0].function, 1
    while group.chunks and not group.chunks[0].left:
        group.chunks.popleft()
    if group.chunks:
        return group.chunks[0].function, group.chunks[0].left
    return None


# --- what no node can ever run ---------------------------------------------------------------------------------------


def judge(turn: Turn) -> None:
    """End the tasks of groups whose request no known node could ever meet. Without agents nothing is judged."""
    state = turn.state
    if state.now_s < state.judge_s or not state.nodes:
        return
    for group in list(state.busy.values()):
        if group.schedulable:
            continue
        if any(placement.could_ever_fit(node, group.request) for node in state.nodes.values()):
            group.schedulable = True
            continue
        text = unschedulable_text(state, group.request)
        failure = Failure(cause=Cause.UNSCHEDULABLE, message=text)
        for chunk in list(group.chunks):
            for index in _pending_indices(chunk):
                end_failed(turn, chunk.job, index, Outcome.FAILED, failure)
        for task in [*group.again, *group.careful, *group.suspects]:
            if task.queued:
                end_failed(turn, task.job, task.index, Outcome.FAILED, failure)


def _pending_indices(chunk: Chunk) -> list[int]:
    return [chunk.first + offset for offset, item in enumerate(chunk.tasks) if item is not None]


def unschedulable_text(state: State, request: Request) -> str:
    """Name the request and the largest node."""
    named = [node for node in state.nodes.values() if not request.nodes or not node.labels.isdisjoint(request.nodes)]
    asked = f"cores={request.cores / UNITS:g}"
    asked += f", memory={request.memory_bytes} bytes" if request.memory_bytes else ""
    asked += f", gpus={request.gpus}" if request.gpus else ""
    asked += "".join(f", {name}={amount / UNITS:g}" for name, amount in request.resources)
    asked += f", nodes={list(request.nodes)}" if request.nodes else ""
    if not named:
        known = ", ".join(state.nodes)
        return f"no known node has one of the names or labels asked for ({asked}); the nodes are {known}"
    largest = max(named, key=lambda node: (node.cores, node.memory_bytes))
    rest = "".join(f", {name}={amount / UNITS:g}" for name, amount in largest.resources.items())
    return (
        f"no known node could ever run this task, which asks for {asked}; the largest, {largest.name}, has "
        f"cores={largest.cores / UNITS:g}, memory={largest.memory_bytes} bytes, gpus={largest.gpus}{rest}"
    )
