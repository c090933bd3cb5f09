"""Who is next: queues of pending tasks in order, each given to `placement` for as many tasks as there are slots.

Order: priority; then the owner who uses least for his weight; of his jobs those first that running tasks wait for, the
deepest before all others, so that few wait at a time; then the job that uses least (core/shares.py), then submission.
Of the jobs of one owner that ask for the same, the `JOBS_SHARING` first take part and the others wait: thousands of
small jobs are better off one after the other. What fits nowhere does not hold up those behind it, but is not passed
over for ever either (core/reserve.py).

When no free slot fits, agents get a little more than they can start at once (look-ahead), so that a slot which becomes
free need not wait for the way to the coordinator and back: only tasks that may run twice, and only where it is known
that the attempts are short; never more than covers `LOOK_AHEAD_S`, so that little is stuck behind a slot if another
node runs dry.
"""

from __future__ import annotations

import math
from itertools import islice

from herder_coordinator.core import apply, placement, quarantine, reserve, shares, standstill
from herder_coordinator.core.ends import end_pending, recall_ahead
from herder_coordinator.core.state import UNITS, Group, Node, Queue, Request, Share, State, Task
from herder_coordinator.core.turn import Turn
from herder_shared import limits
from herder_shared.ids import AttemptId, BlobId
from herder_shared.states import Cause
from herder_shared.wire.messages import Failure

#: Jobs of one group among which an owner's part is divided at a time.
JOBS_SHARING = 32
#: What lies in look-ahead is recalled when it has lain there for so many times longer than it was to, and another node
#: has room: something in front of it takes longer than was expected.
RECALL_AFTER_S = 4 * limits.LOOK_AHEAD_S
#: Nodes that one message names.
NODES_NAMED_MAX = 10
AHEAD = "no node had room, and it is short: it was sent ahead, to start when a slot becomes free there"
#: Attempts that a queue is sent ahead at a time: they are short, and counted, so that others get as many next time.
AHEAD_SLICE = 8
_ALL = limits.ARRAY_TASKS_MAX


def dispatch(turn: Turn) -> None:
    """Give out whatever has room somewhere."""
    state = turn.state
    judge(turn)
    if not state.busy:
        return
    if state.reservations:
        _review_reservations(state)
    levels = _levels(state)
    blocked: list[Group] = []
    for groups in levels:
        if not state.open_nodes:
            break
        _place_level(turn, groups, blocked)
    if state.busy and state.hungry_nodes:
        held_up: list[Group] = []
        for groups in levels:
            _look_ahead_level(turn, groups, held_up)
        if state.busy:
            # They have got what they may have; each comes back when one of its attempts ends.
            state.hungry_nodes.clear()


def _levels(state: State) -> list[list[Group]]:
    """The groups with pending tasks, by falling priority."""
    levels: dict[int, list[Group]] = {}
    for group in state.busy.values():
        levels.setdefault(group.key.priority, []).append(group)
    return [levels[priority] for priority in sorted(levels, reverse=True)]


class _Contest:
    """The queues of one priority. The first is always that of the owner and job that use least."""

    def __init__(self, state: State, groups: list[Group]) -> None:
        self._state = state
        self._groups: dict[str, list[Group]] = {}
        self._queues: dict[str, list[Queue]] = {}
        self._shares: dict[str, Share] = {}
        #: Queues and groups that can get nothing (more) this time.
        self._out: set[int] = set()
        #: Where there is but one, nothing needs to be compared.
        self._only = next(iter(groups[0].queues.values())) if _is_one(groups) else None
        if self._only is None:
            for group in groups:
                if group.pending:
                    self._groups.setdefault(group.key.owner, []).append(group)
            for owner in list(self._groups):
                self._fill(owner)

    def _fill(self, owner: str) -> None:
        found: list[Queue] = []
        for group in self._groups[owner]:
            if group.number not in self._out:
                found += islice(group.queues.values(), JOBS_SHARING)
        found = [queue for queue in found if id(queue) not in self._out]
        if found:
            self._queues[owner] = found
            self._shares[owner] = found[0].job.owner_share
        else:
            self._queues.pop(owner, None)
            self._shares.pop(owner, None)

    def first(self) -> Queue | None:
        """Whose turn it is."""
        if self._only is not None or not self._queues:
            return self._only
        state = self._state
        if len(self._queues) == 1:
            (queues,) = self._queues.values()
        else:
            uses = {owner: shares.use(share, state) for owner, share in self._shares.items()}
            least = min(uses.values())
            tied = [owner for owner, use in uses.items() if use == least]
            owner = tied[0] if len(tied) == 1 else min(tied, key=lambda one: min(map(head_number, self._queues[one])))
            queues = self._queues[owner]
        if len(queues) == 1:
            return queues[0]
        return min(queues, key=lambda one: (-one.group.key.depth, shares.use(one.job.share, state), head_number(one)))

    def portion(self, queue: Queue, cores: int) -> int:
        """How many attempts it may get at a time of what `cores` allow: half of its part, so that whoever has less by
        then goes on, and few enough at the end for all to come out even."""
        if self._only is not None:
            return _ALL
        owner = queue.group.key.owner
        queues = self._queues[owner]
        if len(self._queues) == 1 and len(queues) == 1:
            return _ALL
        weight = self._shares[owner].weight / sum(share.weight for share in self._shares.values())
        return max(1, int(cores * weight / len(queues) / 2 / max(queue.group.request.cores, 1)))

    def served(self, queue: Queue) -> None:
        """It got what it was to get. If nothing is pending in it any more, another takes its place."""
        if not queue.pending:
            self._renew(queue)

    def drop(self, queue: Queue) -> None:
        """It can get nothing more."""
        self._out.add(id(queue))
        self._renew(queue)

    def drop_group(self, queue: Queue) -> None:
        """Nor can any other of its group."""
        self._out.add(queue.group.number)
        self._renew(queue)

    def _renew(self, queue: Queue) -> None:
        if self._only is not None:
            self._only = None
        else:
            self._fill(queue.group.key.owner)


def _is_one(groups: list[Group]) -> bool:
    return len(groups) == 1 and len(groups[0].queues) == 1


def head_number(queue: Queue) -> int:
    """The submission of what is at its head; what was tried before comes first."""
    if queue.again or queue.careful or queue.suspects:
        return 0
    while queue.chunks and not queue.chunks[0].left:
        queue.chunks.popleft()
    return queue.chunks[0].number if queue.chunks else 0


# --- free slots ------------------------------------------------------------------------------------------------------


def _place_level(turn: Turn, groups: list[Group], blocked: list[Group]) -> None:
    """Groups of one priority: whoever uses least goes first, again and again, while something fits. `blocked`: those
    that fit nowhere; before anyone overtakes them, a node is kept for each."""
    state = turn.state
    contest = _Contest(state, groups)
    free_cores = sum(node.free_cores for node in state.open_nodes.values())
    while state.open_nodes and (queue := contest.first()) is not None:
        wanted = min(contest.portion(queue, free_cores), queue.pending)
        if blocked and placement.spread(state, queue.group, 1, _over_s(state, queue)):
            _reserve_all(state, blocked)
        placed = _place(turn, queue, wanted)
        free_cores -= placed * queue.group.request.cores
        if placed < wanted and queue.suspects:
            contest.drop(queue)  # it is not room that they lack
        elif placed < wanted:
            contest.drop_group(queue)
            blocked.append(queue.group)
        else:
            contest.served(queue)


def _over_s(state: State, queue: Queue) -> float:
    head = _head(queue)
    return reserve.bound_s(state, queue, head[0]) if head is not None else math.inf


def _place(turn: Turn, queue: Queue, wanted: int) -> int:
    """Start up to `wanted` tasks of the queue in free slots. Returns how many."""
    state, group = turn.state, queue.group
    over_s = _over_s(state, queue)
    placed = _place_suspects(turn, queue, wanted) if queue.suspects else 0
    while queue.careful and placed < wanted:
        task = queue.careful[0]
        if task.queued is not queue.careful:
            queue.careful.popleft()
            continue
        parts = placement.spread(state, group, 1, over_s, avoid=task.avoid)
        if not parts:
            return placed
        queue.careful.popleft()
        _start(turn, task, parts[0][0], _why(parts[0][0], group))
        placement.refresh(state, parts[0][0])
        placed += 1
    wanted = min(wanted - placed, queue.pending)
    if wanted > 0:
        for node, count in placement.spread(state, group, wanted, over_s):
            why = _why(node, group)
            for _ in range(count):
                next_task = _next_task(state, queue)
                if next_task is None:
                    break
                _start(turn, next_task, node, why)
                placed += 1
            placement.refresh(state, node)
    if placed and group.reserved is not None:
        _give_up_node(state, group)
    return placed


def _place_suspects(turn: Turn, queue: Queue, wanted: int) -> int:
    """Start tasks that may have cost their node, on nodes that have no other such task."""
    state = turn.state
    placed = 0
    while queue.suspects and placed < wanted:
        task = queue.suspects[0]
        if task.queued is queue.suspects:
            nodes = [node for node in state.open_nodes.values() if not quarantine.holds_suspect(node)]
            parts = placement.spread(state, queue.group, 1, _over_s(state, queue), avoid=task.avoid, nodes=nodes)
            if not parts:
                return placed
            _start(turn, task, parts[0][0], "it had room, and no other task that may have cost its node")
            placement.refresh(state, parts[0][0])
            placed += 1
        queue.suspects.popleft()
    return placed


def _next_task(state: State, queue: Queue) -> Task | None:
    """Take the first pending task; the caller starts it. (Not those which had better avoid some nodes.)"""
    while queue.again:
        task = queue.again.popleft()
        if task.queued is queue.again:
            return task
    while queue.chunks:
        chunk = queue.chunks[0]
        if not chunk.left:
            queue.chunks.popleft()
            continue
        chunk.next = chunk.pending.index(1, chunk.next)
        return apply.take(state, chunk, chunk.next)
    return None


def _start(turn: Turn, task: Task, node: Node, why: str) -> None:
    state = turn.state
    task.why = why
    attempt = AttemptId(state.epoch, state.next_attempt)
    state.next_attempt += 1
    turn.assign(task, node, attempt, ordinal=task.ordinal + 1, fresh=task.fresh)
    turn.start(task, node)
    turn.value("queue_wait", (), task.queued_s)


def _why(node: Node, group: Group) -> str:
    if node.reserved is group:
        return "the node was kept for it"
    if node.reserved is not None:
        return "it does not delay the task for which the node is kept"
    if group.request.nodes:
        return f"it had room, and is one of nodes={list(group.request.nodes)}"
    if group.key.workload in node.warm:
        return "it had room, and the workload's template was ready there"
    return "it had room; the workload's template was ready nowhere where there was room"


# --- nodes that are kept ---------------------------------------------------------------------------------------------


def _review_reservations(state: State) -> None:
    """Give back nodes that nobody waits for any more, or that take nothing."""
    for node in list(state.reservations.values()):
        group = node.reserved
        assert group is not None
        if not group.pending or not _may_wait_for(state, node, group):
            _give_up_node(state, group)


def _give_up_node(state: State, group: Group) -> None:
    node = group.reserved
    assert node is not None
    reserve.release(state, group)
    placement.refresh(state, node)


def _reserve_all(state: State, groups: list[Group]) -> None:
    """Others are about to overtake these groups: keep a node for each, if one may be kept, and forget them."""
    for group in groups:
        _reserve(state, group)
    groups.clear()


def _reserve(state: State, group: Group) -> None:
    if group.reserved is not None or not reserve.may_keep_another(state):
        return
    candidates = [node for node in state.nodes.values() if node.reserved is None and _may_wait_for(state, node, group)]
    node = reserve.choose(state, group, candidates)
    if node is None:
        state.reserve_s = state.now_s + reserve.AGAIN_S
    else:
        reserve.keep(state, group, node)


def _may_wait_for(state: State, node: Node, group: Group) -> bool:
    """Whether the node could run the group's next task if it were empty, as far as is known."""
    if not placement.takes_attempts(node) or not placement.could_ever_fit(node, group.request):
        return False
    if node.ends_s == math.inf:
        return True
    over_s = _over_s(state, next(iter(group.queues.values())))
    return placement.ends_in_time(state, node, group.request, over_s)


# --- look-ahead ------------------------------------------------------------------------------------------------------


def _look_ahead_level(turn: Turn, groups: list[Group], held_up: list[Group]) -> None:
    """In order again. Those that may not be sent ahead would be overtaken by all others for ever, as what is sent ahead
    takes each slot that becomes free: they get a node of their own first."""
    state = turn.state
    contest = _Contest(state, groups)
    while state.hungry_nodes and (queue := contest.first()) is not None:
        head = _head(queue)
        pace_s = state.paces.get((queue.group.key.workload, head[0])) if head is not None else None
        if head is None or pace_s is None or pace_s > limits.LOOK_AHEAD_S or not queue.group.key.idempotent:
            held_up.append(queue.group)
            contest.drop(queue)
            continue
        candidates = _ahead_candidates(state, queue.group.request, pace_s)
        if candidates and held_up:
            _reserve_all(state, held_up)
            candidates = [one for one in candidates if one[2].reserved is None]
        if not candidates:
            contest.drop(queue)
            continue
        spare = sum(count for _, _, _, count in candidates)
        portion = contest.portion(queue, spare * max(queue.group.request.cores, 1))
        wanted = min(max(portion, AHEAD_SLICE), head[1])
        for node, count in placement.level(candidates, wanted):
            for _ in range(count):
                task = _next_task(state, queue)
                if task is None:
                    break
                _start(turn, task, node, AHEAD)
            placement.refresh(state, node)
        if wanted < spare:
            contest.served(queue)
        else:
            contest.drop(queue)


def _ahead_candidates(state: State, request: Request, pace_s: float) -> list[tuple[int, int, Node, int]]:
    candidates = []
    for node in state.hungry_nodes.values():
        count = placement.ahead_room(node, request, pace_s)
        if count and standstill.fits_beside_waiting(state, node, request):
            price = max(1, round(pace_s * 1e6 * max(request.cores, 1) / node.cores))
            candidates.append((round((limits.LOOK_AHEAD_S - node.ahead_s) * 1e6), price, node, count))
    return candidates


def _head(queue: Queue) -> tuple[BlobId | None, int] | None:
    """The function of the first pending task, and how many with the same one stand there together."""
    while queue.again and queue.again[0].queued is not queue.again:
        queue.again.popleft()
    if queue.again:
        return queue.again[0].function, 1
    while queue.chunks and not queue.chunks[0].left:
        queue.chunks.popleft()
    if queue.chunks:
        return queue.chunks[0].function, queue.chunks[0].left
    return None


def recall(turn: Turn) -> None:
    """When nodes have room and nobody is waiting, take back what lies in other nodes' look-ahead for too long."""
    state = turn.state
    if state.busy or not state.open_nodes:
        return
    for node in state.nodes.values():
        if not node.ahead or not node.session:
            continue
        first = node.attempts[next(iter(node.ahead))]
        if state.now_s - first.since_s - first.queued_s < RECALL_AFTER_S:
            continue
        count = len(node.ahead)
        room = sum(placement.room(other, first.request, count) for other in state.open_nodes.values())
        pace_s = state.paces.get((first.queue.group.key.workload, first.function))
        if room and pace_s is not None:  # and as many as those may be sent ahead there
            room += sum(placement.ahead_room(other, first.request, pace_s) for other in state.open_nodes.values())
        recall_ahead(turn, [node.attempts[attempt] for attempt in islice(node.ahead, room)])


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
        for queue in list(group.queues.values()):
            end_pending(turn, queue, failure)


def _with_labels(node: Node) -> str:
    labels = sorted(node.labels - {node.name})
    return f"{node.name} ({', '.join(labels)})" if labels else node.name


def unschedulable_text(state: State, request: Request) -> str:
    """Name the request and the largest node."""
    named = [node for node in state.nodes.values() if not request.nodes or not node.labels.isdisjoint(request.nodes)]
    asked = placement.asked_for(request)
    if not named:
        known = ", ".join(_with_labels(node) for node in list(state.nodes.values())[:NODES_NAMED_MAX])
        known += f" and {more} more" if (more := len(state.nodes) - NODES_NAMED_MAX) > 0 else ""
        return f"no known node has one of the names or labels asked for ({asked}); the nodes are {known}"
    largest = max(named, key=lambda node: (node.cores, node.memory_bytes))
    rest = "".join(f", {name}={amount / UNITS:g}" for name, amount in largest.resources.items())
    return (
        f"no known node could ever run this task, which asks for {asked}; the largest, {largest.name}, has "
        f"cores={largest.cores / UNITS:g}, memory={largest.memory_bytes} bytes, gpus={largest.gpus}{rest}"
    )
