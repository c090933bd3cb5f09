"""A model of an agent that obeys the protocol: slots, a queue, attempts, ends that are kept until acknowledged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from herder_coordinator.core import events
from herder_shared.ids import AttemptId, BlobId, Incarnation, JobId, NodeName, WorkloadKey
from herder_shared.states import Cause, Outcome
from herder_shared.wire.messages import (
    AckAttempts,
    AttemptEnd,
    AttemptStart,
    CancelAttempts,
    Failure,
    HeartbeatAck,
    JobBrief,
    Message,
    NodeFacts,
    Payload,
    RunningAttempt,
    StartAttempts,
    SyncOk,
    Usage,
)
from sim.history import History, Violation
from sim.world import Wire, World

if TYPE_CHECKING:
    from sim.coordinator import Coordinator
    from sim.run import Faults

LEASE_S = 30.0
HEARTBEAT_S = 2.0


@dataclass
class Run:
    start: AttemptStart
    brief: JobBrief
    is_running: bool = False
    end: AttemptEnd | None = None


class Agent:
    def __init__(
        self, world: World, coordinator: Coordinator, history: History, faults: Faults, *, name: str, cores: int
    ) -> None:
        self.world = world
        self.coordinator = coordinator
        self.history = history
        self.faults = faults
        self.facts = NodeFacts(NodeName(name), cores, 1 << 30, labels=("even",) if cores % 2 == 0 else ())
        self._born = 0
        self.is_alive = False
        self.stopped_until_s = 0.0
        self.start()

    # --- lives -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._born += 1
        self.incarnation = Incarnation(f"{self.facts.node}-{self._born}")
        self.is_alive = True
        self.epoch_seen = 0
        self.runs: dict[AttemptId, Run] = {}
        self._inbox: list[Callable[[], None]] = []
        self.accepted: set[AttemptId] = set()
        self._reset_link()
        self._connect(self.incarnation)
        self._beat(self.incarnation)

    def _reset_link(self) -> None:
        self.wire: Wire | None = None
        self.session = 0
        self.life = 0
        self.heard_s = self.world.now_s
        self.jobs: dict[JobId, JobBrief] = {}
        self.demoted: set[WorkloadKey] = set()
        self.functions: set[BlobId] = set()

    def kill(self, down_s: float) -> None:
        """Power off or SIGKILL: what ran dies; the kernel closes the connection, or nobody does."""
        if not self.is_alive:
            return
        self.is_alive = False
        self.runs.clear()
        if self.wire is not None:
            if self.world.chance(0.3):
                self.wire.silent = True
            else:
                self._cut(self.wire, self.life, self.session)
        self.world.after(down_s, self.start)

    def stop(self, seconds: float) -> None:
        """SIGSTOP: nothing is read, sent or noticed."""
        self.stopped_until_s = max(self.stopped_until_s, self.world.now_s + seconds)

    def _is_stopped(self) -> bool:
        return self.world.now_s < self.stopped_until_s

    # --- connection --------------------------------------------------------------------------------------------------

    def _connect(self, incarnation: Incarnation) -> None:
        if not self.is_alive or incarnation != self.incarnation or self.wire is not None:
            return
        if self._is_stopped():
            self.world.at(self.stopped_until_s, lambda: self._connect(incarnation))
            return
        wire = Wire(self.world, self.faults.delay_s)
        session = 0 if self.faults.is_cut_off(self.facts.node) else self._greet(wire)
        if not session:
            self.world.after(0.1 + self.world.random.random() * 2, lambda: self._connect(incarnation))
            return
        self._reset_link()
        self.wire, self.session, self.life = wire, session, self.coordinator.life
        if self.coordinator.state.epoch < self.epoch_seen:
            raise Violation("an agent was greeted by an older life of the coordinator")
        self.epoch_seen = self.coordinator.state.epoch
        # The welcome takes a while; what has ended meanwhile is in the inventory.
        wire.send(1, lambda: self._welcomed(wire))

    def _greet(self, wire: Wire) -> int:
        return self.coordinator.agent_connects(wire, self, self.facts, self.incarnation)

    def _welcomed(self, wire: Wire) -> None:
        if self.wire is wire and self.is_alive:
            self._when_awake(lambda: self._sync(wire))

    def _when_awake(self, what: Callable[[], None]) -> None:
        """Now, or in order when it runs again. A killed agent's inbox is empty."""
        self._inbox.append(what)
        self._drain(self.incarnation)

    def _drain(self, incarnation: Incarnation) -> None:
        if incarnation != self.incarnation:
            return
        if self._is_stopped():
            self.world.at(self.stopped_until_s, lambda: self._drain(incarnation))
            return
        inbox, self._inbox = self._inbox, []
        for what in inbox:
            what()

    def _sync(self, wire: Wire) -> None:
        if self.wire is not wire:
            return
        self.synced = True
        running = tuple(
            RunningAttempt(attempt, run.start.job, run.start.index, run.is_running)
            for attempt, run in self.runs.items()
            if run.end is None
        )
        ended = [run.end for run in self.runs.values() if run.end is not None]
        cut = self.world.random.randint(0, len(ended)) if ended and self.world.chance(0.3) else len(ended)
        more = cut < len(ended)
        self._say(events.AgentSynced(self.facts.node, self.session, running, tuple(ended[:cut]), more))
        if more:
            self._say(events.AttemptsEnded(self.facts.node, self.session, tuple(ended[cut:])))

    def closed(self, wire: Wire) -> None:
        if self.wire is wire:
            self._reset_link()
            incarnation = self.incarnation
            self.world.after(self.world.random.random() * 2, lambda: self._connect(incarnation))

    def break_link(self) -> None:
        if self.wire is not None and not self.wire.broken:
            if self.world.chance(self.faults.silent_share):
                self.wire.silent = True
            else:
                self._cut(self.wire, self.life, self.session)

    def _cut(self, wire: Wire, life: int, session: int) -> None:
        gone = events.AgentDisconnected(self.facts.node, session)
        wire.cut([lambda: self.closed(wire), lambda: self.coordinator.receive(life, gone)])

    def _say(self, event: events.Event) -> None:
        if self.wire is not None:
            self.coordinator.post(self.wire, self.life, event)

    def _beat(self, incarnation: Incarnation) -> None:
        if not self.is_alive or incarnation != self.incarnation:
            return
        if not self._is_stopped() and self.wire is not None:
            if self.world.now_s - self.heard_s > LEASE_S:
                self._cut(self.wire, self.life, self.session)
            else:
                wire = self.wire
                self._say(events.AgentHeard(self.facts.node, self.session))
                wire.send(0, lambda: self.coordinator.answer_heartbeat(wire, self, HeartbeatAck(0)))
        self.world.after(HEARTBEAT_S, lambda: self._beat(incarnation))

    # --- orders ------------------------------------------------------------------------------------------------------

    def receive(self, wire: Wire, message: Message) -> None:
        if self.is_alive:
            self._when_awake(lambda: self._obey(wire, message))

    def _obey(self, wire: Wire, message: Message) -> None:
        if isinstance(message, StartAttempts):
            if message.session == self.session:
                self._accept(message)
            return
        if wire is not self.wire:
            return
        self.heard_s = self.world.now_s
        match message:
            case AckAttempts():
                self._drop(message.attempts)
            case SyncOk():
                self._drop(message.drop)
            case CancelAttempts():
                for attempt in message.attempts:
                    run = self.runs.get(attempt)
                    if run is None or run.end is not None:
                        continue
                    if not message.waiting_only:
                        self.world.after(self.world.random.random(), lambda run=run: self._cancelled(run))  # type: ignore[misc]
                    elif not run.is_running:
                        self._cancelled(run)
            case _:
                pass

    def _accept(self, message: StartAttempts) -> None:
        self.heard_s = self.world.now_s
        for brief in message.jobs:
            self.jobs[brief.job] = brief
        # A verdict may overtake an order that was made before it and had to be durable first: it holds all the same.
        self.demoted.update(spec.key for spec in message.workloads if spec.demoted)
        self.functions.update(function.id for function in message.functions)
        for start in message.attempts:
            if start.attempt in self.accepted:
                continue
            if start.job not in self.jobs or (start.function is not None and start.function not in self.functions):
                raise Violation(f"an agent was not told what it needs for {start.job}.{start.index}")
            self.accepted.add(start.attempt)
            self.runs[start.attempt] = Run(start, self.jobs[start.job])
        self._pump()

    def _drop(self, attempts: tuple[AttemptId, ...]) -> None:
        for attempt in attempts:
            self.runs.pop(attempt, None)
        self._pump()

    def _pump(self) -> None:
        used = sum(run.brief.options.cores for run in self.runs.values() if run.is_running)
        for run in list(self.runs.values()):
            if run.end is not None or run.is_running:
                continue
            if used + run.brief.options.cores > self.facts.cores:
                return
            used += run.brief.options.cores
            run.is_running = True
            self._launch(run)

    def _launch(self, run: Run) -> None:
        start, world = run.start, self.world
        incarnation = self.incarnation
        if world.chance(self.faults.start_failures):
            failure = Failure(cause=Cause.START_FAILED, message="no process")
            world.after(0.01, lambda: self._ended(incarnation, run, Outcome.LOST, failure))
            return
        self.history.start((start.job, start.index), start.attempt, self.incarnation)
        _check_dependencies(start)
        if world.chance(0.7):
            self._say(events.AttemptsStarted(self.facts.node, self.session, (start.attempt,)))
        outcome, fate = self._fate(run)
        duration_s = world.random.expovariate(1 / self.faults.task_s)
        world.after(duration_s, lambda: self._ended(incarnation, run, outcome, fate))

    def _fate(self, run: Run) -> tuple[Outcome, Failure | None]:
        draw = self.world.random.random()
        if self._method(run) == "fork" and self.world.chance(self.faults.fork_deaths):
            cause = Cause.DEADLOCK if self.world.chance(0.5) else Cause.SIGNAL
            return Outcome.CRASHED, Failure(cause=cause, message="of the fork", signal=9)
        if draw < self.faults.exceptions:
            return Outcome.FAILED, Failure(cause=Cause.EXCEPTION, message="boom")
        if draw < self.faults.exceptions + self.faults.signals:
            return Outcome.CRASHED, Failure(cause=Cause.SIGNAL, message="signal 11", signal=11)
        if draw < self.faults.exceptions + self.faults.signals + self.faults.templates:
            return Outcome.LOST, Failure(cause=Cause.TEMPLATE_LOST, message="the template died")
        return Outcome.SUCCEEDED, None

    def _method(self, run: Run) -> str:
        return "fresh" if run.start.start or run.brief.workload in self.demoted else "fork"

    def _ended(self, incarnation: Incarnation, run: Run, outcome: Outcome, failure: Failure | None) -> None:
        attempt = run.start.attempt
        if not self.is_alive or incarnation != self.incarnation or self.runs.get(attempt) is not run or run.end:
            return
        if self._is_stopped():
            self.world.at(self.stopped_until_s, lambda: self._ended(incarnation, run, outcome, failure))
            return
        key = f"{run.start.job}.{run.start.index}"
        result = None
        if outcome is Outcome.SUCCEEDED:
            is_blob = run.start.index % 5 == 0
            result = Payload(b"", BlobId(f"result {key}"), 100_000) if is_blob else Payload(key.encode())
        usage = Usage(
            node=self.facts.node,
            attempt=run.start.ordinal,
            start_method=self._method(run),
            wall_s=self.faults.task_s,
            core_s=self.faults.task_s * run.brief.options.cores,
        )
        run.end = AttemptEnd(attempt, run.start.job, run.start.index, outcome, result, failure, usage)
        run.is_running = False
        if self.wire is not None and getattr(self, "synced", False):
            self._say(events.AttemptsEnded(self.facts.node, self.session, (run.end,)))
        self._pump()

    def _cancelled(self, run: Run) -> None:
        self._ended(self.incarnation, run, Outcome.CANCELLED, Failure(cause=Cause.CANCELLED, message="cancelled"))


def _check_dependencies(start: AttemptStart) -> None:
    for job, index, value in start.deps:
        key = f"{job}.{index}"
        if value.inline != key.encode() and value.blob != f"result {key}":
            raise Violation(f"{start.job}.{start.index} got {value} as the value of {key}")
