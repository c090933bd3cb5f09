"""What the coordinator counts, and that Prometheus's own linter has nothing to say about it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from coordinator.server.conftest import Run
from herder_coordinator.core.effects import Observe
from herder_coordinator.core.state import UNITS, Share, new_state
from herder_coordinator.server.metrics import OWNER_LABELS_MAX, Histogram, Metrics, Sources
from herder_shared.ids import ClusterId, WorkloadKey
from herder_shared.limits import WORKLOAD_LABELS_MAX
from herder_shared.wire import messages as m
from support.coordinators import (
    agent_of,
    client_of,
    collect_ends,
    coordinating,
    job_spec,
    run_all,
    submission,
)
from support.links import Authority
from support.requirements import require_program


def new_metrics() -> Metrics:
    return Metrics(Sources(state=lambda: None, now_s=lambda: 0.0, version="1"))


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def read(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return samples(metrics.exposition("")[0].decode())


def test_a_histogram_is_cumulative() -> None:
    metrics = new_metrics()
    metrics.observe(Observe("queue_wait", values=(0.0005, 0.3, 1e9)))
    found = read(metrics)
    assert found["herder_queue_wait_seconds_bucket", (("le", "0.001"),)] == 1
    assert found["herder_queue_wait_seconds_bucket", (("le", "0.5"),)] == 2
    assert found["herder_queue_wait_seconds_count", ()] == 3


def test_a_value_on_a_bound_falls_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe_all((1.0, 2.0, 2.5))
    assert histogram.count == 3
    assert histogram._counts == [1, 1, 1]


def test_workload_labels_are_bounded() -> None:
    metrics = new_metrics()
    for n in range(WORKLOAD_LABELS_MAX + 7):
        metrics.observe(Observe("task_ended", (("workload", f"w{n}"), ("outcome", "succeeded"))))
    finished = {labels: value for (name, labels), value in read(metrics).items() if "tasks_finished" in name}
    assert len(finished) == WORKLOAD_LABELS_MAX + 1
    assert finished[("outcome", "succeeded"), ("workload", "other")] == 7


def test_an_audits_finding_counts_once_per_node_and_workload() -> None:
    metrics = new_metrics()
    step = m.AuditStep("setup", findings=(m.AuditFinding("threads", "3"), m.AuditFinding("n", "x", verdict="note")))
    for node in ("n1", "n1", "n2"):
        metrics.workload_reported(node, m.WorkloadReport(WorkloadKey("k"), "w", steps=(step,)))
    assert read(metrics)["herder_fork_unsafe_total", (("reason", "threads"),)] == 2


def test_demotions_count_by_cause() -> None:
    metrics = new_metrics()
    for cause in ("deadlock", "signal", "deadlock"):
        metrics.observe(Observe("workload_demoted", (("workload", "w"), ("reason", cause))))
    assert read(metrics)["herder_workloads_demoted_total", (("reason", "deadlock"),)] == 2


def test_owners_who_use_most_have_labels_of_their_own() -> None:
    state = new_state(ClusterId("c" * 32), 1)
    for n in range(OWNER_LABELS_MAX + 5):
        state.owners[f"owner{n}"] = Share(held=(n + 1) * UNITS)
    metrics = Metrics(Sources(state=lambda: state, now_s=lambda: 0.0, version="1"))
    held = {labels[0][1]: value for (name, labels), value in read(metrics).items() if name == "herder_owner_cores"}
    assert len(held) == OWNER_LABELS_MAX + 1
    assert held["other"] == 1 + 2 + 3 + 4 + 5
    assert held[f"owner{OWNER_LABELS_MAX + 4}"] == OWNER_LABELS_MAX + 5


def test_everything_of_the_public_list_is_exposed_and_linted(authority: Authority, tmp_path: Path, run: Run) -> None:
    async def go() -> None:
        async with (
            coordinating(authority, tmp_path) as running,
            agent_of(authority, running.address) as agent,
            client_of(authority, running.address) as client,
            httpx.AsyncClient(base_url=running.url) as web,
        ):
            client.send(m.OpenJob(job_spec()), submission(4))
            await run_all(agent, 4)
            await collect_ends(client, 4)
            template = m.TemplateInfo("ready", 7)
            report = m.WorkloadReport(WorkloadKey("feedfeedfeedfeed"), "sums", templates=(template,))
            agent.send(m.WorkloadsReported((report,)), m.Heartbeat(1, m.NodeReport({"task": 2.5, "idle": 4.0})))
            await agent.next(m.HeartbeatAck)
            await client.ask(1, "status")
            plain = await web.get("/metrics")
            found = samples(plain.text)
            assert found["herder_tasks_finished_total", (("outcome", "succeeded"), ("workload", "sums"))] == 4
            assert found["herder_task_seconds_total", (("workload", "sums"),)] == 2.0
            assert found["herder_allocated_core_seconds_total", (("workload", "sums"),)] == 2.4
            assert found["herder_task_duration_seconds_count", ()] == 4
            assert found["herder_task_start_seconds_count", (("start_method", "fork"),)] == 4
            assert found["herder_core_seconds_total", (("node", "n1"), ("state", "task"))] == 2.5
            assert found["herder_node_cores", (("node", "n1"),)] == 2
            assert found["herder_node_cores_allocated", (("node", "n1"),)] == 0
            assert found["herder_templates", (("state", "ready"), ("workload", "sums"))] == 1
            assert found["herder_agents", (("state", "ready"),)] == 1
            assert found["herder_nodes_drained", (("reason", "fault"),)] == 0
            assert (found["herder_jobs_paused", ()], found["herder_nodes_kept", ()]) == (0, 0)
            assert found["herder_tasks_suspect", ()] == 0
            assert found["herder_tasks", (("state", "ended"),)] == 4
            assert found["herder_journal_commit_seconds_count", ()] > 0
            assert found["herder_scheduler_decision_seconds_count", ()] > 0
            assert ("herder_blob_bytes_total", (("direction", "in"),)) in found
            for name in (
                "herder_attempts_lost",
                "herder_fork_unsafe",
                "herder_build_info",
                "herder_queue_wait_seconds",
            ):
                assert name in plain.text
            accept = {"accept": "application/openmetrics-text; version=1.0.0"}
            openmetrics = await web.get("/metrics", headers=accept)
            assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
            assert openmetrics.text.endswith("# EOF\n")
            (tmp_path / "metrics.txt").write_text(plain.text)

    run(go())
    require_program("promtool", "prometheus")
    exposition = (tmp_path / "metrics.txt").read_text()
    lint = subprocess.run(
        ["promtool", "check", "metrics"], input=exposition, capture_output=True, text=True, timeout=60, check=False
    )
    assert (lint.returncode, lint.stdout, lint.stderr) == (0, "", "")
