"""The agent's metrics (API.md, section 3): read from the state when somebody asks; counted nowhere else.

The exposition travels over the session (`PullMetrics`), or is served over HTTP where `metrics_listen` is set. It
decides nothing.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS_TYPE
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector

from herder_agent.core.effects import Observe
from herder_agent.core.state import State, TemplateState
from herder_agent.runtime.host import cpu_seconds, memory_total_bytes, memory_used_bytes
from herder_agent.runtime.reap import anon_bytes, shared_bytes
from herder_shared.limits import WORKLOAD_LABELS_MAX

_TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_START_BUCKETS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 64)
#: Rules are few and short; the template runs the user's code, so that what it says is not believed to be.
_REASON_CHARS_MAX = 60
_REASONS_MAX = 50


class Counts:
    """What is counted as it happens."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._starts = Histogram(
            "herder_task_start_seconds",
            "From an attempt's slot to the start of its code.",
            ["start_method"],
            buckets=_START_BUCKETS,
            registry=self.registry,
        )
        self._unsafe = Counter(
            "herder_fork_unsafe",
            "Rules by which an audit or a canary forbade forking.",
            ["reason"],
            registry=self.registry,
        )
        self._failed = Counter(
            "herder_template_failures", "Starts of templates that failed.", ["cause"], registry=self.registry
        )
        self._crashes = Counter(
            "herder_child_crashes", "Children that ended without an answer.", ["start_method"], registry=self.registry
        )
        self._hung = Counter(
            "herder_children_hung",
            "Children that were killed because they could not go on.",
            ["start_method"],
            registry=self.registry,
        )
        self._replaced = Counter(
            "herder_templates_replaced",
            "Templates that were replaced as they had changed, or their children hung.",
            ["reason"],
            registry=self.registry,
        )
        self._by_method = {method: self._starts.labels(method) for method in ("fork", "fresh", "command")}
        self._reasons: set[str] = set()

    def observe(self, effect: Observe) -> None:
        """Count one."""
        match effect.kind:
            case "task_start":
                self._by_method[effect.label].observe(effect.value)
            case "fork_unsafe":
                self._unsafe.labels(self._bounded(effect.label)).inc()
            case "template_failed":
                self._failed.labels(effect.label).inc()
            case "crash":
                self._crashes.labels(effect.label).inc()
            case "hung":
                self._hung.labels(effect.label).inc()
            case "template_replaced":
                self._replaced.labels(effect.label).inc()
            case "demoted" | "oracle_off":
                pass
            case _:
                raise AssertionError(effect.kind)

    def _bounded(self, reason: str) -> str:
        label = reason.partition(":")[0][:_REASON_CHARS_MAX]
        if label not in self._reasons and len(self._reasons) >= _REASONS_MAX:
            return "other"
        self._reasons.add(label)
        return label


class NodeCollector(Collector):
    """Reads the state. `template_pids` lists the processes whose memory is the templates'."""

    def __init__(
        self,
        state: State,
        *,
        advance: Callable[[], None],
        template_pids: Callable[[], list[int]],
        blob_bytes: Callable[[], int],
    ) -> None:
        self._state = state
        self._advance = advance
        self._template_pids = template_pids
        self._blob_bytes = blob_bytes

    def collect(self) -> Iterable[Metric]:
        """All families, now."""
        self._advance()
        state, node = self._state, str(self._state.node)
        seconds = CounterMetricFamily(
            "herder_core_seconds", "Every second of every core, by what it went to.", labels=["node", "state"]
        )
        for core, value in state.account.seconds.items():
            seconds.add_metric([node, core.value], value)
        yield seconds
        yield from self._cpus()
        yield _gauge("herder_node_cores", "Cores that the agent offers.", node, state.slots.total.cores)
        yield _gauge("herder_node_cores_allocated", "Cores held by attempts.", node, state.slots.used)
        yield _gauge("herder_node_attempts_running", "Attempts that hold a slot.", node, state.running_count)
        yield _gauge("herder_node_attempts_queued", "Attempts that wait for a slot.", node, len(state.queue))
        yield _gauge("herder_node_ends_unacknowledged", "Ends not yet durable.", node, len(state.ends))
        yield _gauge("herder_node_children", "Processes for tasks, idle ones included.", node, len(state.children))
        yield _gauge("herder_node_memory_bytes", "Memory of the node.", node, memory_total_bytes())
        yield _gauge("herder_node_memory_used_bytes", "Memory that could not be had.", node, memory_used_bytes())
        yield _gauge("herder_node_blobs_bytes", "Blobs kept on the node's disk.", node, self._blob_bytes())
        yield from self._templates()
        build = GaugeMetricFamily("herder_build_info", "Always 1.", labels=["component", "version", "python"])
        build.add_metric(["agent", own_version(), platform.python_version()], 1)
        yield build

    def _cpus(self) -> Iterable[Metric]:
        family = CounterMetricFamily("herder_cpu_seconds", "The machine's CPU time by mode.", labels=["core", "mode"])
        for cpu, modes in cpu_seconds().items():
            for mode, value in modes.items():
                family.add_metric([str(cpu), mode], value)
        yield family

    def _templates(self) -> Iterable[Metric]:
        counts: dict[tuple[str, str], int] = {}
        names: set[str] = set()
        for workload in self._state.workloads.values():
            name = workload.spec.name
            if name not in names and len(names) >= WORKLOAD_LABELS_MAX:
                name = "other"
            names.add(name)
            for template in workload.templates:
                key = (name, template.state.value)
                counts[key] = counts.get(key, 0) + 1
            if not workload.templates and workload.refusal is not None:
                counts[name, TemplateState.FAILED.value] = counts.get((name, TemplateState.FAILED.value), 0) + 1
        templates = GaugeMetricFamily("herder_templates", "Templates.", labels=["workload", "state"])
        for (name, state), count in sorted(counts.items()):
            templates.add_metric([name, state], count)
        yield templates
        memory = GaugeMetricFamily(
            "herder_template_memory_bytes", "Memory of templates: of files and shared, or their own.", labels=["kind"]
        )
        pids = self._template_pids()
        memory.add_metric(["shared"], sum(map(shared_bytes, pids)))
        memory.add_metric(["private"], sum(map(anon_bytes, pids)))
        yield memory


def _gauge(name: str, text: str, node: str, value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=["node"])
    family.add_metric([node], value)
    return family


def own_version() -> str:
    """The version of the distribution that is installed."""
    try:
        return version("herder")
    except PackageNotFoundError:
        return "0"


class Exposition:
    """The text of all metrics, made anew when it is older than `age_s_max`."""

    def __init__(self, counts: Counts, collector: NodeCollector, age_s_max: float = 0.5) -> None:
        self._registry = counts.registry
        self._registry.register(collector)
        self._age_s_max = age_s_max
        self._made: dict[bool, tuple[float, bytes]] = {}

    def __call__(self, openmetrics: bool) -> tuple[bytes, str]:
        """The text and its content type."""
        now_s = time.monotonic()
        made = self._made.get(openmetrics)
        if made is None or now_s - made[0] > self._age_s_max:
            generate = generate_openmetrics if openmetrics else generate_latest
            made = self._made[openmetrics] = (now_s, generate(self._registry))
        return made[1], OPENMETRICS_TYPE if openmetrics else _TEXT_TYPE


class MetricsServer:
    """The agent's own port, where one is configured: `/metrics` and nothing else. `ask(openmetrics)` is called in the
    serving threads and must be safe there."""

    def __init__(self, host: str, port: int, ask: Callable[[bool], tuple[bytes, str]]) -> None:
        class Requests(BaseHTTPRequestHandler):
            timeout = 5.0

            def do_GET(self) -> None:
                if self.path.partition("?")[0] != "/metrics":
                    self.send_error(404)
                    return
                text, content_type = ask("application/openmetrics-text" in self.headers.get("Accept", ""))
                self.send_response(200)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's own name
                """Say nothing of each request."""

        self._server = ThreadingHTTPServer((host, port), Requests)
        self._server.daemon_threads = True
        self.address: tuple[str, int] = (host, self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="herder-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the port back."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
