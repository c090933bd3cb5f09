"""Tasks that are clients, tasks that are run again, restarts and lost nodes in any order: what must always hold does.

The lab checks the invariants after each event; a failure names the seed, by which the same happens again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from herder_coordinator.core import events
from herder_coordinator.core.state import Node, Task
from herder_shared.ids import Incarnation, JobId, NodeName
from herder_shared.states import Cause, Outcome, TaskState
from herder_shared.wire.messages import RunningAttempt
from support.core_lab import CLIENT, FUNCTION, Lab, failed, item, job_spec, success

STEPS = 120
NODES = ("n1", "n2", "n3")


class Walk:
    """One random history."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.lab = Lab()
        self.sessions = 1
        self.jobs = 0
        self.nodes: dict[str, int] = {}
        self.lab.client(session=self.session())
        for name in NODES:
            self.join(name)
        self.open(CLIENT)

    def session(self) -> int:
        self.sessions += 1
        return self.sessions

    # What may happen.

    def join(self, name: str) -> None:
        """An agent is there, or back with what it had."""
        session = self.nodes[name] = self.session()
        memory_bytes, cores = 1000, 2 + self.chance.randrange(2)
        self.lab.connect(name, session, cores=cores, memory_bytes=memory_bytes, resources={"licence": 2.0})
        node = self.lab.state.nodes[NodeName(name)]
        kept = [each for each in node.attempts.items() if self.chance.random() < 0.9]
        running = [
            RunningAttempt(attempt, task.job.id, task.index, started=True, lent=self.chance.random() < 0.3)
            for attempt, task in kept
        ]
        self.lab.sync(name, session, running)

    def leave(self) -> None:
        name = self.chance.choice(NODES)
        if self.nodes.get(name):
            self.lab.do(events.AgentDisconnected(NodeName(name), self.nodes.pop(name)))

    def come_back(self) -> None:
        name = self.chance.choice(NODES)
        if name not in self.nodes:
            self.join(name)

    def open(self, client: Incarnation) -> None:
        self.jobs += 1
        job = JobId(f"job{self.jobs}")
        options: dict[str, Any] = {
            "memory_bytes": self.chance.choice((0, 300)),
            "cores": self.chance.choice((0.5, 1, 2)),
            "resources": self.chance.choice(({}, {"licence": 1.0})),
            "priority": self.chance.randrange(2),
        }
        spec = job_spec(job, detached=self.chance.random() < 0.1, retries=self.chance.randrange(2), **options)
        self.lab.do(events.JobOpened(client, spec))
        if job not in self.lab.state.jobs:
            return
        tasks = tuple(
            item(job, index, deps=[(job, index - 1)] if index and self.chance.random() < 0.3 else [])
            for index in range(self.chance.randrange(1, 5))
        )
        self.lab.do(events.TasksSubmitted(client, job, 0, FUNCTION, tasks, ""))
        if self.chance.random() < 0.5:
            self.lab.do(events.JobClosed(client, job, len(tasks)))

    def submit(self) -> None:
        self.open(CLIENT)

    def placed(self) -> tuple[Node, Task] | None:
        """A task with an attempt on a node that is there."""
        found = [
            (node, task)
            for name in self.nodes
            for node in [self.lab.state.nodes[NodeName(name)]]
            for task in node.attempts.values()
        ]
        return self.chance.choice(found) if found else None

    def start(self) -> None:
        if (found := self.placed()) is not None:
            self.lab.started(found[1].attempt, name=found[0].name, session=found[0].session)

    def become_client(self) -> None:
        if (found := self.placed()) is None or found[1].state is not TaskState.RUNNING or found[1].job.depth > 3:
            return
        node, task = found
        client = self.lab.state.task_clients.get(task.attempt, Incarnation(f"of-{task.attempt}"))
        self.lab.do(events.ClientConnected(client, self.session(), "", node.name, task.attempt))
        self.open(client)

    def lend(self) -> None:
        if (found := self.placed()) is not None:
            node, task = found
            self.lab.do(events.SlotsChanged(node.name, node.session, (task.attempt,), ()))

    def reclaim(self) -> None:
        if (found := self.placed()) is not None:
            node, task = found
            self.lab.do(events.SlotsChanged(node.name, node.session, (), (task.attempt,)))

    def end(self) -> None:
        if (found := self.placed()) is None:
            return
        node, task = found
        name, session, attempt, index, job = node.name, node.session, task.attempt, task.index, task.job.id
        kind = self.chance.random()
        if kind < 0.6:
            end = success(attempt, index, job)
        elif kind < 0.8:
            end = failed(attempt, Cause.EXCEPTION, index=index, job=job)
        elif kind < 0.9:
            end = failed(attempt, Cause.CANCELLED, Outcome.CANCELLED, index, job=job)
        else:
            end = failed(attempt, Cause.TEMPLATE_LOST, Outcome.LOST, index, job=job)
        self.lab.ended(end, name=name, session=session)

    def cancel(self) -> None:
        if self.lab.state.jobs:
            job = self.chance.choice(list(self.lab.state.jobs))
            indices = None if self.chance.random() < 0.3 else (0,)
            self.lab.do(events.CancelRequested(CLIENT, job, indices, running=self.chance.random() < 0.5))

    def retry(self) -> None:
        if self.lab.state.jobs:
            self.lab.do(events.RetryRequested(CLIENT, 1, self.chance.choice(list(self.lab.state.jobs))))

    def acknowledge(self) -> None:
        for job in list(self.lab.state.jobs.values()):
            if job.client in self.lab.state.clients and self.chance.random() < 0.5:
                self.lab.do(events.EventsAcked(job.client, job.id, self.chance.randrange(job.cursor + 1)))

    def pass_time(self) -> None:
        self.lab.pass_time(self.chance.choice((0.5, 1.5, 5.0)))

    def restart(self) -> None:
        if self.chance.random() < 0.3:
            self.lab.restart(by_snapshot=self.chance.random() < 0.5)
            self.nodes.clear()
            self.lab.pass_time(0.5)
            self.lab.client(session=self.session())
            for name in NODES:
                if self.chance.random() < 0.8:
                    self.join(name)

    def go(self) -> None:
        """All of it, and then until everything has ended."""
        can: list[Callable[[], None]] = [
            *(self.start, self.end, self.become_client) * 4,
            *(self.lend, self.reclaim, self.pass_time, self.submit, self.acknowledge, self.come_back) * 2,
            *(self.leave, self.cancel, self.retry, self.restart),
        ]
        for _ in range(STEPS):
            self.chance.choice(can)()
        self.finish()

    def finish(self) -> None:
        for name in NODES:
            if name not in self.nodes:
                self.join(name)
        self.lab.pass_time(130.0 - 10.0 * len(self.nodes))
        for name in NODES:
            self.lab.heard(name, self.nodes[name])
        for _ in range(2000):
            if all(job.ended == job.count for job in self.lab.state.jobs.values()):
                return
            if (found := self.placed()) is None:
                self.lab.pass_time(5.0)
                for name in NODES:
                    if not self.lab.state.nodes[NodeName(name)].session:
                        self.join(name)
                    self.lab.heard(name, self.nodes[name])
                continue
            node, task = found
            self.lab.ended(success(task.attempt, task.index, task.job.id), name=node.name, session=node.session)
        left = [(job.id, job.count - job.ended) for job in self.lab.state.jobs.values() if job.ended < job.count]
        raise AssertionError(f"tasks never end: {left}")


@pytest.mark.parametrize("seed", range(15))
def test_whatever_happens_every_task_ends_and_every_account_is_right(seed: int) -> None:
    Walk(seed).go()
