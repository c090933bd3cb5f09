"""The exposition: what the state says, bounded, and served where asked."""

from __future__ import annotations

import http.client

from herder_agent.core.effects import Observe
from herder_agent.core.state import new_state
from herder_agent.metrics import Counts, Exposition, MetricsServer, NodeCollector
from herder_shared.ids import NodeName


def exposition(counts: Counts) -> Exposition:
    state = new_state(NodeName("n1"), 4, 1 << 30, 0.0)
    state.account.advance(2.5)
    collector = NodeCollector(state, advance=lambda: None, template_pids=list, blob_bytes=lambda: 7)
    return Exposition(counts, collector, age_s_max=0.0)


def test_exposition_tells_core_seconds_cores_and_starts() -> None:
    counts = Counts()
    counts.observe(Observe("task_start", "fork", 0.003))
    counts.observe(Observe("template_failed", "setup_failed"))
    counts.observe(Observe("crash", "fork"))
    text, content_type = exposition(counts)(False)
    lines = text.decode().splitlines()
    assert 'herder_core_seconds_total{node="n1",state="idle"} 10.0' in lines
    assert 'herder_node_cores{node="n1"} 4.0' in lines
    assert 'herder_task_start_seconds_bucket{le="0.004",start_method="fork"} 1.0' in lines
    assert any(line.startswith('herder_cpu_seconds_total{core="0",mode="idle"}') for line in lines)
    assert content_type.startswith("text/plain")


def test_openmetrics_is_given_where_it_is_asked_for() -> None:
    text, content_type = exposition(Counts())(True)
    assert text.endswith(b"# EOF\n")
    assert content_type.startswith("application/openmetrics-text")


def test_reasons_are_bounded_in_length_and_number() -> None:
    counts = Counts()
    for number in range(200):
        counts.observe(Observe("fork_unsafe", f"rule-{number}: a sentence " + "x" * 500))
    text = exposition(counts)(False)[0].decode()
    reasons = {line for line in text.splitlines() if line.startswith("herder_fork_unsafe_total")}
    assert len(reasons) == 51
    assert max(map(len, reasons)) < 120


def test_own_port_serves_metrics_and_nothing_else() -> None:
    server = MetricsServer("127.0.0.1", 0, lambda openmetrics: (b"text %d\n" % openmetrics, "text/plain"))
    try:
        for path, status in (("/metrics", 200), ("/", 404)):
            connection = http.client.HTTPConnection(*server.address, timeout=5)
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
            assert response.status == status
            if status == 200:
                assert body == b"text 0\n"
            connection.close()
    finally:
        server.close()
