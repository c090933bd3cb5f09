"""One step in the making: what was decided so far, batched, and put in order when the step ends.

Every change of durable state goes through here, so that it is applied and recorded together. The order of the effects
is that of a replay: what was recorded singly, retries, terminal records, assignments, and at last what is forgotten.
Then messages: first those to the clients and acknowledgements, which wait for the records, then orders to agents.
"""

from __future__ import annotations

from herder_coordinator.core import apply, records, views
from herder_coordinator.core.effects import (
    DropAgent,
    DropBlobs,
    Effect,
    Observe,
    Persist,
    SendToAgent,
    SendToClient,
    TurnOut,
)
from herder_coordinator.core.room import end_size_bytes
from herder_coordinator.core.state import Feed, Job, Node, State, Task
from herder_shared import limits
from herder_shared.ids import AttemptId, BlobId, Incarnation, JobId, NodeName
from herder_shared.states import Outcome
from herder_shared.wire.messages import (
    AckAttempts,
    AttemptStart,
    CancelAttempts,
    CoordinatorToAgent,
    CoordinatorToClient,
    ForgetJobs,
    Function,
    JobBrief,
    Payload,
    Refused,
    StartAttempts,
    SubmitRefused,
    TaskEnd,
    TasksEnded,
    TasksStarted,
    Usage,
    WorkloadSpec,
)

#: Terminal records under way to one client for one job, unacknowledged: so a million of them never fill its connection.
FEED_TASKS_MAX = 20_000
FEED_BYTES_MAX = 16 * limits.MIB
#: Functions that no task uses any more and are kept for the next one.
IDLE_FUNCTIONS_MAX = 256

_Labels = tuple[tuple[str, str], ...]


class Turn:
    """Collects one step. `wake` says that something became pending or free, so that placement is worth a look."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.wake = False
        self._records: list[records.Record] = []
        self._retries: list[records.Retry] = []
        self._ends: dict[JobId, tuple[Job, int, list[TaskEnd]]] = {}
        self._assigned: dict[NodeName, tuple[Node, list[records.Assignment]]] = {}
        self._last_records: list[records.Record] = []
        self._to_clients: list[Effect] = []
        self._to_agents: list[Effect] = []
        self._started: dict[JobId, tuple[Job, list[tuple[int, NodeName]]]] = {}
        self._acks: dict[NodeName, tuple[Node, list[AttemptId]]] = {}
        self._cancels: dict[tuple[NodeName, bool], tuple[Node, list[AttemptId]]] = {}
        self._starts: dict[tuple[NodeName, bool], tuple[Node, list[tuple[Task, AttemptStart]]]] = {}
        self._counts: dict[tuple[str, _Labels], float] = {}
        self._values: dict[tuple[str, _Labels], list[float]] = {}
        self._noted: dict[tuple[str, Outcome, str], list[Usage]] = {}

    # --- changes of durable state ------------------------------------------------------------------------------------

    def record(self, record: records.Record) -> None:
        """Persist what the caller has applied (or applies next) itself."""
        self._records.append(record)

    def end(self, job: Job, end: TaskEnd) -> None:
        """The task's terminal record."""
        entry = self._ends.get(job.id)
        if entry is None:
            entry = self._ends[job.id] = (job, job.cursor, [])
        apply.end_task(self.state, job, end)
        entry[2].append(end)
        self.wake = True

    def retry(self, task: Task, account: records.Retry) -> None:
        """The task's newest attempt was not its last."""
        apply.retry(self.state, task, account)
        self._retries.append(account)
        self.wake = True

    def assign(self, task: Task, node: Node, attempt: AttemptId, *, ordinal: int, fresh: bool) -> None:
        """The task has this attempt on this node."""
        apply.assign(self.state, task, node, attempt, ordinal=ordinal, fresh=fresh)
        entry = self._assigned.get(node.name)
        if entry is None:
            entry = self._assigned[node.name] = (node, [])
        entry[1].append(records.Assignment(task.job.id, task.index, attempt, ordinal, fresh))

    def forget(self, job: Job) -> None:
        """The job is over and nobody will ask for its records."""
        for node in self.state.nodes.values():
            if node.told_jobs.pop(job.id, None) is not None and node.session:
                self.to_agent(node, ForgetJobs((job.id,)), durable=True)
        apply.forget_job(self.state, job, views.job_info(job, self.state.now_s))
        self._last_records.append(records.JobForgotten(job.id))

    # --- messages ----------------------------------------------------------------------------------------------------

    def start(self, task: Task, node: Node) -> None:
        """Order the attempt that was just assigned."""
        state_key = (node.name, task.job.spec.options.idempotent)
        entry = self._starts.get(state_key)
        if entry is None:
            entry = self._starts[state_key] = (node, [])
        entry[1].append((task, attempt_start(task)))

    def started(self, job: Job, index: int, node: NodeName) -> None:
        entry = self._started.get(job.id)
        if entry is None:
            entry = self._started[job.id] = (job, [])
        entry[1].append((index, node))

    def ack(self, node: Node, attempt: AttemptId) -> None:
        """Tell the agent, when all of this is durable, to forget the attempt, and to stop it if it runs."""
        if node.session:
            self._acks.setdefault(node.name, (node, []))[1].append(attempt)

    def cancel(self, node: Node, attempt: AttemptId, *, waiting_only: bool = False) -> None:
        """Tell the agent to stop the attempt (`waiting_only`: unless it runs); it will report the end."""
        if node.session:
            self._cancels.setdefault((node.name, waiting_only), (node, []))[1].append(attempt)

    def to_client(self, client: Incarnation, message: CoordinatorToClient | Refused, durable: bool = True) -> None:
        self._to_clients.append(SendToClient(client, message, "durable" if durable else "now"))

    def refuse(self, client: Incarnation, job: JobId, first: int, error: str, message: str) -> None:
        self.to_client(client, SubmitRefused(job, first, error, message))

    def to_agent(self, node: Node, message: CoordinatorToAgent, durable: bool = False) -> None:
        self._to_agents.append(SendToAgent(node.name, node.session, message, "durable" if durable else "now"))

    def drop_agent(self, node: NodeName, session: int, reason: str) -> None:
        self._to_agents.append(DropAgent(node, session, reason))

    def turn_out(self, serials: tuple[str, ...]) -> None:
        self._to_agents.append(TurnOut(serials))

    # --- what metrics see --------------------------------------------------------------------------------------------

    def count(self, kind: str, labels: _Labels = (), amount: float = 1.0) -> None:
        self._counts[kind, labels] = self._counts.get((kind, labels), 0.0) + amount

    def value(self, kind: str, labels: _Labels, value: float) -> None:
        self._values.setdefault((kind, labels), []).append(value)

    def note_end(self, workload: str, outcome: Outcome, usage: Usage) -> None:
        """A task ended. What each of them used is summed up once at the end of the step."""
        self._noted.setdefault((workload, outcome, usage.start_method), []).append(usage)

    def _observe_ends(self) -> None:
        for (workload, outcome, start_method), usages in self._noted.items():
            name = (("workload", workload),)
            self.count("task_ended", (*name, ("outcome", outcome.value)), float(len(usages)))
            if start_method:
                start_times = self._values.setdefault(("task_start", (("start_method", start_method),)), [])
                start_times += [usage.start_s for usage in usages]
                self._values.setdefault(("task_duration", name), []).extend(usage.wall_s for usage in usages)
                self.count("task_cpu", (*name, ("mode", "user")), sum(usage.cpu_user_s for usage in usages))
                self.count("task_cpu", (*name, ("mode", "system")), sum(usage.cpu_system_s for usage in usages))
                self.count("allocated", name, sum(usage.core_s for usage in usages))

    # --- the end of the step -----------------------------------------------------------------------------------------

    def pump(self, job: Job, incarnation: Incarnation, feed: Feed) -> None:
        """Send a client what it has not been sent of a job's terminal records, as far as its window goes."""
        client = self.state.clients.get(incarnation)
        if client is None or not client.session or feed.paused:
            return
        feed.sent = max(feed.sent, job.base)
        bytes_max = FEED_BYTES_MAX if client.attempt is None else limits.TASK_CLIENT_FEED_BYTES_MAX
        while feed.sent < job.cursor and feed.sent - feed.acked < FEED_TASKS_MAX and feed.flight_bytes < bytes_max:
            batch: list[TaskEnd] = []
            size_bytes = 0
            for end in job.ends.between(feed.sent, feed.sent + limits.BATCH_TASKS_MAX):
                batch.append(end)
                size_bytes += end_size_bytes(end)
                if size_bytes >= limits.BATCH_BYTES_MAX:
                    break
            self.to_client(incarnation, TasksEnded(job.id, feed.sent, tuple(batch)))
            feed.sent += len(batch)
            feed.flights.append((feed.sent, size_bytes))
            feed.flight_bytes += size_bytes

    def finish(self) -> list[Effect]:
        """All effects of the step, in order."""
        self._drop_idle_functions()
        self._observe_ends()
        for job, _, _ in self._ends.values():
            for incarnation, feed in job.feeds.items():
                self.pump(job, incarnation, feed)
        effects: list[Effect] = [Persist(record) for record in self._records]
        if self._retries:
            effects.append(Persist(records.TasksRetried(tuple(self._retries))))
        for job, cursor, ends in self._ends.values():
            for first in range(0, len(ends), limits.BATCH_TASKS_MAX):
                part = tuple(ends[first : first + limits.BATCH_TASKS_MAX])
                effects.append(Persist(records.TasksEnded(job.id, cursor + first, part)))
        effects += self._assignments()
        effects += [Persist(record) for record in self._last_records]
        effects += self._to_clients
        for job, started in self._started.values():
            message = TasksStarted(job.id, tuple(started))
            effects += [SendToClient(client, message, "now") for client in job.feeds]
        effects += self._orders()
        if self.state.unused:
            effects.append(DropBlobs(tuple(self._unused_blobs())))
        effects += [Observe(kind, labels, amount) for (kind, labels), amount in self._counts.items()]
        for (kind, labels), values in self._values.items():
            effects.append(Observe(kind, labels, float(len(values)), None, tuple(values)))
        return effects

    def _assignments(self) -> list[Effect]:
        """Without attempts that ended in the same step: an agent that is back may list one, which is then adopted, and
        its end as well."""
        if not self._assigned:
            return []
        ended = {(job.id, end.index) for job, _, ends in self._ends.values() for end in ends}
        retried = {retry.attempt for retry in self._retries}
        effects: list[Effect] = []
        for node, assigned in self._assigned.values():
            lasting = tuple(one for one in assigned if (one.job, one.index) not in ended and one.attempt not in retried)
            if lasting:
                effects.append(Persist(records.AttemptsAssigned(node.name, node.incarnation, lasting)))
        return effects

    def _unused_blobs(self) -> list[BlobId]:
        """Blobs whose last reference went, unless one has come since."""
        unused, self.state.unused = self.state.unused, []
        return [blob for blob in dict.fromkeys(unused) if blob not in self.state.blobs]

    def _drop_idle_functions(self) -> None:
        idle = self.state.idle_functions
        if len(idle) > IDLE_FUNCTIONS_MAX:
            dropped = tuple(idle)[: len(idle) - IDLE_FUNCTIONS_MAX // 2]
            apply.drop_functions(self.state, dropped)
            self._last_records.append(records.FunctionsDropped(dropped))

    def _orders(self) -> list[Effect]:
        orders: list[Effect] = list(self._to_agents)
        for node, attempts in self._acks.values():
            orders.append(SendToAgent(node.name, node.session, AckAttempts(tuple(attempts)), "durable"))
        for (_, waiting_only), (node, attempts) in self._cancels.items():
            cancel = CancelAttempts(tuple(attempts), limits.KILL_GRACE_S, waiting_only)
            orders.append(SendToAgent(node.name, node.session, cancel, "durable"))
        for (_, idempotent), (node, starts) in self._starts.items():
            for message in start_messages(self.state, node, starts, remember=idempotent):
                orders.append(SendToAgent(node.name, node.session, message, "now" if idempotent else "durable"))
        return orders


def attempt_start(task: Task) -> AttemptStart:
    """The order to run the task's newest attempt."""
    deps: tuple[tuple[JobId, int, Payload], ...] = ()
    if task.item.deps:
        assert task.values is not None
        deps = tuple((key[0], key[1], value) for key, value in task.values.items())
    return AttemptStart(
        task.attempt,
        task.job.id,
        task.index,
        task.ordinal,
        task.function,
        task.item.args,
        deps,
        "fresh" if task.fresh else "",
        task.python,
        task.request.memory_bytes if task.grown is not None else 0,
    )


def start_messages(
    state: State, node: Node, starts: list[tuple[Task, AttemptStart]], remember: bool
) -> list[StartAttempts]:
    """Cut orders into messages, each with what this session of the agent has not been told. What goes out only when it
    is durable is not remembered as told: an order that need not wait could overtake it."""
    told_workloads = node.told_workloads if remember else set(node.told_workloads)
    told_jobs = node.told_jobs if remember else {job: set(known) for job, known in node.told_jobs.items()}
    messages: list[StartAttempts] = []
    attempts: list[AttemptStart] = []
    workloads: list[WorkloadSpec] = []
    jobs: list[JobBrief] = []
    functions: list[Function] = []
    size_bytes = 0
    for task, start in starts:
        spec = task.job.spec
        if spec.workload.key not in told_workloads:
            told_workloads.add(spec.workload.key)
            workloads.append(apply.told_spec(state, spec.workload))
        known = told_jobs.get(spec.job)
        if known is None:
            known = told_jobs[spec.job] = set()
            jobs.append(JobBrief(spec.job, spec.name, spec.workload.key, spec.options, task.job.owner))
        if start.function is not None and start.function not in known:
            known.add(start.function)
            function = state.functions[start.function].function
            functions.append(function)
            size_bytes += len(function.content)
        attempts.append(start)
        size_bytes += 100 + len(start.args.inline) + sum(len(value.inline) for _, _, value in start.deps)
        if size_bytes >= limits.BATCH_BYTES_MAX or len(attempts) >= limits.BATCH_TASKS_MAX:
            messages.append(
                StartAttempts(node.session, tuple(attempts), tuple(workloads), tuple(jobs), tuple(functions))
            )
            attempts, workloads, jobs, functions, size_bytes = [], [], [], [], 0
    if attempts:
        messages.append(StartAttempts(node.session, tuple(attempts), tuple(workloads), tuple(jobs), tuple(functions)))
    return messages
