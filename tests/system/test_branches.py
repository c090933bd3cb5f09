"""Templates forked from templates, in a whole cluster."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest

import herder
from herder_agent.core.branches import BRIEF_CORES_EACH
from herder_shared.wire.messages import TemplateInfo, WorkloadInfo

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [pytest.mark.slow, pytest.mark.module_state]

WAIT_S = 60
EAGER = """
import sys
if "herder_agent" in sys.orig_argv:
    from herder_agent.core import branches
    branches.IN_WANT = 0
"""


@pytest.fixture(scope="module")
def client() -> Iterator[herder.Client]:
    with herder.LocalCluster(cores=32) as cluster, cluster.client() as client:
        yield client


def found(client: herder.Client, name: str) -> WorkloadInfo:
    (workload,) = [each for each in client.workloads() if each.name == name]
    return workload


def lineage(number: int) -> tuple[int, int]:
    return number, os.getppid()


def parent_of(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b") ")[2].split()[1])


def templates_of(client: herder.Client, name: str) -> list[TemplateInfo]:
    return [template for report in found(client, name).reports.values() for template in report.templates]


def burst(client: herder.Client, name: str, count: int) -> set[int]:
    """Run tasks that do nothing, check their results, and return the templates that forked them."""
    workload = herder.Workload(name, env={"WHOSE": name})
    results = list(client.options(workload=workload).map(lineage, range(count)))
    assert [number for number, _ in results] == list(range(count))
    return {parent for _, parent in results}


def test_a_template_that_cannot_feed_the_cores_gets_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Few machines that run tests are so fast that 32 slots wait for one template: here any fork counts as waited for.
    (tmp_path / "sitecustomize.py").write_text(EAGER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with herder.LocalCluster(cores=32) as cluster, cluster.client() as client:
        parents = burst(client, "burst", 1000)
        infos = templates_of(client, "burst")
        assert 2 <= len(infos) <= 32 // BRIEF_CORES_EACH
        assert len(parents) >= 2
        assert parents <= {info.pid for info in infos}
        assert all(info.replica for info in infos)
        assert {parent_of(info.pid) for info in infos[1:]} == {infos[0].pid}
        assert all(info.start_s < infos[0].start_s for info in infos[1:])
        pids = [info.pid for info in infos]
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_a_workload_that_preloads_more_is_forked_from_one_that_has_a_part_of_it(client: herder.Client) -> None:
    names = [["numpy"], ["numpy", "numpy.testing"]]
    pids = []
    for preload in names:
        name = f"tree-{len(preload)}"
        workload = herder.Workload(name, preload=preload, env={"WHOSE": "tree"})
        pids.append(client.options(workload=workload).submit(lineage, 1).result(WAIT_S)[1])
        (info,) = templates_of(client, name)
        assert info.pid == pids[-1]
    assert parent_of(pids[1]) == pids[0]
    steps = next(iter(found(client, "tree-2").reports.values())).steps
    assert [step.step for step in steps] == ["start", "import numpy", "import numpy.testing", "canary", "seal"]


def test_a_stem_that_dies_takes_its_tree_along_and_both_work_again(client: herder.Client) -> None:
    views = [
        client.options(workload=herder.Workload(f"dying-{len(preload)}", preload=preload, env={"WHOSE": "dying"}))
        for preload in (["decimal"], ["decimal", "fractions"])
    ]
    stem, tree = (view.submit(lineage, 1).result(WAIT_S)[1] for view in views)
    assert parent_of(tree) == stem
    running = views[1].submit(time.sleep, 3)
    os.kill(stem, signal.SIGKILL)
    assert running.result(WAIT_S) is None
    again = [view.submit(lineage, 1).result(WAIT_S)[1] for view in views]
    assert not {stem, tree} & set(again)
    assert not os.path.exists(f"/proc/{tree}")
