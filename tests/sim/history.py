"""What happened, as clients, agents and the journal tell it, and what must be true of it.

Nothing here knows how anything was done. A client says what it submitted, what was acknowledged to it and what it was
told; an agent says when the code of an attempt ran (the "I ran" line) and what it used; a coordinator that has just
replayed its journal is asked for everything that was ever acknowledged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from herder_coordinator.core.records import (
    AttemptsAssigned,
    DrainSet,
    JobChanged,
    Record,
    TasksEnded,
    TasksReset,
    TasksSubmitted,
)
from herder_coordinator.core.state import State
from herder_shared.ids import AttemptId, JobId, NodeName
from herder_shared.states import Cause, Outcome
from herder_shared.wire.messages import AttemptStart, Failure, JobSpec, Payload, TaskEnd, TaskItem

TaskKey = tuple[JobId, int]


class Violation(AssertionError):
    """A promise was broken."""


@dataclass
class Plan:
    """A job as its client means it, and how far that is."""

    spec: JobSpec
    #: In the order of submission: what was really submitted, after dependencies that had ended were resolved.
    items: list[TaskItem] = field(default_factory=list)
    #: Acknowledged to its client.
    opened: bool = False
    upto: int = 0
    #: Of these cancellations the coordinator has said that it has them.
    cancelled: bool = False
    cancelled_indices: set[int] = field(default_factory=set)
    #: Its client asked for some cancellation.
    cancels: bool = False
    #: Its tasks run until they are cancelled, and its client cancels each of them.
    is_endless: bool = False
    #: How often its client has asked for what failed to be run again, and how many tasks it was told are.
    retries: int = 0
    again: int = 0
    #: Somebody has changed it, and to what: paused, priority. While the answer is out, it may be so or not.
    is_changed: bool = False
    change: tuple[bool, int] = (False, 0)
    is_changing: bool = False
    #: Its client died, or left it behind.
    is_abandoned: bool = False


@dataclass
class History:
    plans: dict[JobId, Plan] = field(default_factory=dict)
    #: Every start of user code: attempt and agent process.
    starts: dict[TaskKey, list[tuple[AttemptId, str]]] = field(default_factory=lambda: defaultdict(list))
    #: Attempts that ended by themselves, so that it is known how: `retries` may follow whatever the task is.
    ended: set[AttemptId] = field(default_factory=set)
    #: Tasks whose code ended well once.
    finished: set[TaskKey] = field(default_factory=set)
    #: What each client (its incarnation) was told, and what anybody was told of a task.
    seen: dict[tuple[str, TaskKey], TaskEnd] = field(default_factory=dict)
    told: dict[TaskKey, TaskEnd] = field(default_factory=dict)
    #: Nodes to whose agents, links, templates or children something was done.
    disturbed: set[str] = field(default_factory=set)
    #: A disk lost a blob, so that tasks may end for want of data.
    lost_blobs: bool = False
    #: A coordinator took over from one that was stopped: agents may hang on the old one for longer than is waited.
    is_taken_over: bool = False
    lives: int = 0
    events: int = 0

    # --- what agents say ---------------------------------------------------------------------------------------------

    def start(self, order: AttemptStart, agent: str) -> None:
        """The code of an attempt begins to run."""
        key = (order.job, order.index)
        plan = self.plans.get(order.job)
        if plan is None or order.index >= len(plan.items):
            raise Violation(f"{key} runs, and nobody submitted it")
        attempts = [each for each, _ in self.starts[key]]
        if order.attempt in attempts:
            raise Violation(f"attempt {order.attempt} of {key} was started twice: {self.starts[key]}")
        self.starts[key].append((order.attempt, agent))
        options = plan.spec.options
        may_again = (options.retries or plan.retries) and self.ended.issuperset(attempts)
        if attempts and not options.idempotent and not may_again:
            raise Violation(f"{key} may run once, and ran as {self.starts[key]}")
        item = plan.items[order.index]
        if order.args != item.args:
            raise Violation(f"{key} was given {order.args}, submitted was {item.args}")
        if [(job, index) for job, index, _ in order.deps] != list(dict.fromkeys(item.deps)):
            raise Violation(f"{key} needs {item.deps} and got {order.deps}")
        for job, index, value in order.deps:
            if (job, index) not in self.finished:
                raise Violation(f"{key} was released before {job}.{index}, which it needs, had finished")
            if value != result_of((job, index)):
                raise Violation(f"{key} got {value} as the value of {job}.{index}")

    # --- what clients say --------------------------------------------------------------------------------------------

    def acknowledge(self, job: JobId, upto: int) -> None:
        """A client was told that its first `upto` tasks are safe."""
        plan = self.plans[job]
        plan.opened = True
        if upto > len(plan.items):
            raise Violation(f"{upto} tasks of {job} were acknowledged, and {len(plan.items)} submitted")
        plan.upto = max(plan.upto, upto)

    def see(self, client: str, key: TaskKey, end: TaskEnd) -> None:
        """A client was told how a task ended."""
        plan = self.plans[key[0]]
        before = self.seen.get((client, key))
        if before is not None and not (plan.retries and may_be_again(before)):
            raise Violation(f"client {client} was told twice how {key} ended")
        self.seen[client, key] = end
        first = self.told.setdefault(key, end)
        if first.outcome is not end.outcome and not self.lost_blobs:  # a client whose result is lost is told so
            if not plan.retries:
                raise Violation(f"{key} has two terminal records: {first} and {end}")
            if may_be_again(first):
                self.told[key] = end
        if key[1] >= len(plan.items):
            raise Violation(f"{key} ended, and was never submitted")
        match end.outcome:
            case Outcome.SUCCEEDED:
                self._check_success(key, end)
            case Outcome.CANCELLED:
                if not plan.cancels and not plan.is_abandoned and not plan.items[key[1]].deps:
                    raise Violation(f"{key} is cancelled, and nobody asked for it")
            case Outcome.LOST:
                self._check_loss(key, end)
            case _:
                pass
        is_away = self.disturbed or self.is_taken_over
        if end.failure is not None and end.failure.cause is Cause.UNSCHEDULABLE and not is_away:
            raise Violation(f"{key}: {end.failure.message}")
        # What is run again finds the values that it needs only as long as they happen to be kept; and so does what
        # depends on it.
        is_excused = self.lost_blobs or plan.is_abandoned or any(each.retries for each in self.plans.values())
        if end.failure is not None and _root(end.failure).cause is Cause.DATA_LOST and not is_excused:
            raise Violation(f"{key}: {end.failure.message}")

    def _check_success(self, key: TaskKey, end: TaskEnd) -> None:
        if key not in self.finished:
            raise Violation(f"{key} succeeded and never ran to its end")
        expected = content_of(key)
        if end.result is None or end.result.inline != expected:
            raise Violation(f"{key} returned {end.result} instead of {expected!r}")

    def _check_loss(self, key: TaskKey, end: TaskEnd) -> None:
        cause = end.failure.cause if end.failure is not None else None
        if cause is Cause.NODE_LOST and end.usage.node not in self.disturbed:
            raise Violation(f"{key} was lost with node {end.usage.node}, to which nothing had happened: {end.failure}")

    # --- what a coordinator says that has just replayed its journal --------------------------------------------------

    def check_replay(self, state: State) -> None:
        """Whatever was acknowledged is there."""
        for job_id, plan in self.plans.items():
            job = state.jobs.get(job_id)
            if not plan.opened:
                continue
            if job is None:
                if job_id not in state.summaries:
                    raise Violation(f"job {job_id} was acknowledged, and is not there after a restart")
                continue
            if job.count < plan.upto:
                raise Violation(f"{plan.upto} tasks of {job_id} were acknowledged; {job.count} are there")
            if job.resets < plan.again:
                raise Violation(f"{plan.again} tasks of {job_id} were to be run again; {job.resets} are")
            if plan.is_changed and not plan.is_changing and (job.paused, job.priority) != plan.change:
                raise Violation(f"{job_id} was changed to {plan.change}, and is {(job.paused, job.priority)}")
            if plan.cancelled and not job.cancelled:
                raise Violation(f"the cancellation of {job_id} was acknowledged, and is not there")
            for index in plan.cancelled_indices:
                if index >= job.count:  # it was refused: its client had been away for longer than its grace
                    continue
                task = job.tasks.get(index)
                is_again = plan.retries > 0  # it had ended, and there was nothing to be cancelled
                if not job.outcomes[index] and not is_again and not (task and (task.cancel or task.cancel_pending)):
                    raise Violation(f"the cancellation of {job_id}.{index} was acknowledged, and is not there")
        for (job_id, index), end in self.told.items():
            job = state.jobs.get(job_id)
            is_again = self.plans[job_id].retries > 0 and may_be_again(end)
            if job is not None and not job.outcomes[index] and not is_again:
                raise Violation(
                    f"a client was told that {job_id}.{index} {end.outcome}; the journal knows nothing of it"
                )

    def check_records(self, records: Sequence[Record], epoch: int) -> None:
        """The journal says each thing once, and what it says is kept to."""
        ended: set[TaskKey] = set()
        paused: set[JobId] = set()
        drained: set[NodeName] = set()
        assigned: set[AttemptId] = set()
        submitted: dict[JobId, int] = {}
        for record in records:
            match record:
                case TasksEnded():
                    for end in record.ends:
                        key = (record.job, end.index)
                        if key in ended:
                            raise Violation(f"the journal has two terminal records of {key}")
                        ended.add(key)
                case TasksReset():
                    ended.difference_update((record.job, index) for index in record.indices)
                case JobChanged():
                    (paused.add if record.paused else paused.discard)(record.job)
                case DrainSet():
                    (drained.add if record.on else drained.discard)(record.node)
                case AttemptsAssigned():
                    for one in record.attempts:
                        # An older life's, or one that was given up: it was not given out now, but came back.
                        if one.attempt.epoch != epoch or one.attempt in assigned:
                            continue
                        assigned.add(one.attempt)
                        if one.job in paused:
                            raise Violation(f"{one.job} is paused, and {one} was given to {record.node}")
                        if record.node in drained:
                            raise Violation(f"{record.node} is drained, and was given {one}")
                case TasksSubmitted():
                    if record.first < submitted.get(record.job, 0):
                        raise Violation(f"the journal has tasks from {record.first} on of {record.job} twice")
                    submitted[record.job] = record.first + len(record.tasks)
                case _:
                    pass


def may_be_again(end: TaskEnd) -> bool:
    """Who asks for what failed to be run again may be told of another end after this one."""
    return end.outcome not in {Outcome.SUCCEEDED, Outcome.CANCELLED}


def _root(failure: Failure) -> Failure:
    while failure.root_failure is not None:
        failure = failure.root_failure
    return failure


def content_of(key: TaskKey) -> bytes:
    """What the task returns."""
    return f"value of {key[0]}.{key[1]}".encode()


def result_of(key: TaskKey) -> Payload:
    """... as it travels: every fifth by reference."""
    from herder_shared.ids import blob_id

    content = content_of(key)
    return Payload(b"", blob_id(content), len(content)) if key[1] % 5 == 0 else Payload(content)
