"""A model of a client: submits, repeats what was not acknowledged, cancels, acknowledges, reconnects, vanishes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from herder_coordinator.core import events
from herder_shared.ids import BlobId, Incarnation, JobId, WorkloadKey
from herder_shared.states import Cause, Outcome
from herder_shared.wire.messages import (
    CancelOk,
    Function,
    JobSpec,
    Message,
    Payload,
    SubmitOk,
    SubmitRefused,
    TaskEnd,
    TaskItem,
    TaskOptions,
    TasksEnded,
    WorkloadSpec,
)
from sim.history import History, TaskKey, Violation
from sim.world import Wire, World

if TYPE_CHECKING:
    from sim.coordinator import Coordinator
    from sim.run import Faults

FUNCTIONS = [Function(BlobId(f"{n:040x}"), b"code") for n in range(3)]


@dataclass
class Plan:
    """A job as it is going to be submitted, and how far that is."""

    spec: JobSpec
    tasks: list[TaskItem]
    #: In which pieces.
    cuts: list[int]
    is_opened: bool = False
    is_closed: bool = False
    released: int = 0
    acknowledged: int = 0
    cursor: int = 0
    ends: list[TaskEnd] = field(default_factory=list)
    cancels: list[tuple[int, ...] | None] = field(default_factory=list)


class Client:
    def __init__(self, world: World, coordinator: Coordinator, history: History, faults: Faults, name: str) -> None:
        self.world = world
        self.coordinator = coordinator
        self.history = history
        self.faults = faults
        self.incarnation = Incarnation(name)
        self.owner = f"owner of {name[0]}"
        self.plans: list[Plan] = []
        self.wire: Wire | None = None
        self.life = 0
        self.session = 0
        self.is_gone = False
        self._plan_jobs()
        self._connect()

    # --- plans -------------------------------------------------------------------------------------------------------

    def _plan_jobs(self) -> None:
        random = self.world.random
        for number in range(random.randint(1, 3)):
            job = JobId(f"{self.incarnation}-job{number}")
            at_most_once = self.world.chance(0.3)
            options = TaskOptions(
                cores=random.choice([1.0, 1.0, 0.5, 2.0]),
                retries=0 if at_most_once else random.choice([0, 0, 2]),
                backoff_s=random.choice([0.0, 0.0, 0.3]),
                idempotent=not at_most_once,
                priority=random.choice([0, 0, 1]),
                nodes=random.choice([(), (), ("even",)]) if self.faults.labels else (),
            )
            workload = WorkloadSpec(WorkloadKey(f"w{random.randint(0, 1)}"))
            kind = "array" if self.world.chance(0.5) else "submit"
            spec = JobSpec(job, job, workload, options, self.owner, kind="array" if kind == "array" else "submit")
            count = random.randint(0, self.faults.tasks)
            tasks = [self._plan_task(job, index) for index in range(count)]
            cuts = (
                sorted({*random.sample(range(1, count), min(count - 1, random.randint(0, 5))), count}) if count else []
            )
            self.plans.append(Plan(spec, tasks, cuts))
            if at_most_once:
                self.history.at_most_once.update((job, index) for index in range(count))

    def _plan_task(self, job: JobId, index: int) -> TaskItem:
        random = self.world.random
        deps: list[TaskKey] = []
        if self.world.chance(self.faults.dependencies):
            for _ in range(random.randint(1, 3)):
                earlier = [plan for plan in self.plans if plan.tasks]
                if index and self.world.chance(0.7):
                    deps.append((job, random.randrange(index)))
                elif earlier:
                    plan = random.choice(earlier)
                    deps.append((plan.spec.job, random.randrange(len(plan.tasks))))
        key = f"{job}.{index}"
        is_blob = self.world.chance(0.1)
        args = Payload(b"", BlobId(f"args {random.randint(0, 3)}"), 100_000) if is_blob else Payload(key.encode())
        return TaskItem(args, tuple(deps))

    # --- connection --------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if self.is_gone or self.wire is not None:
            return
        wire = Wire(self.world, self.faults.delay_s)
        session = self.coordinator.client_connects(wire, self, self.incarnation, self.owner)
        if not session:
            self.world.after(0.1 + self.world.random.random() * 2, self._connect)
            return
        self.wire, self.life, self.session = wire, self.coordinator.life, session
        for plan in self.plans:
            for indices in plan.cancels:
                self._say(events.CancelRequested(self.incarnation, plan.spec.job, indices, running=True))
            if self._is_settled(plan):
                continue
            if plan.is_opened:
                self._say(events.Attached(self.incarnation, plan.spec.job, self._ackable(plan)))
            else:
                self._say(events.JobOpened(self.incarnation, plan.spec))
            self._submit(plan, plan.acknowledged, plan.released)
        self._proceed(wire)

    def _is_settled(self, plan: Plan) -> bool:
        return plan.is_closed and len(plan.ends) == len(plan.tasks) == self._ackable(plan)

    def is_done(self) -> bool:
        return self.is_gone or all(
            plan.is_closed and len(plan.ends) == len(plan.tasks) and not plan.cancels for plan in self.plans
        )

    def closed(self, wire: Wire) -> None:
        if self.wire is wire:
            self.wire = None
            self.world.after(self.world.random.random() * 2, self._connect)

    def break_link(self) -> None:
        if self.wire is None or self.wire.broken:
            return
        wire, life = self.wire, self.life
        gone = events.ClientDisconnected(self.incarnation, self.session)
        wire.cut([lambda: self.closed(wire), lambda: self.coordinator.receive(life, gone)])

    def vanish(self) -> None:
        self.is_gone = True
        self.break_link()

    def _say(self, event: events.Event) -> None:
        if self.wire is not None:
            self.coordinator.post_client(self.wire, self.life, self.incarnation, event)

    # --- what it does ------------------------------------------------------------------------------------------------

    def _proceed(self, wire: Wire) -> None:
        """Submit the next piece of some job, now and then, until all is submitted."""
        if self.wire is not wire or self.is_gone:
            return
        for plan in self.plans:
            left = [cut for cut in plan.cuts if cut > plan.released]
            if left:
                first, plan.released = plan.released, left[0]
                self._submit(plan, first, plan.released)
                break
            if not plan.is_closed and plan.acknowledged == len(plan.tasks) and plan.is_opened:
                self._say(events.JobClosed(self.incarnation, plan.spec.job, len(plan.tasks)))
        if not all(plan.is_closed for plan in self.plans):
            self.world.after(self.world.random.random() * self.faults.pause_s, lambda: self._proceed(wire))

    def _submit(self, plan: Plan, first: int, upto: int) -> None:
        random = self.world.random
        while first < upto:
            size = upto - first if self.world.chance(0.8) else random.randint(1, upto - first)
            function = FUNCTIONS[hash_of(plan.spec.job) % 3]
            tasks = tuple(plan.tasks[first : first + size])
            self._say(events.TasksSubmitted(self.incarnation, plan.spec.job, first, function, tasks, ""))
            first += size

    def cancel_something(self) -> None:
        plan = self.world.random.choice(self.plans)
        if self.is_gone or not plan.is_opened or plan.cancels:
            return
        if self.world.chance(0.3):
            plan.cancels.append(None)
        elif plan.acknowledged:
            count = self.world.random.randint(1, plan.acknowledged)
            plan.cancels.append(tuple(sorted(self.world.random.sample(range(plan.acknowledged), count))))
        for indices in plan.cancels:
            running = self.world.chance(0.5)
            self._say(events.CancelRequested(self.incarnation, plan.spec.job, indices, running))

    # --- what it hears -----------------------------------------------------------------------------------------------

    def receive(self, wire: Wire, message: Message) -> None:
        if wire is not self.wire or self.is_gone:
            return
        match message:
            case SubmitOk():
                self._submit_ok(self._plan(message.job), message.upto)
            case TasksEnded():
                self._ended(self._plan(message.job), message)
            case CancelOk():
                plan = self._plan(message.job)
                plan.cancels = [each for each in plan.cancels if each != message.indices]
            case SubmitRefused():
                plan = self._plan(message.job)
                if not (message.error == "JobNotFound" and self._is_settled(plan)):
                    raise Violation(f"a client was refused: {message}")
            case _:
                pass

    def _plan(self, job: JobId) -> Plan:
        return next(plan for plan in self.plans if plan.spec.job == job)

    def _submit_ok(self, plan: Plan, upto: int) -> None:
        if upto > plan.released:
            raise Violation(f"{upto} tasks of {plan.spec.job} were acknowledged, and {plan.released} sent")
        if plan.acknowledged == len(plan.tasks) == upto and plan.is_opened:
            # The answer to the close, or a repetition which says no less.
            job = self.coordinator.state.jobs.get(plan.spec.job)
            plan.is_closed = job is None or job.closed
        plan.is_opened = True
        plan.acknowledged = max(plan.acknowledged, upto)
        self.history.acknowledged.update((plan.spec.job, index) for index in range(upto))

    def _ended(self, plan: Plan, message: TasksEnded) -> None:
        if message.cursor > plan.cursor:
            # Those before it went down with an older connection: read on from what is here.
            self._say(events.Attached(self.incarnation, plan.spec.job, self._ackable(plan)))
            return
        for end in message.ends[plan.cursor - message.cursor :]:
            self.history.see((plan.spec.job, end.index), end)
            self._check_end(plan, end)
            plan.ends.append(end)
            plan.cursor += 1
        if self.world.chance(0.8):
            self._acknowledge(plan)
        else:
            self.world.after(self.world.random.random() * 3, lambda: self._acknowledge(plan))

    def _check_end(self, plan: Plan, end: TaskEnd) -> None:
        if end.failure is not None:
            root = end.failure.root_failure or end.failure
            if root.cause is Cause.DATA_LOST:
                raise Violation(f"{plan.spec.job}.{end.index}: {end.failure.message}")
        if end.outcome is Outcome.SUCCEEDED:
            key = f"{plan.spec.job}.{end.index}"
            if end.result is None or (end.result.inline != key.encode() and end.result.blob != f"result {key}"):
                raise Violation(f"{key} returned {end.result}")
            for job, index in plan.tasks[end.index].deps:
                dependency = self.history.seen.get((job, index))
                if dependency is not None and dependency.outcome is not Outcome.SUCCEEDED:
                    raise Violation(f"{key} succeeded, and {job}.{index}, which it needs, did not")

    def _ackable(self, plan: Plan) -> int:
        """Values of tasks on which unacknowledged ones depend must not be let go."""
        claimed = {key for each in self.plans for item in each.tasks[each.acknowledged :] for key in item.deps}
        for cursor, end in enumerate(plan.ends):
            if (plan.spec.job, end.index) in claimed:
                return cursor
        return plan.cursor

    def _acknowledge(self, plan: Plan) -> None:
        self._say(events.EventsAcked(self.incarnation, plan.spec.job, self._ackable(plan)))


def hash_of(text: str) -> int:
    """Like `hash`, the same in every process."""
    return sum(text.encode())
