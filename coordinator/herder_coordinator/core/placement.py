"""Which node: what fits where, who holds what, and the even spread of a group's tasks over the nodes with room.

A request fits a node when its cores, memory, GPUs and named resources are free there and the node is one of those that
the request names. Among nodes with room, those come first whose template for the workload is ready, then those that
have nothing rarer (GPUs, named resources) than was asked for; among equals the tasks are spread so that the nodes fill
evenly, or packed so that as many nodes as possible stay empty. A node that is kept for another group's task
(core/reserve.py), or that will end soon, takes only what is over by then.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from herder_coordinator.core import reserve, shares
from herder_coordinator.core.state import UNITS, Group, Node, Request, State, Task
from herder_shared import limits
from herder_shared.ids import AttemptId, NodeName
from herder_shared.states import AgentState
from herder_shared.wire.messages import NodeFacts, TaskOptions


def request_of(options: TaskOptions) -> Request:
    """What one attempt of a task with these options holds."""
    return Request(
        cores=max(0, round(options.cores * UNITS)),
        memory_bytes=max(0, options.memory_bytes),
        gpus=max(0, options.gpus),
        resources=tuple(sorted((name, round(amount * UNITS)) for name, amount in options.resources.items())),
        nodes=options.nodes,
        limit_s=options.timeout_s or math.inf,
        pack=options.placement == "pack",
    )


def asked_for(request: Request) -> str:
    """The request, as its user wrote it."""
    asked = f"cores={request.cores / UNITS:g}"
    asked += f", memory={request.memory_bytes} bytes" if request.memory_bytes else ""
    asked += f", gpus={request.gpus}" if request.gpus else ""
    asked += "".join(f", {name}={amount / UNITS:g}" for name, amount in request.resources)
    asked += f", nodes={list(request.nodes)}" if request.nodes else ""
    return asked


def could_ever_fit(node: Node, request: Request) -> bool:
    """Whether an empty `node` could run the request. True while the node's facts are not known."""
    if request.nodes and node.labels.isdisjoint(request.nodes) and node.facts is not None:
        return False
    return node.facts is None or (
        request.cores <= node.cores
        and request.memory_bytes <= node.memory_bytes
        and request.gpus <= node.gpus
        and all(amount <= node.resources.get(name, 0) for name, amount in request.resources)
    )


def room(node: Node, request: Request, wanted: int) -> int:
    """How many of the request fit into what is free, at most `wanted`."""
    if request.nodes and node.labels.isdisjoint(request.nodes):
        return 0
    return _free_room(node, request, wanted)


def _free_room(node: Node, request: Request, wanted: int) -> int:
    count = wanted
    if request.cores:
        count = min(count, node.free_cores // request.cores)
    if request.memory_bytes:
        count = min(count, node.free_memory_bytes // request.memory_bytes)
    if request.gpus:
        count = min(count, node.free_gpus // request.gpus)
    for name, amount in request.resources:
        if amount:
            count = min(count, node.free_resources.get(name, 0) // amount)
    return max(0, count)


def takes_attempts(node: Node) -> bool:
    """It is connected, has told what it runs, and is not being emptied."""
    return node.state is AgentState.READY and node.synced


def spread(
    state: State,
    group: Group,
    wanted: int,
    over_s: float = math.inf,
    *,
    avoid: Sequence[NodeName] = (),
    nodes: Iterable[Node] | None = None,
) -> list[tuple[Node, int]]:
    """Divide up to `wanted` attempts of the group among the free slots of the open nodes (or `nodes`). Each is over in
    `over_s`, as far as is known. Nodes in `avoid` only where nothing else has room."""
    request, workload = group.request, group.key.workload
    tiers: dict[tuple[bool, bool, bool], list[tuple[Node, int]]] = {}
    for node in state.open_nodes.values() if nodes is None else nodes:
        fitting = room(node, request, wanted)
        if fitting and node.ends_s < math.inf and not ends_in_time(state, node, request, over_s):
            continue
        if fitting and node.reserved is not None and node.reserved is not group:
            fitting = reserve.backfill(state, node, group, over_s, fitting)
        if fitting:
            rarer = (node.gpus > 0 and not request.gpus) or (bool(node.resources) and not request.resources)
            tier = (node.name in avoid, workload not in node.warm, rarer)
            tiers.setdefault(tier, []).append((node, fitting))
    parts: list[tuple[Node, int]] = []
    for tier in sorted(tiers):
        if wanted <= 0:
            break
        price = max(request.cores, 1)
        share_out = pack if request.pack else level
        part = share_out([(node.free_cores, price, node, fitting) for node, fitting in tiers[tier]], wanted)
        parts += part
        wanted -= sum(count for _, count in part)
    return parts


def ends_in_time(state: State, node: Node, request: Request, over_s: float) -> bool:
    """Whether attempts that are over in `over_s`, as far as is known, end before the node does. A task that names no
    `timeout` and was never measured takes the risk."""
    left_s = node.ends_s - state.now_s - limits.NODE_END_MARGIN_S
    return min(request.limit_s, over_s) <= left_s or (over_s == math.inf and request.limit_s == math.inf)


def pack(candidates: list[tuple[int, int, Node, int]], wanted: int) -> list[tuple[Node, int]]:
    """Divide `wanted` over `(free, price, node, most)` so that as few nodes as possible are used: the fullest first."""
    parts: list[tuple[Node, int]] = []
    for _, _, node, most in sorted(candidates, key=lambda one: one[0]):
        if wanted <= 0:
            break
        parts.append((node, min(most, wanted)))
        wanted -= most
    return parts


def level(candidates: list[tuple[int, int, Node, int]], wanted: int) -> list[tuple[Node, int]]:
    """Divide `wanted` over `(free, price, node, most)` so that what stays free is as even as it gets; ties in order."""
    if len(candidates) == 1:
        _, _, node, most = candidates[0]
        return [(node, min(most, wanted))]
    total = sum(most for _, _, _, most in candidates)
    if total <= wanted:
        return [(node, most) for _, _, node, most in candidates]
    counts = [0] * len(candidates)
    heap = [(-free, place) for place, (free, _, _, _) in enumerate(candidates)]
    heapq.heapify(heap)
    while wanted and heap:
        minus_free, place = heap[0]
        _, price, _, most = candidates[place]
        counts[place] += 1
        wanted -= 1
        if counts[place] < most:
            heapq.heapreplace(heap, (minus_free + price, place))
        else:
            heapq.heappop(heap)
    return [(candidates[place][2], count) for place, count in enumerate(counts) if count]


def ahead_room(node: Node, request: Request, pace_s: float) -> int:
    """How many attempts of this pace the node may be sent beyond its free slots."""
    if not could_ever_fit(node, request) or not node.cores:
        return 0
    each_s = pace_s * max(request.cores, 1) / node.cores
    by_time = int((limits.LOOK_AHEAD_S - node.ahead_s) / each_s)
    by_count = limits.LOOK_AHEAD_PER_CORE_MAX * (node.cores // UNITS or 1) - len(node.ahead)
    return max(0, min(by_time, by_count))


def set_facts(state: State, node: Node, facts: NodeFacts) -> None:
    """Take over what an agent says of its machine, and divide its attempts anew into holders and look-ahead."""
    for attempt, task in node.attempts.items():
        _let_go(state, node, attempt, task)
    node.facts = facts
    node.labels = frozenset((node.name, *facts.labels))
    node.cores = facts.cores * UNITS
    node.memory_bytes = facts.memory_bytes
    node.gpus = facts.gpus
    node.resources = {name: round(amount * UNITS) for name, amount in facts.resources.items()}
    node.free_cores, node.free_memory_bytes, node.free_gpus = node.cores, node.memory_bytes, node.gpus
    node.free_resources = dict(node.resources)
    node.ahead.clear()
    node.ahead_s = 0.0
    for attempt, task in node.attempts.items():
        task.lent = False  # its `Sync` tells anew
        if hold(node, task.request):
            shares.hold(state, task, task.request.cores)
        else:
            node.ahead[attempt] = 0.0
    refresh(state, node)


def _let_go(state: State, node: Node, attempt: AttemptId, task: Task) -> None:
    """In the accounts of its job and owner: what the attempt holds there, or will."""
    if attempt in node.ahead:
        shares.lie_ahead(task, node, -node.ahead[attempt])
    elif node.facts is not None and not task.lent:
        shares.hold(state, task, -task.request.cores)


def hold(node: Node, request: Request) -> bool:
    """Take the request's slot if it is free."""
    if not _free_room(node, request, 1):
        return False
    node.free_cores -= request.cores
    node.free_memory_bytes -= request.memory_bytes
    node.free_gpus -= request.gpus
    for name, amount in request.resources:
        if amount:
            node.free_resources[name] -= amount
    return True


def attach(state: State, node: Node, task: Task) -> None:
    """`task`'s attempt is on this node from now on: in a free slot, else as look-ahead."""
    node.attempts[task.attempt] = task
    if node.facts is None:
        return
    request = task.request
    if hold(node, request):
        shares.hold(state, task, request.cores)
    else:
        pace_s = state.paces.get((task.job.spec.workload.key, task.function), 0.0)
        cost_s = pace_s * max(request.cores, 1) / node.cores if node.cores else 0.0
        node.ahead[task.attempt] = cost_s
        node.ahead_s += cost_s
        shares.lie_ahead(task, node, cost_s)


def detach(state: State, node: Node, attempt: AttemptId) -> None:
    """The attempt is over there. What it held goes to the node's look-ahead first, as the agent does it."""
    task = node.attempts.pop(attempt)
    node.doubtful.pop(attempt, None)
    if attempt in node.ahead:
        _leave_ahead(node, attempt, task)
    elif node.facts is not None:
        request = task.request
        if task.lent:
            task.lent = False
        else:
            node.free_cores += request.cores
            shares.hold(state, task, -request.cores)
        node.free_memory_bytes += request.memory_bytes
        node.free_gpus += request.gpus
        for name, amount in request.resources:
            if amount:
                node.free_resources[name] += amount
        _give_to_ahead(state, node)
    refresh(state, node)


def _give_to_ahead(state: State, node: Node) -> None:
    while node.ahead:
        first = next(iter(node.ahead))
        task = node.attempts[first]
        if not hold(node, task.request):
            break
        _leave_ahead(node, first, task)
        shares.hold(state, task, task.request.cores)


def lend(state: State, node: Node, task: Task) -> None:
    """The attempt waits for tasks of its own: its cores are free for others. What else it holds it keeps."""
    if task.lent or node.facts is None:
        return
    request = task.request
    if task.attempt in node.ahead:
        if not _fits_besides_cores(node, request):
            return  # the agent knows better what it runs: this settles itself when something ends there
        _leave_ahead(node, task.attempt, task)
        _hold_besides_cores(node, request, 1)
    else:
        node.free_cores += request.cores
        shares.hold(state, task, -request.cores)
    task.lent = True
    _give_to_ahead(state, node)
    refresh(state, node)


def reclaim(state: State, node: Node, task: Task) -> None:
    """It wants its cores back. As the agent does it, it goes before all look-ahead."""
    if not task.lent:
        return
    task.lent = False
    request = task.request
    if request.cores <= node.free_cores:
        node.free_cores -= request.cores
        shares.hold(state, task, request.cores)
    else:
        _hold_besides_cores(node, request, -1)
        node.ahead = {task.attempt: 0.0, **node.ahead}
    refresh(state, node)


def _fits_besides_cores(node: Node, request: Request) -> bool:
    return _free_room(node, replace(request, cores=0), 1) > 0


def _hold_besides_cores(node: Node, request: Request, times: int) -> None:
    node.free_memory_bytes -= times * request.memory_bytes
    node.free_gpus -= times * request.gpus
    for name, amount in request.resources:
        if amount:
            node.free_resources[name] -= times * amount


def _leave_ahead(node: Node, attempt: AttemptId, task: Task) -> None:
    cost_s = node.ahead.pop(attempt)
    shares.lie_ahead(task, node, -cost_s)
    node.ahead_s -= cost_s
    if not node.ahead:
        node.ahead_s = 0.0


def refresh(state: State, node: Node) -> None:
    """Keep the lists of nodes with something free right; called after every change of what a node can take."""
    if takes_attempts(node):
        if node.reserved is None:
            state.hungry_nodes[node.name] = node
        if node.free_cores > 0 and not node.ahead:
            state.open_nodes[node.name] = node
        else:
            state.open_nodes.pop(node.name, None)
    else:
        state.open_nodes.pop(node.name, None)
        state.hungry_nodes.pop(node.name, None)
