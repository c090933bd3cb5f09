"""What happened, and what must be true of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from herder_shared.ids import AttemptId, JobId
from herder_shared.wire.messages import TaskEnd

TaskKey = tuple[JobId, int]


class Violation(AssertionError):
    """A promise was broken."""


@dataclass
class History:
    #: Every start of user code: attempt and agent process.
    starts: dict[TaskKey, list[tuple[AttemptId, str]]] = field(default_factory=lambda: defaultdict(list))
    #: Tasks whose submission was acknowledged to a client.
    acknowledged: set[TaskKey] = field(default_factory=set)
    #: What each client saw.
    seen: dict[TaskKey, TaskEnd] = field(default_factory=dict)
    #: Cancellations that were acknowledged.
    cancelled: set[TaskKey] = field(default_factory=set)
    at_most_once: set[TaskKey] = field(default_factory=set)
    steps: int = 0
    crashes: int = 0

    def start(self, key: TaskKey, attempt: AttemptId, agent: str) -> None:
        self.starts[key].append((attempt, agent))
        if key in self.at_most_once and len(self.starts[key]) > 1:
            raise Violation(f"{key} may run once, and ran as {self.starts[key]}")
        attempts = [each for each, _ in self.starts[key]]
        if len(set(attempts)) != len(attempts):
            raise Violation(f"an attempt of {key} was started twice: {attempts}")

    def see(self, key: TaskKey, end: TaskEnd) -> None:
        if key in self.seen:
            raise Violation(f"a client saw two terminal records of {key}")
        self.seen[key] = end
