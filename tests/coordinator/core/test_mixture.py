"""Everything at once: owners, priorities, wide and long tasks, pauses, recalls, growing memory, restarts.

Invariants hold after each step (the lab checks them), nobody is forgotten, and nobody starves."""

from __future__ import annotations

import random

import pytest

from herder_coordinator.core import events
from herder_coordinator.core.explain import explain
from herder_coordinator.core.state import Node, Task
from herder_shared.ids import AttemptId, Incarnation, JobId, NodeName
from herder_shared.states import AgentState, Cause, Outcome
from herder_shared.wire.messages import AttemptEnd
from support.core_lab import Lab, failed, success

OWNERS = {Incarnation(f"client{number}"): f"owner{number}" for number in range(3)}
OPTIONS: list[dict[str, object]] = [
    {},
    {"cores": 0.5},
    {"cores": 4.0},
    {"cores": 3.0, "timeout_s": 20.0},
    {"memory_bytes": 200, "memory_max_bytes": 900},
    {"gpus": 1, "retries": 2, "backoff_s": 0.3},
    {"resources": {"licence": 0.5}, "placement": "pack"},
    {"idempotent": False},
    {"priority": 1},
]


class Mixture:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lab = Lab()
        self.session = 100
        self.jobs: list[tuple[JobId, Incarnation]] = []
        for number, (client, owner) in enumerate(OWNERS.items()):
            self.lab.client(client, owner=owner, session=number + 1)
        for number in range(3):
            self.connect(number)

    def connect(self, number: int) -> None:
        self.session += 1
        facts: dict[str, object] = {"gpus": 2, "resources": {"licence": 1.0}} if number == 0 else {}
        self.lab.node(f"n{number}", self.session, f"life{self.session}", cores=4, memory_bytes=1000, **facts)

    def nodes(self) -> list[Node]:
        return [node for node in self.lab.state.nodes.values() if node.session]

    def attempts(self) -> list[tuple[Node, AttemptId, Task]]:
        return [(node, attempt, task) for node in self.nodes() for attempt, task in node.attempts.items()]

    def act(self) -> None:
        acts = [self.submit, self.end, self.end, self.end, self.end, self.change, self.tick, self.start, self.rare]
        self.random.choice(acts)()

    def submit(self) -> None:
        if len(self.jobs) >= 12:
            return
        client = self.random.choice(list(OWNERS))
        job = JobId(f"job{len(self.jobs)}")
        self.lab.open(job, client, detached=True, **self.random.choice(OPTIONS))
        self.jobs.append((job, client))
        self.lab.submit(self.random.randint(1, 30), job, client=client)
        self.lab.do(events.JobClosed(client, job, self.lab.state.jobs[job].count))

    def end(self) -> None:
        """One that holds a slot ends, or one that lies ahead is given back as if it had been recalled."""
        known = self.attempts()
        if not known:
            return
        node, attempt, task = self.random.choice(known)
        if attempt in node.ahead:
            self._report(node, failed(attempt, Cause.CANCELLED, Outcome.CANCELLED, task.index, job=task.job.id))
            return
        if task.grown is None and task.job.spec.options.memory_max_bytes and self.random.random() < 0.7:
            oom = failed(attempt, Cause.OUT_OF_MEMORY, Outcome.OUT_OF_MEMORY, task.index, job=task.job.id)
            self._report(node, oom)
        elif task.job.spec.options.retries and self.random.random() < 0.3:
            self._report(node, failed(attempt, Cause.EXCEPTION, Outcome.FAILED, task.index, job=task.job.id))
        else:
            self._report(node, success(attempt, task.index, task.job.id, wall_s=self.random.choice([0.001, 0.01, 3.0])))

    def _report(self, node: Node, end: AttemptEnd) -> None:
        self.lab.ended(end, name=node.name, session=node.session)

    def start(self) -> None:
        for node, attempt, _ in self.attempts():
            if attempt not in node.ahead and self.random.random() < 0.5:
                self.lab.started(attempt, name=node.name, session=node.session)

    def change(self) -> None:
        if self.jobs:
            job, client = self.random.choice(self.jobs)
            paused = self.random.choice([None, True, False])
            self.lab.change(job, client, paused=paused, priority=self.random.choice([None, -1, 0, 1]))

    def tick(self) -> None:
        self.lab.pass_time(self.random.choice([0.5, 2.0]))
        for node in self.nodes():
            self.lab.heard(node.name, node.session)

    def rare(self) -> None:
        if self.random.random() < 0.3:
            self.connect(self.random.randrange(3))
        elif self.random.random() < 0.3:
            self.lab.do(events.DrainRequested(NodeName("n1"), on=self.random.random() < 0.5))
        elif self.random.random() < 0.2:
            self.lab.restart(by_snapshot=self.random.random() < 0.5)
            for number, (client, owner) in enumerate(OWNERS.items()):
                self.lab.client(client, owner=owner, session=self.session + number)
            for number in range(3):
                self.connect(number)

    def explain_all(self) -> None:
        for job, _ in self.jobs:
            for index in range(self.lab.state.jobs[job].count):
                explained = explain(self.lab.state, job, index)
                assert explained is not None
                assert explained.summary

    def finish(self) -> None:
        """Everything is resumed; what runs ends, the oldest first, while new narrow tasks keep coming for long."""
        self.lab.do(events.DrainRequested(NodeName("n1"), on=False))
        for job, client in self.jobs:
            self.lab.change(job, client, paused=False, priority=0)
        crowd = JobId("crowd")
        self.lab.open(crowd, next(iter(OWNERS)), detached=True)
        for turn in range(6_000):
            if turn % 20 == 0:
                self.tick()
            if turn < 3_000 and self.lab.state.jobs[crowd].pending < 8:
                self.lab.submit(8, crowd, client=next(iter(OWNERS)))
            known = [one for one in self.attempts() if one[1] not in one[0].ahead]
            if known:
                node, attempt, task = min(known, key=lambda one: one[1])
                self._report(node, success(attempt, task.index, task.job.id, wall_s=2.0))
            elif not self.lab.state.delayed and not self.lab.state.busy:
                return
            if self.are_over() and turn < 3_000:
                return  # before the crowd was
        raise AssertionError("it does not end")

    def are_over(self) -> bool:
        return all(self.lab.state.jobs[job].ended == self.lab.state.jobs[job].count for job, _ in self.jobs)


@pytest.mark.parametrize("seed", [*range(5), 43, 89, 116])
def test_whatever_happens_everything_ends_although_others_keep_coming(seed: int) -> None:
    mixture = Mixture(seed)
    for _ in range(120):
        mixture.act()
    mixture.explain_all()
    mixture.finish()
    assert mixture.are_over()
    states = {node.state for node in mixture.lab.state.nodes.values()}
    assert AgentState.READY in states
