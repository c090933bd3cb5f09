"""The coordinator's core on a bench: events in, whole lists of effects out, invariants checked after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from herder_coordinator.core import effects, events
from herder_coordinator.core.records import Record
from herder_coordinator.core.room import Room
from herder_coordinator.core.snapshot import snapshot
from herder_coordinator.core.state import State, check_invariants, new_state
from herder_coordinator.core.step import finish_replay, replay_record, step
from herder_shared.ids import AttemptId, BlobId, ClusterId, Incarnation, JobId, NodeName, WorkloadKey
from herder_shared.states import Cause, Outcome
from herder_shared.wire.messages import (
    AttemptEnd,
    AttemptStart,
    Failure,
    Function,
    JobBrief,
    JobSpec,
    Logs,
    NodeFacts,
    Payload,
    RunningAttempt,
    StartAttempts,
    TaskEnd,
    TaskItem,
    TaskOptions,
    TasksEnded,
    Usage,
    WorkloadSpec,
)

CLUSTER = ClusterId("c" * 32)
JOB = JobId("job1")
CLIENT = Incarnation("client1")
FUNCTION = Function(BlobId("f1"), b"code")
WORKLOAD = WorkloadSpec(WorkloadKey("w1"))


class Lab:
    """One life of the core at a time. `do` gives the effects without `Observe`; `records` is the journal so far."""

    #: What each life has for what waits.
    new_room: Callable[[], Room] = Room

    def __init__(self) -> None:
        self.now_s = 100.0
        self.records: list[Record] = []
        self.observed: list[effects.Observe] = []
        self.state: State = new_state(CLUSTER, 1, room=Lab.new_room())
        finish_replay(self.state, self.now_s)

    def do(self, event: events.Event, after_s: float = 0.0) -> list[effects.Effect]:
        """Step; time goes by in ticks of half a second first."""
        self.pass_time(after_s)
        return self._step(event)

    def pass_time(self, seconds: float) -> list[effects.Effect]:
        """Let time go by, with ticks. Returns all that they brought."""
        brought: list[effects.Effect] = []
        until_s = self.now_s + seconds
        while self.now_s < until_s - 1e-9:
            self.now_s = min(until_s, self.now_s + 0.5)
            brought += self._step(events.Ticked())
        return brought

    def _step(self, event: events.Event) -> list[effects.Effect]:
        all_effects = step(self.state, event, self.now_s)
        check_invariants(self.state)
        self.records += [effect.record for effect in all_effects if isinstance(effect, effects.Persist)]
        self.observed += [effect for effect in all_effects if isinstance(effect, effects.Observe)]
        return [effect for effect in all_effects if not isinstance(effect, effects.Observe)]

    def restart(self, *, by_snapshot: bool = False) -> None:
        """A new life, from the journal so far or from a snapshot of the state."""
        records = list(snapshot(self.state)) if by_snapshot else self.records
        self.state = new_state(CLUSTER, self.state.epoch + 1, room=Lab.new_room())
        for record in records:
            replay_record(self.state, record)
        finish_replay(self.state, self.now_s)
        if not self.state.loose and not self.state.orphans:  # else the first step decides what a cut tail left open
            check_invariants(self.state)
        self.records = list(snapshot(self.state))

    # --- peers -------------------------------------------------------------------------------------------------------

    def client(self, client: Incarnation = CLIENT, owner: str = "me", session: int = 1) -> None:
        self.do(events.ClientConnected(client, session, owner))

    def open(self, job: JobId = JOB, client: Incarnation = CLIENT, **options: Any) -> JobSpec:
        """Open a job; `start`, `detached` and the task options by name."""
        spec = job_spec(job, **options)
        self.do(events.JobOpened(client, spec))
        return spec

    def submit(
        self,
        count: int = 1,
        job: JobId = JOB,
        first: int | None = None,
        items: Sequence[TaskItem] | None = None,
        client: Incarnation = CLIENT,
    ) -> list[effects.Effect]:
        start = self.state.jobs[job].count if first is None else first
        tasks = tuple(items) if items is not None else tuple(item(job, start + number) for number in range(count))
        return self.do(events.TasksSubmitted(client, job, start, FUNCTION, tasks, ""))

    def node(self, name: str = "n1", session: int = 1, incarnation: str = "", **facts: Any) -> list[effects.Effect]:
        """Connect an agent and sync it with nothing."""
        self.connect(name, session, incarnation, **facts)
        return self.sync(name, session)

    def connect(self, name: str = "n1", session: int = 1, incarnation: str = "", **facts: Any) -> list[effects.Effect]:
        facts.setdefault("cores", 2)
        facts.setdefault("memory_bytes", 1 << 30)
        known = NodeFacts(NodeName(name), **facts)
        return self.do(events.AgentConnected(known, Incarnation(incarnation or f"{name}-1"), session))

    def sync(
        self,
        name: str = "n1",
        session: int = 1,
        running: Sequence[RunningAttempt] = (),
        ended: Sequence[AttemptEnd] = (),
        more: bool = False,
    ) -> list[effects.Effect]:
        return self.do(events.AgentSynced(NodeName(name), session, tuple(running), tuple(ended), more))

    def started(self, *attempts: AttemptId, name: str = "n1", session: int = 1) -> list[effects.Effect]:
        return self.do(events.AttemptsStarted(NodeName(name), session, attempts))

    def ended(self, *ends: AttemptEnd, name: str = "n1", session: int = 1) -> list[effects.Effect]:
        return self.do(events.AttemptsEnded(NodeName(name), session, ends))

    def heard(self, name: str = "n1", session: int = 1) -> list[effects.Effect]:
        return self.do(events.AgentHeard(NodeName(name), session))

    def cancel(self, job: JobId = JOB, client: Incarnation = CLIENT, running: bool = True) -> list[effects.Effect]:
        return self.do(events.CancelRequested(client, job, None, running))

    def change(
        self, job: JobId = JOB, client: Incarnation = CLIENT, *, paused: bool | None = None, priority: int | None = None
    ) -> list[effects.Effect]:
        return self.do(events.JobChangeRequested(client, 7, job, paused, priority))

    def attempt(self, index: int = 0, job: JobId = JOB) -> AttemptId:
        return self.state.jobs[job].tasks[index].attempt

    def place(self, index: int = 0, job: JobId = JOB) -> str | None:
        """The node on which the task's attempt is."""
        task = self.state.jobs[job].tasks.get(index)
        return task.node.name if task is not None and task.node is not None else None

    def outcomes(self, job: JobId = JOB) -> dict[int, Outcome]:
        return {end.index: end.outcome for end in self.state.jobs[job].ends}

    def failure(self, index: int = 0, job: JobId = JOB) -> Failure:
        end = self.state.jobs[job].ends.get(index)
        assert end is not None
        assert end.failure is not None
        return end.failure


def job_spec(job: JobId = JOB, *, start: str = "auto", detached: bool = False, **options: Any) -> JobSpec:
    workload = WorkloadSpec(WorkloadKey("w1"), start=start)  # type: ignore[arg-type]
    return JobSpec(job, "a job", workload, TaskOptions(**options), "me", detached=detached, kind="array")


def item(job: JobId = JOB, index: int = 0, deps: Sequence[tuple[JobId, int]] = ()) -> TaskItem:
    return TaskItem(Payload(f"{job}.{index}".encode()), tuple(deps))


def success(attempt: AttemptId, index: int = 0, job: JobId = JOB, **usage: Any) -> AttemptEnd:
    result = Payload(b"value of %d" % index)
    return AttemptEnd(attempt, job, index, Outcome.SUCCEEDED, result, None, Usage(**usage), Logs(b"out"))


def failed(
    attempt: AttemptId,
    cause: Cause,
    outcome: Outcome = Outcome.FAILED,
    index: int = 0,
    *,
    job: JobId = JOB,
    start_method: str = "fresh",
    retryable: bool = True,
) -> AttemptEnd:
    failure = Failure(cause=cause, message=f"it ended by {cause}", retryable=retryable)
    return AttemptEnd(attempt, job, index, outcome, None, failure, Usage(start_method=start_method))


def starts(some: Sequence[effects.Effect]) -> list[tuple[str, AttemptStart, str]]:
    """`(node, order, after)` of each attempt that is to start."""
    return [
        (effect.node, start, effect.after)
        for effect in some
        if isinstance(effect, effects.SendToAgent) and isinstance(effect.message, StartAttempts)
        for start in effect.message.attempts
    ]


def to_client(some: Sequence[effects.Effect], client: Incarnation = CLIENT) -> list[Any]:
    return [e.message for e in some if isinstance(e, effects.SendToClient) and e.client == client]


def to_agent(some: Sequence[effects.Effect], name: str = "n1") -> list[Any]:
    return [e.message for e in some if isinstance(e, effects.SendToAgent) and e.node == name]


def told_ends(some: Sequence[effects.Effect], client: Incarnation = CLIENT) -> list[TaskEnd]:
    return [end for message in to_client(some, client) if isinstance(message, TasksEnded) for end in message.ends]


def brief(spec: JobSpec) -> JobBrief:
    return JobBrief(spec.job, spec.name, spec.workload.key, spec.options, "me")
