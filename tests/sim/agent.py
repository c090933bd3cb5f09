"""The shipped agent without processes: its core and its connection, with children and templates which are drawn.

What stands for `runtime/loop.py` is `Life`: it takes the core's effects to a `Node`, on which children start, run,
wait, die, hang, leave processes behind and eat memory as the seed has it. Children live by the world's clock, also
while the agent is stopped; they die with it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from herder_agent.core import effects as fx
from herder_agent.core import events
from herder_agent.core.state import State, check_invariants, new_state
from herder_agent.core.step import next_deadline_s, step
from herder_agent.runtime.blobs import BlobStore, FunctionCache, Partial
from herder_agent.runtime.connection import Connection
from herder_agent.runtime.relays import Relays
from herder_shared.errors import DataLost, HerderError, Unauthorized
from herder_shared.ids import AttemptId, BlobId, Incarnation, NodeName, WorkloadKey, blob_id
from herder_shared.limits import PROTOCOL_VERSION
from herder_shared.states import Cause, Outcome
from herder_shared.wire.messages import (
    AttemptEnd,
    AttemptStart,
    Failure,
    Heartbeat,
    Hello,
    NodeFacts,
    NodeReport,
    Payload,
    WorkloadReport,
)
from herder_shared.wire.session import Peer
from sim.coordinator import CLUSTER
from sim.history import History, Violation, content_of, result_of
from sim.network import Network, SimDialler
from sim.world import Program, World, new_program

if TYPE_CHECKING:
    from sim.run import Faults

MEMORY_BYTES = 1 << 30


class _Partial(Partial):
    def __init__(self, total: int) -> None:
        self.total = total
        self.size = 0
        self.content = b""

    def write(self, data: bytes) -> None:
        self.content += bytes(data)
        self.size += len(data)

    def close(self) -> BlobId:
        return blob_id(self.content)

    def abandon(self) -> None:
        pass


class SimStore(BlobStore):
    """The shipped store's account of a simulated disk."""

    def __init__(self) -> None:
        self.contents: dict[BlobId, bytes] = {}
        self._pins = {}
        self._in_memory = {}

    def has(self, blob: BlobId) -> bool:
        return blob in self.contents

    def size_of(self, blob: BlobId) -> int:
        return len(self.contents[blob])

    def open(self, blob: BlobId) -> int:
        if blob not in self.contents:
            raise DataLost(f"blob {blob} is not on this node")
        fd = os.memfd_create("blob")
        os.write(fd, self.contents[blob])
        return fd

    def put(self, content: bytes) -> BlobId:
        name = blob_id(content)
        self.contents[name] = content
        return name

    def receive(self, total: int) -> Partial:
        return _Partial(total)

    def complete(self, partial: Partial, blob: BlobId) -> bool:
        assert isinstance(partial, _Partial)
        if partial.close() != blob:
            return False
        self.contents[blob] = partial.content
        return True

    def _make_room(self) -> None:
        """A full disk keeps only what is pinned."""
        for blob in [each for each in self.contents if each not in self._pins]:
            del self.contents[blob]


@dataclass(eq=False)
class Child:
    """A process that runs tasks."""

    number: int
    template: int
    method: str
    is_alive: bool = True
    #: Cores which the task that runs in it, and what that left behind, use.
    used: float = 0.0


@dataclass(eq=False)
class Task:
    order: fx.SendTask
    child: Child
    is_over: bool = False


@dataclass(eq=False)
class Node:
    """A machine. What is on it outlives the agent's processes, but for children."""

    name: str
    cores: int
    labels: tuple[str, ...]
    epoch_seen: int = 0
    births: int = 0
    used: float = 0.0
    children: dict[int, Child] = field(default_factory=dict)


class Life:
    """One agent process: the shipped core and connection, and the children it has."""

    def __init__(self, agent: Agent, program: Program, incarnation: Incarnation) -> None:
        self.agent = agent
        self.world = agent.world
        self.program = program
        self.incarnation = incarnation
        self.serial = agent.serial
        self.node = agent.node
        self.state: State = new_state(NodeName(self.node.name), self.node.cores, MEMORY_BYTES, program.time())
        self.store = SimStore()
        self.connection = Connection(
            store=self.store,
            functions=FunctionCache(self.store),
            dispatch=self.dispatch,
            exposition=lambda _openmetrics: (b"", "text/plain"),
            stop=lambda _reason: None,
            linked=self._linked,
            relays=(relays := Relays(program, self.state, self.dispatch)),
            clock_s=program.time,
        )
        self.dialler = SimDialler(
            agent.network,
            program,
            self.node.name,
            Peer("agent", self.node.name, CLUSTER, self.serial),
            hello=self._hello,
            observer=self.connection,
            heartbeat=self._heartbeat,
            refused=self._refused,
        )
        self._pending: deque[events.Event] = deque()
        self._is_stepping = False
        self._timer_s = float("inf")
        self._started: list[AttemptId] = []
        self._ends: list[AttemptEnd] = []
        self._workloads: dict[WorkloadKey, WorkloadReport] = {}
        self._is_report_due = False
        self._leftovers = 0
        self._is_sweep_due = False
        self._templates: dict[int, bool] = {}
        self._tasks: dict[int, Task] = {}
        self._steps = 0
        self._do: dict[type, Callable[[Any], None]] = {
            fx.StartTemplate: self._start_template,
            fx.BranchTemplate: self._start_template,
            fx.StopTemplate: self._stop_template,
            fx.ForkChildren: self._fork,
            fx.SpawnFresh: self._spawn,
            fx.SendTask: self._send_task,
            fx.StopChild: lambda effect: self._exit_soon(effect.child, 0),
            fx.SignalChild: self._signal,
            fx.DropChild: lambda effect: self._die(effect.child),
            fx.SweepLeftovers: lambda _effect: self._sweep_soon(),
            fx.FetchBlobs: lambda effect: self.connection.fetch(effect.attempt, effect.blobs),
            fx.ReleaseBlobs: lambda effect: self.connection.release(effect.attempt),
            fx.UploadBlob: lambda effect: self.connection.upload(effect.blob),
            fx.SendSync: self._sync,
            fx.ReportStarted: self._report_started,
            fx.ReportEnd: self._report_end,
            fx.ReportWorkload: self._report_workload,
            fx.ReportSlot: relays.report,
            fx.ResumeTask: self._resume,
        }

    # --- the loop, as the shipped one does it ------------------------------------------------------------------------

    def dispatch(self, event: events.Event) -> None:
        self._pending.append(event)
        if self._is_stepping:
            return
        self._is_stepping = True
        try:
            while self._pending:
                event = self._pending.popleft()
                if type(event) is events.AttemptsAcked:
                    self._acked(event)
                for effect in step(self.state, event, self.program.time()):
                    do = self._do.get(type(effect))
                    if do is not None:
                        do(effect)
        finally:
            self._is_stepping = False
        self._steps += 1
        if self.agent.faults.is_checked and not self._steps % 4:
            check_invariants(self.state)
        self._set_timer()

    def _set_timer(self) -> None:
        due_s = next_deadline_s(self.state)
        if due_s is not None and due_s < self._timer_s:
            self._timer_s = due_s
            self.program.call_at(due_s, self._tick, due_s)

    def _tick(self, due_s: float) -> None:
        if due_s == self._timer_s:
            self._timer_s = float("inf")
            self.dispatch(events.Ticked())

    def _acked(self, event: events.AttemptsAcked) -> None:
        for attempt in dict.fromkeys(event.attempts):
            end = self.state.ends.get(attempt)
            if end is not None and end.result is not None and end.result.blob is not None:
                self.store.unpin(end.result.blob)

    def _sync(self, effect: fx.SendSync) -> None:
        self._ends.clear()
        self._started.clear()
        self.connection.sync(effect.running, effect.ended)

    def _report_started(self, effect: fx.ReportStarted) -> None:
        self._started.append(effect.attempt)
        self._report_soon()

    def _report_end(self, effect: fx.ReportEnd) -> None:
        self._ends.append(effect.end)
        if effect.end.outcome is not Outcome.LOST:
            self.agent.history.ended.add(effect.end.attempt)
        self._report_soon()

    def _report_workload(self, effect: fx.ReportWorkload) -> None:
        self._workloads[effect.report.key] = effect.report
        self._report_soon()

    def _report_soon(self) -> None:
        if not self._is_report_due:
            self._is_report_due = True
            self.program.call_later(self.world.random.random() * 0.01, self._report)

    def _report(self) -> None:
        self._is_report_due = False
        ended = {end.attempt for end in self._ends}
        started = [attempt for attempt in self._started if attempt not in ended]
        ends, workloads = self._ends, self._workloads
        self._started, self._ends, self._workloads = [], [], {}
        self.connection.report(started, ends, list(workloads.values()))

    def _hello(self) -> Hello:
        node = self.node
        facts = NodeFacts(NodeName(node.name), node.cores, MEMORY_BYTES, labels=node.labels)
        return Hello(
            protocol=PROTOCOL_VERSION,
            cluster=CLUSTER,
            incarnation=self.incarnation,
            epoch_seen=node.epoch_seen,
            node=facts,
        )

    def _heartbeat(self, n: int) -> Heartbeat:
        self.connection.beat(n)
        return Heartbeat(n, NodeReport())

    def _linked(self, epoch: int) -> None:
        if epoch < self.node.epoch_seen:
            raise Violation(f"{self.node.name} was welcomed by life {epoch}, and had seen life {self.node.epoch_seen}")
        self.node.epoch_seen = epoch

    def _refused(self, error: HerderError) -> None:
        if isinstance(error, Unauthorized) and self.serial != self.agent.serial:  # revoked: it ends
            self.world.at(0.0, self.agent.end_revoked, self)
            return
        raise Violation(f"the agent on {self.node.name} was refused for good: {error}")

    # --- templates ---------------------------------------------------------------------------------------------------

    def _tell(self, event: events.Event) -> None:
        self.program.call_soon(self.dispatch, event)

    def _later(self, seconds: float, what: Callable[..., None], *args: Any) -> None:
        """Something on the node: it happens while the agent lives, stopped or not."""
        self.world.after(self.world.random.random() * seconds, self._if_alive, what, args)

    def _if_alive(self, what: Callable[..., None], args: tuple[Any, ...]) -> None:
        if not self.program.is_dead:
            what(*args)

    def _start_template(self, effect: fx.StartTemplate | fx.BranchTemplate) -> None:
        self._templates[effect.template] = False
        self._later(0.2, self._template_is_there, effect.template)

    def _template_is_there(self, number: int) -> None:
        if number not in self._templates:
            return
        if self.world.chance(self.agent.faults.template_failures):
            self.agent.history.disturbed.add(self.node.name)
            self._tell(events.TemplateFailed(number, Cause.START_FAILED, "no template"))
            self._kill_template(number)
            return
        self._templates[number] = True
        self._tell(
            events.TemplateReady(
                number, start="fork", fork_point="", reason="", python="3.11", pid=number, start_s=0.1, rss_bytes=1
            )
        )

    def _stop_template(self, effect: fx.StopTemplate) -> None:
        self._later(0.05, self._kill_template, effect.template)

    def _kill_template(self, number: int) -> None:
        """It dies, and its children with it."""
        if self._templates.pop(number, None) is None:
            return
        for child in [each for each in self.node.children.values() if each.template == number]:
            self._die(child.number)
        self._tell(events.TemplateExited(number, "it died"))

    def kill_some_template(self) -> None:
        """A fault."""
        if self._templates:
            self.agent.history.disturbed.add(self.node.name)
            self._kill_template(self.world.random.choice(list(self._templates)))

    # --- children ----------------------------------------------------------------------------------------------------

    def _fork(self, effect: fx.ForkChildren) -> None:
        for number in effect.children:
            self._later(0.02, self._child_is_there, number, effect.template, "fork")

    def _spawn(self, effect: fx.SpawnFresh) -> None:
        self._later(0.2, self._child_is_there, effect.child, effect.template, "fresh")

    def _child_is_there(self, number: int, template: int, method: str) -> None:
        if template not in self._templates:
            return
        if self.world.chance(self.agent.faults.start_failures):
            self.agent.history.disturbed.add(self.node.name)
            self._tell(events.ChildForkFailed(number, "no process"))
            return
        self.node.children[number] = Child(number, template, method)
        self._tell(events.ChildForked(number, number + 1000))
        if method == "fresh":
            self._tell(events.ChildIdle(number, "3.11"))

    def _send_task(self, effect: fx.SendTask) -> None:
        child = self.node.children.get(effect.child)
        if child is not None and child.is_alive:
            task = self._tasks[child.number] = Task(effect, child)
            self._later(0.02, self._task_starts, task)

    def _task_starts(self, task: Task) -> None:
        child, order, faults = task.child, task.order, self.agent.faults
        if not child.is_alive:
            return
        self._check_data(order.attempt)
        self.agent.history.start(order.attempt, self.incarnation)
        self._use(child, order.options.cores)
        if not order.is_quiet:
            self._tell(events.ChildStarted(child.number))
        if child.method == "fork" and self.world.chance(faults.deadlocks):
            self._later(0.1, self._tell_hung, task)
            return
        if self.world.chance(faults.memory_hogs) and order.options.memory_bytes:
            self._later(faults.task_s, self._tell_memory, task)
            return
        if self.world.chance(faults.waits):
            self._later(faults.task_s, self._wait_begins, task)
        else:
            self._run_on(task)

    def _wait_begins(self, task: Task) -> None:
        """It has submitted tasks of its own: its cores are not used until they have ended."""
        if task.child.is_alive:
            self._use(task.child, 0.0)
            self._tell(events.WaitBegan(task.order.attempt.attempt))
            self._later(3.0, self._wait_ends, task)

    def _wait_ends(self, task: Task) -> None:
        if task.child.is_alive:
            self._tell(events.WaitEnded(task.order.attempt.attempt, 1))

    def _resume(self, effect: fx.ResumeTask) -> None:
        for task in list(self._tasks.values()):
            if task.order.attempt.attempt == effect.attempt:
                self._use(task.child, task.order.options.cores)
                self._run_on(task)

    def _run_on(self, task: Task) -> None:
        order, faults = task.order, self.agent.faults
        if self.agent.history.plans[order.attempt.job].is_endless:
            return
        seconds = self.world.random.expovariate(1 / faults.task_s)
        if order.options.timeout_s is not None and self.world.chance(faults.overruns):
            seconds += 1e6
        self.world.after(seconds, self._if_alive, self._task_ends, (task,))

    def _check_data(self, start: AttemptStart) -> None:
        """The child can read all that the task needs."""
        for payload in (start.args, *(value for _, _, value in start.deps)):
            if payload.blob is not None and payload.blob not in self.store.contents:
                raise Violation(f"{start.job}.{start.index} runs on {self.node.name} without blob {payload.blob}")

    def _use(self, child: Child, cores: float) -> None:
        self.node.used += cores - child.used
        child.used = cores
        if self.node.used > self.node.cores + 1e-6:
            raise Violation(f"{self.node.used:g} of {self.node.cores} cores of {self.node.name} are in use")

    def _tell_hung(self, task: Task) -> None:
        if task.child.is_alive and not task.is_over:
            self._tell(events.ChildHung(task.child.number, "deadlock"))

    def _tell_memory(self, task: Task) -> None:
        if task.child.is_alive and not task.is_over:
            self._tell(events.MemorySeen(task.child.number, task.order.options.memory_bytes + 1))

    def _task_ends(self, task: Task) -> None:
        child, order, faults = task.child, task.order, self.agent.faults
        if not child.is_alive or task.is_over:
            return
        task.is_over = True
        self.agent.history.ended.add(order.attempt.attempt)
        draw = self.world.random.random() - faults.signals
        if draw < 0:
            self._exit(child.number, 11)
            return
        answer = events.Answer(wall_s=faults.task_s)
        key = (order.attempt.job, order.attempt.index)
        if draw < faults.exceptions:
            answer = events.Answer(failure=Failure(Cause.EXCEPTION, "boom"), wall_s=faults.task_s)
        else:
            self.agent.history.finished.add(key)
            answer = events.Answer(result=self._result_of(key), wall_s=faults.task_s)
        if order.reuses:
            self._use(child, 0.0)
            self._tell(events.ChildAnswered(child.number, answer))
            return
        self._tell(events.ChildAnswered(child.number, answer))
        self._exit_soon(child.number, 0)

    def _result_of(self, key: tuple[Any, int]) -> Payload:
        payload = result_of(key)
        if payload.blob is not None:
            self.store.put(content_of(key))
            self.store.pin(payload.blob)
        return payload

    def _signal(self, effect: fx.SignalChild) -> None:
        """SIGTERM may be ignored."""
        if effect.signal == 9 or self.world.chance(0.7):
            self._exit_soon(effect.child, effect.signal)

    def _exit_soon(self, number: int, status: int) -> None:
        self._later(0.05, self._exit, number, status)

    def _exit(self, number: int, status: int) -> None:
        """It ends, and may leave a process behind that uses its cores on."""
        child = self.node.children.get(number)
        if child is None or not child.is_alive:
            return
        child.is_alive = False
        task = self._tasks.pop(number, None)
        if task is not None:
            self.agent.history.ended.add(task.order.attempt.attempt)
        del self.node.children[number]
        self._tell(events.ChildExited(number, events.Exit(status)))
        if child.used and self.world.chance(self.agent.faults.leftovers):
            self._leftovers += 1
            self._later(0.5, self._leftover_gone, child)
        else:
            self.node.used -= child.used

    def _leftover_gone(self, child: Child) -> None:
        self._leftovers -= 1
        self.node.used -= child.used

    def _die(self, number: int) -> None:
        """With its template."""
        child = self.node.children.pop(number, None)
        if child is not None:
            child.is_alive = False
            self.node.used -= child.used
            self._tasks.pop(number, None)

    def _sweep_soon(self) -> None:
        if not self._is_sweep_due:
            self._is_sweep_due = True
            self.program.call_soon(self._sweep)

    def _sweep(self) -> None:
        if self._leftovers:
            self.program.call_later(0.05, self._sweep)
            return
        self._is_sweep_due = False
        self.dispatch(events.LeftoversGone())


class Agent:
    """A node's agent, life after life."""

    def __init__(  # noqa: PLR0917
        self, world: World, network: Network, history: History, faults: Faults, name: str, cores: int
    ) -> None:
        self.world = world
        self.network = network
        self.history = history
        self.faults = faults
        self.node = Node(name, cores, ("even",) if cores % 2 == 0 else ())
        self.life: Life | None = None
        #: Of its certificate's number: those before it were revoked.
        self.key_count = 1
        self.start()

    @property
    def serial(self) -> str:
        """Of the certificate that its next life has."""
        return f"a{self.key_count:x}{self.node.name.removeprefix('node')}"

    def start(self) -> None:
        """A new process."""
        if self.life is not None:
            return
        self.node.births += 1
        program = new_program(self.world, self.node.name)
        incarnation = Incarnation(f"{self.node.name}-{self.node.births}")
        self.life = Life(self, program, incarnation)
        program.call_soon(self.life.dialler.start)

    # --- what goes wrong ---------------------------------------------------------------------------------------------

    def kill(self, down_s: float, *, tells: bool = True) -> None:
        """SIGKILL or power off: what ran dies; the kernel closes the connection, or nobody does."""
        life = self.life
        if life is None:
            return
        self.history.disturbed.add(self.node.name)
        self.life = None
        life.program.kill()
        life.connection.close()
        self.node.children.clear()
        self.node.used = 0.0
        self.network.program_died(life.program, tells=tells and self.world.chance(0.6))
        self.world.after(down_s, self.start)

    def replace_key(self) -> None:
        """Somebody puts another certificate where the revoked one was. A process that runs does not see it."""
        self.key_count += 1
        self.history.disturbed.add(self.node.name)

    def end_revoked(self, life: Life) -> None:
        """The process was refused for good, and ends; it is started again."""
        if self.life is life:
            self.kill(1.0)

    def lose(self) -> None:
        """Its machine is gone for good, and nobody says so."""
        self.kill(1e9, tells=False)

    def close(self) -> None:
        """The history is over: let go of what is real, which are the files of uploads."""
        if self.life is not None:
            self.life.connection.close()

    def stop(self, seconds: float) -> None:
        """SIGSTOP."""
        if self.life is not None:
            self.history.disturbed.add(self.node.name)
            self.life.program.halt(seconds)

    def kill_template(self) -> None:
        if self.life is not None:
            self.life.kill_some_template()

    def break_link(self) -> None:
        self.history.disturbed.add(self.node.name)
        break_link(self.world, self.network, self.node.name, self.faults)

    def cut_off(self, seconds: float) -> None:
        self.history.disturbed.add(self.node.name)
        cut_off(self.world, self.network, self.node.name, seconds)


def break_link(world: World, network: Network, host: str, faults: Faults) -> None:
    """A connection breaks, or falls silent."""
    for cable in network.of(host):
        if world.chance(faults.silent_share):
            cable.is_silent = True
        else:
            cable.break_off()


def cut_off(world: World, network: Network, host: str, seconds: float) -> None:
    """A partition, one way or both."""
    to, back = world.random.choice([(True, True), (True, False), (False, True)])
    network.cut_off(host, to=to, back=back)
    world.after(seconds, network.heal, host)
