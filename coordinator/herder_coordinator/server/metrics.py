"""Prometheus: what the coordinator counts. Gauges are read from the state at each scrape; counters and histograms are
fed as things happen. docs/METRICS.md lists every metric and says which program exposes it, so that nothing is counted
twice.

Labels are bounded: never a task or job; unnamed workloads are `auto`, at most `WORKLOAD_LABELS_MAX` names, then
`other`."""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from herder_coordinator.core import views
from herder_coordinator.core.effects import Observe
from herder_coordinator.core.state import State
from herder_shared.limits import SD_LOST_AGENT_S, WORKLOAD_LABELS_MAX
from herder_shared.states import AgentState, CoreState
from herder_shared.wire.messages import NodeInfo, WorkloadReport

#: Seconds, for what users do: from the fork of a process to a night.
TASK_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0, 3600.0, 28800.0)
#: Seconds, for starting a child: a fork takes one millisecond, a template with large data minutes.
START_BUCKETS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 120.0)
#: Seconds, for what the coordinator does itself.
OWN_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5, 10.0)
#: Values of labels other than workloads: more is a mistake, and becomes `other`.
LABELS_MAX = 50
#: Owners that have a label of their own.
OWNER_LABELS_MAX = 100
#: Observations that are counted together: a step makes several of them, and most are of the same few kinds.
UNSETTLED_MAX = 1_000

Labels = tuple[tuple[str, str], ...]


class Histogram:
    """A histogram as cheap as bisect and three additions."""

    __slots__ = ("_buckets", "_counts", "_sum")

    def __init__(self, buckets: Sequence[float]) -> None:
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._buckets, value)] += 1
        self._sum += value

    def observe_all(self, values: Sequence[float]) -> None:
        """Count many."""
        for value in values:
            self.observe(value)

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self._counts)

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str] = ()) -> None:
        """Write it into an exposition."""
        total = 0
        lines: list[tuple[str, float]] = []
        for bound, count in zip((*map(str, self._buckets), "+Inf"), self._counts, strict=True):
            total += count
            lines.append((bound, float(total)))
        family.add_metric(labels, buckets=lines, sum_value=self._sum)


@dataclass(slots=True)
class _Spent:
    """What a workload's ended attempts took, in seconds."""

    wall_s: float = 0.0
    core_s: float = 0.0
    cpu_user_s: float = 0.0
    cpu_system_s: float = 0.0


@dataclass(slots=True)
class Sources:
    """Where the gauges are read at scrape time."""

    state: Callable[[], State | None]
    now_s: Callable[[], float]
    version: str
    blob_bytes: Callable[[], tuple[int, int]] = lambda: (0, 0)
    stored_blob_bytes: Callable[[], int] = lambda: 0
    journal_bytes: Callable[[], int] = lambda: 0
    shelf_bytes: Callable[[], int] = lambda: 0
    refused: Callable[[], dict[str, int]] = field(default=dict)


class Metrics(Collector):
    """All of the coordinator's metrics. Fed and scraped in the event loop's thread."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._unsettled: list[Observe] = []
        self._workload_labels: set[str] = set()
        self._other_labels: dict[str, set[str]] = {}
        self._finished: dict[tuple[str, str], float] = {}
        self._spent: dict[str, _Spent] = {}
        self._lost: dict[str, float] = {}
        self._retried: dict[str, float] = {}
        self._fork_unsafe: dict[str, int] = {}
        self._demoted: dict[str, float] = {}
        self._unsafe_seen: dict[tuple[str, str], frozenset[str]] = {}
        self._queue_wait = Histogram(TASK_BUCKETS)
        self._duration = Histogram(TASK_BUCKETS)
        self._starts: dict[str, Histogram] = {}
        self._decision = Histogram(OWN_BUCKETS)
        self._commit = Histogram(OWN_BUCKETS)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Everything, in the form that an `Accept` header asks for, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    # --- fed as things happen ----------------------------------------------------------------------------------------

    def observe(self, observation: Observe) -> None:
        """Count what the core noticed. Kinds that no metric is made of are for the log alone."""
        self._unsettled.append(observation)
        if len(self._unsettled) >= UNSETTLED_MAX:
            self._settle()

    def _settle(self) -> None:
        """Count what was observed since, all of one kind and the same labels at once."""
        observations, self._unsettled = self._unsettled, []
        amounts: dict[tuple[str, Labels], float] = {}
        values: dict[tuple[str, Labels], list[float]] = {}
        for one in observations:
            key = (one.kind, one.labels)
            amounts[key] = amounts.get(key, 0.0) + one.value
            if one.values:
                values.setdefault(key, []).extend(one.values)
        for (kind, labels), amount in amounts.items():
            self._count(Observe(kind, labels, amount, None, tuple(values.get((kind, labels), ()))))

    def _count(self, observation: Observe) -> None:
        labels = dict(observation.labels)
        match observation.kind:
            case "task_ended":
                key = (self._workload(labels["workload"]), labels["outcome"])
                self._finished[key] = self._finished.get(key, 0.0) + observation.value
            case "attempt_lost":
                reason = self._label("reason", labels["reason"])
                self._lost[reason] = self._lost.get(reason, 0.0) + observation.value
            case "task_retried":
                cause = self._label("cause", labels["cause"])
                self._retried[cause] = self._retried.get(cause, 0.0) + observation.value
            case "workload_demoted":
                reason = self._label("reason", labels["reason"])
                self._demoted[reason] = self._demoted.get(reason, 0.0) + observation.value
            case "queue_wait":
                self._queue_wait.observe_all(observation.values)
            case "task_start":
                self._start(labels["start_method"]).observe_all(observation.values)
            case "task_duration":
                self._duration.observe_all(observation.values)
                self._spend(labels["workload"]).wall_s += sum(observation.values)
            case "task_cpu" if labels["mode"] == "user":
                self._spend(labels["workload"]).cpu_user_s += observation.value
            case "task_cpu":
                self._spend(labels["workload"]).cpu_system_s += observation.value
            case "allocated":
                self._spend(labels["workload"]).core_s += observation.value
            case _:
                pass

    def decided(self, seconds: float) -> None:
        """The core stepped through a turn's events."""
        self._decision.observe(seconds)

    def committed(self, seconds: float) -> None:
        """The journal made a batch durable."""
        self._commit.observe(seconds)

    def _start(self, method: str) -> Histogram:
        method = self._label("start_method", method)
        found = self._starts.get(method)
        if found is None:
            found = self._starts[method] = Histogram(START_BUCKETS)
        return found

    def _spend(self, workload: str) -> _Spent:
        workload = self._workload(workload)
        found = self._spent.get(workload)
        if found is None:
            found = self._spent[workload] = _Spent()
        return found

    def workload_reported(self, node: str, report: WorkloadReport) -> None:
        """An agent's audit: each finding that forbids forking counts once per node and workload."""
        unsafe = frozenset(f.rule for step in report.steps for f in step.findings if f.verdict == "unsafe")
        new = unsafe - self._unsafe_seen.get((node, report.key), frozenset())
        for rule in sorted(new):
            reason = self._label("reason", rule)
            self._fork_unsafe[reason] = self._fork_unsafe.get(reason, 0) + 1
        if new and len(self._unsafe_seen) < 100_000:
            self._unsafe_seen[node, report.key] = unsafe

    def _workload(self, name: str) -> str:
        if name in self._workload_labels:
            return name
        if len(self._workload_labels) >= WORKLOAD_LABELS_MAX:
            return "other"
        self._workload_labels.add(name)
        return name

    def _label(self, label: str, value: str) -> str:
        known = self._other_labels.setdefault(label, set())
        if value in known or len(known) < LABELS_MAX:
            known.add(value)
            return value
        return "other"

    # --- scraped -----------------------------------------------------------------------------------------------------

    def describe(self) -> Iterator[Metric]:
        """Nothing: names are not checked for collisions at registration."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Every metric family, with its samples as of now."""
        self._settle()
        build = GaugeMetricFamily("herder_build_info", "Always 1.", labels=["component", "version", "python"])
        build.add_metric(["coordinator", self._sources.version, platform.python_version()], 1)
        yield build
        yield from self._collect_tasks()
        yield from self._collect_own()
        state = self._sources.state()
        if state is not None:
            yield from self._collect_state(state)

    def _collect_tasks(self) -> Iterator[Metric]:
        finished = CounterMetricFamily(
            "herder_tasks_finished", "Tasks that ended, by outcome.", labels=["workload", "outcome"]
        )
        for (workload, outcome), count in self._finished.items():
            finished.add_metric([workload, outcome], count)
        yield finished
        wall = CounterMetricFamily("herder_task_seconds", "Time that tasks' own code ran.", labels=["workload"])
        core = CounterMetricFamily(
            "herder_allocated_core_seconds", "Cores held by tasks times how long.", labels=["workload"]
        )
        cpu = CounterMetricFamily("herder_task_cpu_seconds", "CPU time that tasks used.", labels=["workload", "mode"])
        for workload, spent in self._spent.items():
            wall.add_metric([workload], spent.wall_s)
            core.add_metric([workload], spent.core_s)
            cpu.add_metric([workload, "user"], spent.cpu_user_s)
            cpu.add_metric([workload, "system"], spent.cpu_system_s)
        yield from (wall, core, cpu)
        yield _histogram("herder_queue_wait_seconds", "From ready to run to assigned to a node.", self._queue_wait)
        yield _histogram("herder_task_duration_seconds", "Time that a task's own code ran.", self._duration)
        starts = HistogramMetricFamily(
            "herder_task_start_seconds",
            "From a task getting its cores to the start of its own code.",
            labels=["start_method"],
        )
        for method, histogram in self._starts.items():
            histogram.add_to(starts, [method])
        yield starts
        lost = CounterMetricFamily(
            "herder_attempts_lost", "Attempts that ended without news, by reason.", labels=["reason"]
        )
        for reason, count in self._lost.items():
            lost.add_metric([reason], count)
        yield lost
        retried = CounterMetricFamily(
            "herder_tasks_retried", "Attempts after which a task was tried again.", labels=["cause"]
        )
        for cause, count in self._retried.items():
            retried.add_metric([cause], count)
        yield retried
        unsafe = CounterMetricFamily(
            "herder_fork_unsafe", "Findings of audits which forbade forking, by rule.", labels=["reason"]
        )
        for reason, count in self._fork_unsafe.items():
            unsafe.add_metric([reason], count)
        yield unsafe
        demoted = CounterMetricFamily(
            "herder_workloads_demoted",
            "Workloads that are not forked any more, by how their last forked child died.",
            labels=["reason"],
        )
        for reason, number in self._demoted.items():
            demoted.add_metric([reason], number)
        yield demoted

    def _collect_own(self) -> Iterator[Metric]:
        yield _histogram(
            "herder_scheduler_decision_seconds", "Time that the core took for the events of one turn.", self._decision
        )
        yield _histogram(
            "herder_journal_commit_seconds", "From appending records to their being durable.", self._commit
        )
        yield GaugeMetricFamily(
            "herder_journal_size_bytes", "Size of the journal on disk.", self._sources.journal_bytes()
        )
        yield GaugeMetricFamily(
            "herder_coordinator_shelf_bytes",
            "Queued tasks and unacknowledged records beyond their budget of memory, in files.",
            self._sources.shelf_bytes(),
        )
        moved = CounterMetricFamily(
            "herder_blob_bytes", "Payload bytes of blobs moved by the coordinator.", labels=["direction"]
        )
        in_bytes, out_bytes = self._sources.blob_bytes()
        moved.add_metric(["in"], in_bytes)
        moved.add_metric(["out"], out_bytes)
        yield moved
        yield GaugeMetricFamily(
            "herder_blobs_stored_bytes", "Blobs on the coordinator's disk.", self._sources.stored_blob_bytes()
        )
        refused = CounterMetricFamily(
            "herder_connections_refused", "Connections turned away, by reason.", labels=["reason"]
        )
        for reason, count in self._sources.refused().items():
            refused.add_metric([self._label("refused", reason)], count)
        yield refused

    def _collect_state(self, state: State) -> Iterator[Metric]:
        tasks = GaugeMetricFamily("herder_tasks", "Tasks of the jobs that are known, by state.", labels=["state"])
        for task_state, count in views.task_counts(state).items():
            tasks.add_metric([task_state.value], count)
        yield tasks
        agents = GaugeMetricFamily("herder_agents", "Agents, by state.", labels=["state"])
        for agent_state, count in views.agent_counts(state).items():
            agents.add_metric([agent_state.value], count)
        yield agents
        yield GaugeMetricFamily("herder_jobs", "Jobs that are known and not forgotten.", len(state.jobs))
        nodes = views.nodes(state, self._sources.now_s())
        yield from _collect_nodes(nodes)
        yield from _collect_policy(state, nodes)
        yield from self._collect_templates(state)

    def _collect_templates(self, state: State) -> Iterator[Metric]:
        counts: dict[tuple[str, str], int] = {}
        for workload in views.workloads(state):
            name = self._workload(workload.name)
            for report in workload.reports.values():
                for template in report.templates:
                    counts[name, template.state] = counts.get((name, template.state), 0) + 1
        templates = GaugeMetricFamily(
            "herder_templates", "Templates on all nodes, as agents reported them last.", labels=["workload", "state"]
        )
        for (name, template_state), count in counts.items():
            templates.add_metric([name, template_state], count)
        yield templates


def _collect_policy(state: State, nodes: list[NodeInfo]) -> Iterator[Metric]:
    """Who has how much, and what is held back."""
    held = GaugeMetricFamily("herder_owner_cores", "Cores that an owner's tasks hold.", labels=["owner"])
    mean = GaugeMetricFamily(
        "herder_owner_cores_mean", "Cores that an owner's tasks held lately, on average.", labels=["owner"]
    )
    due = GaugeMetricFamily(
        "herder_owner_share",
        "The part of the cores that is due to an owner by the weights, of those who have tasks that have not ended.",
        labels=["owner"],
    )
    # Those who use most have labels of their own.
    sums: dict[str, list[float]] = {}
    for place, owner in enumerate(views.owners(state)):
        name = owner.owner if place < OWNER_LABELS_MAX else "other"
        sums.setdefault(name, []).extend((owner.cores, owner.mean_cores, owner.share))
    for name, values in sums.items():
        for family, first in ((held, 0), (mean, 1), (due, 2)):
            family.add_metric([name], sum(values[first::3]))
    yield from (held, mean, due)
    yield GaugeMetricFamily(
        "herder_jobs_paused", "Jobs that are paused.", sum(1 for job in state.jobs.values() if job.paused)
    )
    yield GaugeMetricFamily(
        "herder_nodes_kept", "Nodes that are kept for a task which would wait for ever.", len(state.reservations)
    )
    yield GaugeMetricFamily(
        "herder_tasks_suspect", "Tasks that may have cost their node, and run one to a node.", views.suspects(state)
    )
    drained = GaugeMetricFamily(
        "herder_nodes_drained",
        "Connected nodes that take nothing new: somebody asked for it, the node has a fault, it will end soon, or "
        "nothing started there.",
        labels=["reason"],
    )
    counts = dict.fromkeys(("asked", "fault", "ending", "nothing_starts"), 0)
    for info in nodes:
        if info.state is AgentState.DRAINING:
            counts[views.drain_reason(state, state.nodes[info.facts.node])] += 1
    for reason, count in counts.items():
        drained.add_metric([reason], count)
    yield drained


def _collect_nodes(nodes: list[NodeInfo]) -> Iterator[Metric]:
    cores = GaugeMetricFamily("herder_node_cores", "Cores that a node offers.", labels=["node"])
    allocated = GaugeMetricFamily("herder_node_cores_allocated", "Cores of a node held by attempts.", labels=["node"])
    seconds = CounterMetricFamily(
        "herder_core_seconds",
        "Every second of every core of a node, by what it went to, as its agent reported with its last heartbeat.",
        labels=["node", "state"],
    )
    known_states = [core_state.value for core_state in CoreState]
    for node in nodes:
        if node.state is AgentState.LOST and node.silent_s > SD_LOST_AGENT_S:
            continue
        name = node.facts.node
        is_lost = node.state is AgentState.LOST
        cores.add_metric([name], 0 if is_lost else node.facts.cores)
        allocated.add_metric([name], 0 if is_lost else node.assigned_cores)
        if node.report is not None:
            for core_state in known_states:
                seconds.add_metric([name, core_state], node.report.core_seconds.get(core_state, 0.0))
    yield from (cores, allocated, seconds)


def _histogram(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text)
    histogram.add_to(family)
    return family
