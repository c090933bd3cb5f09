"""The shipped client's connection (outbox, tracks, cursors, fetches) without its thread, and a user who submits,
cancels, leaves, dies and attaches again."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from herder.connection import Connection, Endpoint
from herder.outbox import Batch
from herder.payload import PickledFunction
from herder.questions import Question
from herder.tracks import Track
from herder_shared.errors import HerderError
from herder_shared.ids import BlobId, Incarnation, JobId, NodeName, WorkloadKey, blob_id
from herder_shared.wire.messages import (
    Answer,
    CancelOk,
    ChangeJob,
    Function,
    JobSpec,
    Message,
    Payload,
    RetryFailed,
    SubmitOk,
    TaskEnd,
    TaskItem,
    TaskOptions,
    WorkloadSpec,
)
from herder_shared.wire.session import Peer
from sim.agent import MEMORY_BYTES, break_link, cut_off
from sim.coordinator import CLUSTER
from sim.history import History, Plan, TaskKey, Violation
from sim.network import Network, SimDialler
from sim.world import Program, World, new_program

if TYPE_CHECKING:
    from sim.run import Faults

_CODE = [b"code %d" % n for n in range(3)]
FUNCTIONS = [PickledFunction(Function(blob_id(code), code), None, (), False, "f") for code in _CODE]
#: The third is too large to travel inside messages.
FUNCTIONS[2] = PickledFunction(Function(blob_id(_CODE[2]), b""), _CODE[2], (), False, "g")
ARGUMENTS = [b"large argument %d" % n for n in range(4)]


class SimConnection(Connection):
    """The shipped connection; what it is told is also told to the history."""

    def __init__(self, history: History, incarnation: Incarnation, owner: str) -> None:
        super().__init__(Endpoint((("coordinator", 1),), Path(), CLUSTER, "simulated"), None)
        self.history = history
        self._incarnation = incarnation
        self.owner = owner

    def begin(self, program: Program) -> None:
        """What `_serve` does before it waits."""
        self._ending = asyncio.Event()
        self._loop = program
        self._start_loss_timers()
        self._turn()

    @property
    def is_over(self) -> bool:
        return self._ending is not None and self._ending.is_set()

    def _receive(self, message: Message) -> None:
        match message:
            case SubmitOk():
                if message.job in self._tracks and not self._tracks[message.job].is_observer:
                    self.history.acknowledge(message.job, message.upto)
            case CancelOk():
                plan = self.history.plans[message.job]
                if message.indices is None:
                    plan.cancelled = True
                else:
                    plan.cancelled_indices.update(message.indices)
            case _:
                pass
        super()._receive(message)


@dataclass(eq=False)
class Job:
    """One job as the user has it, and the sink of its events."""

    client: Client
    plan: Plan
    #: How many tasks in each piece that is still to be submitted.
    pieces: list[int]
    function: PickledFunction
    track: Track | None = None
    is_closed: bool = False
    ends: dict[int, TaskEnd] = field(default_factory=dict)
    is_lost: bool = False
    #: How many ends it was told, and how many tasks the coordinator said that it runs again.
    told: int = 0
    again: int = 0
    #: What it has asked for and was not answered yet, and what it asks next.
    is_asking: bool = False
    wishes: list[Callable[[], None]] = field(default_factory=list)

    @property
    def id(self) -> JobId:
        return self.plan.spec.job

    @property
    def is_done(self) -> bool:
        is_told = len(self.ends) == len(self.plan.items) and self.told >= len(self.plan.items) + self.again
        return self.is_lost or (not self.pieces and self.is_closed and not self.is_asking and is_told)

    # What the connection calls.

    def started(self, tasks: Sequence[tuple[int, NodeName]]) -> None:
        for index, _ in tasks:
            if index >= len(self.plan.items):
                raise Violation(f"{self.id}.{index} is said to run, and was never submitted")

    def ended(self, ends: Sequence[TaskEnd]) -> None:
        for end in ends:
            self.client.history.see(self.client.name, (self.id, end.index), end)
            self.ends[end.index] = end
            self.told += 1

    def reset(self, indices: Sequence[int]) -> None:
        if not self.plan.retries:
            raise Violation(f"{self.id}: {indices} are run again, and nobody asked for it")
        for index in indices:
            self.ends.pop(index, None)

    def lost(self, first: int, error: HerderError | None) -> None:
        if error is not None and not self.client.may_lose(self, error):
            raise Violation(f"client {self.client.name} is told that {self.id} from {first} on is lost: {error}")
        self.is_lost = True

    @property
    def is_wanted(self) -> bool:
        return True

    def ended_among(self, count: int) -> set[int]:
        return {index for index in self.ends if index < count}

    def miss(self, indices: Iterable[int]) -> None:
        raise Violation(f"{self.id}: a watcher's job is its own: {list(indices)}")


class Client:
    """One client process: jobs of its own, or (a watcher) those that another one has left detached."""

    def __init__(  # noqa: PLR0917
        self, world: World, network: Network, history: History, faults: Faults, name: str, watched: list[Job]
    ) -> None:
        self.world = world
        self.network = network
        self.history = history
        self.faults = faults
        self.name = name
        self.is_dead = False
        self.is_leaving = False
        self.jobs: list[Job] = []
        self.program = new_program(world, name)
        self.connection = SimConnection(history, Incarnation(name), f"owner of {name[0]}")
        self.dialler = SimDialler(
            network,
            self.program,
            name,
            Peer("admin", name, CLUSTER, "3"),
            hello=self.connection._hello,
            observer=self.connection,
            refused=self._refused,
        )
        self.program.enter(self.connection.begin, self.program)
        self.program.call_soon(self.dialler.start)
        if watched:
            for job in watched:
                self._watch(job)
        else:
            for number in range(world.random.choice([1, 1, 2, 3])):
                self._plan(number)
            self._proceed()

    def _refused(self, error: HerderError) -> None:
        raise Violation(f"client {self.name} was refused for good: {error}")

    # --- plans -------------------------------------------------------------------------------------------------------

    def _plan(self, number: int) -> None:
        random, faults = self.world.random, self.faults
        job = JobId(f"{self.name}-job{number}")
        at_most_once = self.world.chance(0.4)
        options = TaskOptions(
            cores=random.choice([1.0, 1.0, 0.5, 2.0]),
            memory_bytes=random.choice([0, MEMORY_BYTES // 4]),
            retries=random.choice([0, 0, 2]),
            backoff_s=random.choice([0.0, 0.0, 0.3]),
            idempotent=not at_most_once,
            priority=random.choice([0, 0, 1]),
            nodes=random.choice([(), (), ("even",)]) if faults.labels else (),
            timeout_s=faults.task_s * 20 + 1 if faults.overruns else None,
            max_crashes=random.choice([3, 3, 0, 8]),
        )
        kind = random.randint(0, 2)
        workload = WorkloadSpec(
            WorkloadKey(f"w{kind}"),
            start="fresh" if kind == 2 else "auto",
            max_tasks_per_child=0 if kind == 1 else 1,
        )
        is_array = self.world.chance(0.5)
        spec = JobSpec(
            job,
            job,
            workload,
            options,
            self.connection.owner,
            detached=self.world.chance(faults.detached),
            kind="array" if is_array else "submit",
        )
        count = random.randint(0, faults.tasks)
        pieces = []
        while count:
            most = min(count, 2) if faults.near else count
            pieces.append(most if self.world.chance(0.3) else random.randint(1, most))
            count -= pieces[-1]
        plan = self.history.plans[job] = Plan(spec)
        plan.change = (False, options.priority)
        plan.is_endless = faults.endless > 0 and not spec.detached and self.world.chance(faults.endless)
        own = Job(self, plan, pieces, random.choice(FUNCTIONS))
        self.jobs.append(own)

    def _watch(self, job: Job) -> None:
        mine = Job(self, job.plan, [], job.function, is_closed=True)
        mine.track = self.connection.observe_job(job.id, mine)
        self.jobs.append(mine)
        if mine.plan.is_changed:
            self._change(mine, paused=False)

    def may_lose(self, job: Job, error: HerderError) -> bool:
        """Whether it is no wonder that the cluster knows nothing of this job (any more)."""
        return (
            self.is_leaving
            or job.plan.is_abandoned
            or (job.track is not None and job.track.is_observer and "JobNotFound" in type(error).__name__)
        )

    # --- what the user does ------------------------------------------------------------------------------------------

    def _proceed(self) -> None:
        """Submit the next piece of some job, now and then, until all is submitted; at last leave."""
        if self.is_dead or self.is_leaving:
            return
        for job in self.jobs:
            if job.track is None:
                job.track = self.connection.open_job(job.plan.spec, job)
            if job.is_lost:
                job.pieces.clear()
                job.is_closed = True
            if job.pieces:
                self._submit(job, job.pieces.pop(0))
                break
            if not job.is_closed:
                job.is_closed = True
                self.connection.close_job(job.track)
                if job.plan.is_endless:
                    self._cancel_each(job)
        if all(job.is_closed for job in self.jobs):
            self._leave_when_done()
        else:
            self.world.after(self.world.random.random() * self.faults.pause_s, self._proceed)

    def _leave_when_done(self) -> None:
        """Not before what is its own has ended; what is detached may go on without it."""
        if self.is_dead or self.is_leaving:
            return
        if all(job.is_done or (job.plan.spec.detached and self.world.chance(0.2)) for job in self.jobs):
            self.is_leaving = True
            for job in self.jobs:
                job.plan.is_abandoned |= not job.is_done
            self.connection.retire()
        else:
            self.world.after(1.0, self._leave_when_done)

    def _submit(self, job: Job, count: int) -> None:
        assert job.track is not None
        tasks = [self._task(job, len(job.plan.items), number) for number in range(count)]
        blobs = [blob for _, _, own in tasks for blob in own]
        if job.function.blob is not None:
            blobs.append((job.function.function.id, job.function.blob))
        batch = Batch(
            job.id,
            0,
            job.function,
            "",
            [item for item, _, _ in tasks],
            sum(len(item.args.inline) + 64 for item, _, _ in tasks),
            [claim for _, claims, _ in tasks for claim in claims],
            blobs,
        )
        job.plan.items += batch.items
        self.connection.submit(job.track, batch, lambda _first: None)

    def _task(self, job: Job, first: int, number: int) -> tuple[TaskItem, list[TaskKey], list[tuple[BlobId, bytes]]]:
        """A task, what it claims, and the blobs which it comes with."""
        random = self.world.random
        index = first + number
        claims: list[TaskKey] = []
        if self.world.chance(self.faults.dependencies):
            for _ in range(random.randint(1, 3)):
                claims += self._depend(job, index)
        if self.world.chance(self.faults.blobs):
            content = random.choice(ARGUMENTS)
            name = blob_id(content)
            return TaskItem(Payload(b"", name, len(content)), tuple(claims)), claims, [(name, content)]
        return TaskItem(Payload(f"{job.id}.{index}".encode()), tuple(claims)), claims, []

    def _depend(self, job: Job, index: int) -> list[TaskKey]:
        """An earlier task of this client's, as `calls.Dependencies` does it: claimed, or its value is here already."""
        random = self.world.random
        on = job if index and self.world.chance(0.7) else random.choice(self.jobs)
        count = index if on is job else len(on.plan.items)
        if not count or on.track is None or on.is_lost:
            return []
        key = (on.id, random.randrange(max(0, count - 6) if self.faults.near else 0, count))
        if key[1] in on.ends:
            return []
        self.connection.claim(*key)
        return [key]

    def _cancel_each(self, job: Job) -> None:
        """One after the other, a few at a time, some of them twice."""
        random = self.world.random
        indices = list(range(len(job.plan.items)))
        random.shuffle(indices)
        job.plan.cancels = True
        while indices:
            some = tuple(indices[: random.randint(1, 3)])
            del indices[: len(some)]
            if self.world.chance(0.3):
                self.world.after(random.random() * 0.5, self._cancel, job, some, False)
            self.world.after(random.random() * 0.5, self._cancel, job, some, True)

    def _cancel(self, job: Job, indices: tuple[int, ...], running: bool) -> None:
        if not self.is_dead and not self.is_leaving:
            self.connection.cancel(job.id, indices, running=running)

    def cancel_something(self) -> None:
        job = self.world.random.choice(self.jobs)
        if self.is_dead or self.is_leaving or job.track is None or job.track.is_observer:
            return
        count = len(job.plan.items)
        indices: tuple[int, ...] | None = None
        if count and self.world.chance(0.7):
            some = self.world.random.sample(range(count), self.world.random.randint(1, count))
            indices = tuple(sorted(some))
        job.plan.cancels = True
        self.connection.cancel(job.id, indices, running=self.world.chance(0.6))

    def change_something(self) -> None:
        """Pause a job for a while, or give it another priority."""
        random = self.world.random
        job = random.choice(self.jobs)
        if self._may_ask(job) and job.plan.opened:
            if self.world.chance(0.5):
                self._change(job, priority=random.choice([-1, 0, 1, 5]))
            else:
                self._change(job, paused=True)
                self.world.after(random.random() * 5, self._change, job, False)

    def retry_something(self) -> None:
        """Have what failed of a job run again."""
        job = self.world.random.choice(self.jobs)
        if self._may_ask(job) and job.plan.upto:
            self._wish(job, partial(self._retry, job))

    def _may_ask(self, job: Job) -> bool:
        return not (self.is_dead or self.is_leaving or job.is_lost or job.track is None or job.track.is_observer)

    def _change(self, job: Job, paused: bool | None = None, priority: int | None = None) -> None:
        if not self.is_dead and not self.is_leaving:
            job.plan.is_changed = True
            self._wish(job, partial(self._ask_change, job, paused, priority))

    def _ask_change(self, job: Job, paused: bool | None, priority: int | None) -> None:
        plan = job.plan
        before = plan.change
        after = (before[0] if paused is None else paused, before[1] if priority is None else priority)
        plan.change, plan.is_changing = after, True

        def answered(answer: Answer) -> None:
            plan.is_changing = False
            if answer.error not in {"", "JobNotFound"}:
                raise Violation(f"{job.id} cannot be changed: {answer.error}: {answer.message}")
            if answer.error:
                plan.is_changing = True  # it is over

        self._ask(job, lambda number: ChangeJob(number, job.id, paused, priority), answered)

    def _retry(self, job: Job) -> None:
        assert job.track is not None
        job.plan.retries += 1
        self.connection._later(partial(self.connection._follow, job.track))

        def answered(answer: Answer) -> None:
            assert job.track is not None
            if answer.error not in {"", "JobNotFound"} and not job.plan.cancels and not job.plan.is_abandoned:
                raise Violation(f"{job.id} cannot be run again: {answer.error}: {answer.message}")
            job.again += answer.count or 0
            job.plan.again += answer.count or 0
            self.connection._later(partial(self.connection._follow_no_more, job.track))

        self._ask(job, lambda number: RetryFailed(number, job.id), answered)

    def _wish(self, job: Job, wish: Callable[[], None]) -> None:
        """One thing at a time is asked of a job, as by a user who waits for each answer."""
        job.wishes.append(wish)
        self._ask_next(job)

    def _ask_next(self, job: Job) -> None:
        if job.wishes and not job.is_asking and not self.is_dead:
            job.is_asking = True
            job.wishes.pop(0)()

    def _ask(self, job: Job, question: Question, answered: Callable[[Answer], None]) -> None:
        future: concurrent.futures.Future[Answer] = concurrent.futures.Future()

        def done(_future: object) -> None:
            job.is_asking = False
            if future.exception() is None:
                answered(future.result())
                self._ask_next(job)

        future.add_done_callback(done)
        self.connection._later(partial(self.connection._ask, question, future))

    # --- what goes wrong ---------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """SIGKILL."""
        if self.is_dead or self.connection.is_over:
            return
        self.is_dead = True
        self.program.kill()
        self.network.program_died(self.program, tells=self.world.chance(0.7))
        for job in self.jobs:
            job.plan.is_abandoned = True

    def stop(self, seconds: float) -> None:
        """SIGSTOP."""
        self.program.halt(seconds)
        # A coordinator which does not hear of it for a lease has its jobs cancelled.
        for job in self.jobs:
            job.plan.is_abandoned = True

    def break_link(self) -> None:
        if self.faults.silent_share:  # it may take a lease to be noticed, which is longer than the grace
            for job in self.jobs:
                job.plan.is_abandoned = True
        break_link(self.world, self.network, self.name, self.faults)

    def cut_off(self, seconds: float) -> None:
        for job in self.jobs:
            job.plan.is_abandoned = True
        cut_off(self.world, self.network, self.name, seconds)

    # --- the end -----------------------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        if not self.is_dead and self.connection.is_over and not self.dialler.is_closed:
            self.program.enter(self.dialler.end)
        return self.is_dead or self.connection.is_over

    def unfinished(self) -> list[str]:
        return [
            f"{job.id}: {len(job.ends)} of {len(job.plan.items)} ended, {job.plan.upto} acknowledged, "
            f"{len(job.pieces)} pieces to come, closed {job.is_closed}, lost {job.is_lost}"
            for job in self.jobs
            if not job.is_done
        ]
