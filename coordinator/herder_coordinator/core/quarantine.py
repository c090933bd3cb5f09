"""Was it the task? Tasks whose node was lost under them run one to a node until they are trusted again.

A node that dies may have been killed by what ran on it, and all that ran there is as suspect as any other: most of it
is innocent. To blame all would fail the innocent, to blame none would let one task kill node after node, each time
with its neighbours. So:

* The first loss makes each task that held a slot there a *suspect*. It is counted for nothing.
* Suspects are started one to a node. Other work may run beside them.
* A suspect whose attempt ends by itself, or runs longer than the lost one had (within bounds), is trusted again.
* A node that is lost with a suspect on it was lost by that one: the loss is counted (`max_crashes`), and its node
  among those that it killed (`POISON_NODES`). The others there are innocent, and run again as if nothing had been.

An agent that is told to end (an upgrade, a preemption) says so itself of each of its attempts: no loss at all, and
nobody is suspect. An attempt which was sent ahead and held no slot had certainly hardly begun: it is never suspect.
When the agent comes back as the same incarnation, so that only the network was lost, what it still has is trusted.
"""

from __future__ import annotations

from dataclasses import dataclass

from herder_coordinator.core.state import Node, State, Task
from herder_shared.ids import AttemptId
from herder_shared.states import Cause, TaskState
from herder_shared.wire.messages import AttemptEnd

#: A suspect has to run this much longer than the attempt that was lost.
LONGER = 1.25
#: ... and no shorter and no longer than this: a node that is killed slowly is not worth holding up hundreds of tasks.
QUARANTINE_S_MIN = 1.0
QUARANTINE_S_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Part:
    """What a task had to do with the loss of its attempt."""

    #: It uses up `max_crashes`.
    is_counted: bool
    #: It did it.
    is_blamed: bool = False
    #: It may have done it: for how long its next attempt is in quarantine.
    quarantine_s: float = 0.0
    #: It had no child: its code has certainly not begun.
    never_began: bool = False


COUNTED = Part(is_counted=True)
INNOCENT = Part(is_counted=False)
_BLAMED = Part(is_counted=True, is_blamed=True)


def part_in_end(end: AttemptEnd) -> Part:
    """What an attempt had to do with an end of which its agent tells, if that is a loss."""
    if end.failure is not None and end.failure.cause is Cause.NODE_LOST:  # the agent is told to end, and says so
        return Part(is_counted=False, never_began=not end.usage.start_method)
    return COUNTED


def parts_in_loss(state: State, node: Node) -> dict[AttemptId, Part]:
    """What each of the node's attempts had to do with its loss."""
    suspects = [attempt for attempt, task in node.attempts.items() if task.quarantine_s]
    parts: dict[AttemptId, Part] = {}
    for attempt, task in node.attempts.items():
        if attempt in suspects:
            parts[attempt] = _BLAMED
        elif suspects or attempt in node.ahead:
            parts[attempt] = INNOCENT
        else:
            parts[attempt] = Part(is_counted=False, quarantine_s=quarantine_s(_age_s(state, task)))
    return parts


def quarantine_s(ran_s: float) -> float:
    """How long a task has to run whose lost attempt was `ran_s` old."""
    return min(max(ran_s * LONGER, QUARANTINE_S_MIN), QUARANTINE_S_MAX)


def holds_suspect(node: Node) -> bool:
    """Whether an attempt in quarantine is on this node."""
    task = node.suspect
    return task is not None and task.node is node and task.quarantine_s > 0


def trust_again(state: State) -> bool:
    """Let go of suspects that have run for long enough. Whether a node may take another one now."""
    is_free = False
    for node in state.nodes.values():
        task = node.suspect
        if task is None:
            continue
        if holds_suspect(node) and not (task.state is TaskState.RUNNING and _age_s(state, task) >= task.quarantine_s):
            continue
        if task.node is node:
            # Without a record: at worst another life of the coordinator has it prove itself once more.
            task.quarantine_s = 0.0
        node.suspect = None
        is_free = True
    return is_free


def _age_s(state: State, task: Task) -> float:
    """Since it was given its attempt."""
    return max(0.0, state.now_s - task.since_s - task.queued_s)
