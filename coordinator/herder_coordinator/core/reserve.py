"""Nodes that are kept for tasks which would never find enough free at once, and what may use them meanwhile.

A task that needs much of a node waits for several attempts there to end; each time one does, a smaller task would take
what it leaves, for ever. The same befalls a long task while short ones lie in the agents' look-ahead, which takes each
slot as it becomes free. So when those next in line could go nowhere and others are about to overtake them, one node is
kept for them: it gets no look-ahead, and others may use it only where that delays nothing (*backfill*): if they are
known to end before there is room for the one that waits, or if there will be room for both.

When there will be room follows from what runs on the node: an attempt is over by its job's `timeout`, and is expected
to be after twice its workload's mean time. Of others nobody knows. Where the room depends on one of those, a backfill
that is over within `SLACK_S` is let through, and so delays by no more than that.

A reservation is of a group and stays on its node until a task of the group has found room, there or elsewhere. It
binds groups of the same and lower priority. The first in line get one each, up to `RESERVED_MAX` nodes and half of all.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass

from herder_coordinator.core.state import Group, Node, Queue, Request, State, Task
from herder_shared import limits
from herder_shared.ids import BlobId

#: Nodes that are kept at a time; and half of all.
RESERVED_MAX = 8
#: A backfill that ends within this delays nobody much.
SLACK_S = 1.0
#: An attempt is expected to be over after so many times its mean.
PACE_MARGIN = 2.0
#: Nodes that are looked at closely before one is chosen.
CANDIDATES_MAX = 32
#: Where no node could be kept, it is tried again after this.
AGAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class Room:
    """When there is room on a node for what it is kept for (`in_s`; inf: nobody knows), and what is left beside it."""

    in_s: float
    cores: int
    memory_bytes: int
    gpus: int
    resources: dict[str, int]


def bound_s(state: State, queue: Queue, function: BlobId | None) -> float:
    """By when an attempt started now is over, for all that is known; inf: nothing is."""
    pace_s = state.paces.get((queue.group.key.workload, function), math.inf)
    return min(queue.group.request.limit_s + limits.KILL_GRACE_S, PACE_MARGIN * pace_s)


def keep(state: State, group: Group, node: Node) -> None:
    """The node is kept for a task of the group from now on."""
    release(state, group)
    group.reserved, node.reserved, node.reserved_s = node, group, state.now_s
    state.reservations[node.name] = node
    state.hungry_nodes.pop(node.name, None)


def release(state: State, group: Group) -> None:
    """No node is kept for the group any more."""
    node = group.reserved
    if node is not None:
        group.reserved = node.reserved = None
        del state.reservations[node.name]


def may_keep_another(state: State) -> bool:
    """Whether one more node may be kept."""
    count = len(state.reservations)
    return state.now_s >= state.reserve_s and count < min(RESERVED_MAX, max(1, len(state.nodes) // 2))


def choose(state: State, group: Group, candidates: Iterable[Node]) -> Node | None:
    """Of nodes on which it would fit if they were empty, the one that will have room first, as far as can be told:
    what nobody knows the end of is taken to run on for as long as it has run."""
    near = heapq.nsmallest(CANDIDATES_MAX, candidates, key=lambda node: (_lack(node, group.request), node.ahead_s))
    return min(near, key=lambda node: room_for(state, node, group.request, guess=True).in_s, default=None)


def backfill(state: State, node: Node, group: Group, over_s: float, wanted: int) -> int:
    """How many attempts of `group`, each over in `over_s`, may go to a node that is kept for another; at most `wanted`,
    which fit into what is free."""
    kept_for = node.reserved
    assert kept_for is not None
    if group.key.priority > kept_for.key.priority:
        return wanted
    beside = room_for(state, node, kept_for.request)
    if over_s <= (beside.in_s if beside.in_s < math.inf else SLACK_S):
        return wanted
    request = group.request
    count = wanted
    if request.cores:
        count = min(count, beside.cores // request.cores)
    if request.memory_bytes:
        count = min(count, beside.memory_bytes // request.memory_bytes)
    if request.gpus:
        count = min(count, beside.gpus // request.gpus)
    for name, amount in request.resources:
        if amount:
            count = min(count, beside.resources.get(name, 0) // amount)
    return max(0, count)


def room_for(state: State, node: Node, request: Request, *, guess: bool = False) -> Room:
    """When `request` will have room on the node if nothing new starts there. Of those whose end nobody knows the oldest
    is taken to end first: so what was let through as a backfill is never counted as room for the one that waits."""
    cores, memory_bytes, gpus = node.free_cores, node.free_memory_bytes, node.free_gpus
    named = dict(node.free_resources)
    in_s = 0.0
    held = [task for attempt, task in node.attempts.items() if attempt not in node.ahead]
    ends = [(_remaining_s(state, task, guess=guess), place) for place, task in enumerate(held)]
    for remaining_s, place in sorted(ends):
        if _covers(cores, memory_bytes, gpus, named, request):
            break
        one = held[place].request
        in_s = remaining_s
        cores += one.cores
        memory_bytes += one.memory_bytes
        gpus += one.gpus
        for name, amount in one.resources:
            named[name] = named.get(name, 0) + amount
    for name, amount in request.resources:
        named[name] = named.get(name, 0) - amount
    return Room(in_s, cores - request.cores, memory_bytes - request.memory_bytes, gpus - request.gpus, named)


def _remaining_s(state: State, task: Task, *, guess: bool) -> float:
    """For how long the attempt still runs; inf: nobody knows, unless it may be guessed."""
    ran_s = state.now_s - task.since_s - task.queued_s
    left_s = bound_s(state, task.queue, task.function) - ran_s
    if 0 < left_s < math.inf:
        return left_s
    return max(ran_s, SLACK_S) if guess else math.inf


def _covers(cores: int, memory_bytes: int, gpus: int, named: dict[str, int], request: Request) -> bool:
    return (
        request.cores <= cores
        and request.memory_bytes <= memory_bytes
        and request.gpus <= gpus
        and all(amount <= named.get(name, 0) for name, amount in request.resources)
    )


def _lack(node: Node, request: Request) -> float:
    """What part of the node is missing for the request, of what is missing most."""
    parts = [
        (request.cores - node.free_cores) / max(node.cores, 1),
        (request.memory_bytes - node.free_memory_bytes) / max(node.memory_bytes, 1),
        (request.gpus - node.free_gpus) / max(node.gpus, 1),
    ]
    for name, amount in request.resources:
        parts.append((amount - node.free_resources.get(name, 0)) / max(node.resources.get(name, 0), 1))
    return max(0.0, *parts)
