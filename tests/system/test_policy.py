"""Who goes first, what is held back, and why: a real cluster, asked from outside."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest
from click.testing import CliRunner

import herder
from herder.cli.main import cli
from herder_shared.wire.messages import NodeInfo
from support.leaks import wait_until

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [pytest.mark.slow, pytest.mark.module_state]

WAIT_S = 30


@pytest.fixture(scope="module")
def cluster() -> Iterator[herder.LocalCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HERDER_AGENT_GPUS", "2")
        patch.setenv("HERDER_AGENT_RESOURCES", "licence=1.5")
        with herder.LocalCluster(cores=2) as cluster:
            yield cluster


@pytest.fixture
def client(cluster: herder.LocalCluster) -> Iterator[herder.Client]:
    with cluster.client() as client:
        yield client


def run(cluster: herder.LocalCluster, *arguments: str) -> str:
    result = CliRunner(env=cluster.environ).invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def wait_for(path: str) -> None:
    while not Path(path).exists():
        time.sleep(0.01)


def test_pause_explain_resume_and_priority(cluster: herder.LocalCluster, client: herder.Client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    blockers = [client.options(name="blocker").submit(wait_for, str(gate)) for _ in range(2)]
    wait_until(lambda: all(future.running() for future in blockers), WAIT_S)
    explained = blockers[0].explain()
    assert (explained.kind, explained.attempt) == ("running", 1)
    assert "it is there because" in str(explained)

    low = client.array(abs, [-1, -2], name="low")
    waits = low.explain(1)
    assert waits.kind == "no_room"
    assert "cores free, it needs 1" in str(waits)
    run(cluster, "pause", low.id)
    assert "paused" in run(cluster, "job", f"{low.id}.0", "--explain")
    high = client.array(abs, [-3], name="high")
    run(cluster, "priority", high.id, "7")
    assert high.status().priority == 7
    assert json.loads(run(cluster, "job", f"{high.id}.0", "--explain", "--json"))["priority"] == 7
    gate.touch()
    assert list(high.results(WAIT_S)) == [3]
    assert low.progress().ended == 0
    assert "paused" in run(cluster, "job", low.id, "--explain")
    low.resume()
    assert list(low.results(WAIT_S)) == [1, 2]
    assert blockers[0].explain().kind == "succeeded"


def fail_at_first(folder: str) -> int:
    path = Path(folder) / f"attempt{herder.task().attempt}"
    path.touch()
    if herder.task().attempt < 3:
        raise OSError("not yet")
    return int(herder.task().attempt)


def test_retries_by_type_with_backoff_and_every_attempt_explained(client: herder.Client, tmp_path: Path) -> None:
    begun_s = time.monotonic()
    future = client.options(retries=5, retry_on=(OSError,), backoff=0.2).submit(fail_at_first, str(tmp_path))
    assert future.result(WAIT_S) == 3
    assert time.monotonic() - begun_s > 0.2 + 0.4
    attempts = future.explain().attempts
    assert [(attempt.attempt, attempt.outcome) for attempt in attempts] == [
        (1, "failed"),
        (2, "failed"),
        (3, "succeeded"),
    ]
    assert "not yet" in str(future.explain())
    with pytest.raises(OSError):
        client.options(retries=5, retry_on=(KeyError,)).submit(fail_at_first, str(tmp_path)).result(WAIT_S)


def touch_memory(size_mib: int) -> int:
    held = bytearray(size_mib << 20)
    for place in range(0, len(held), 4096):
        held[place] = 1
    time.sleep(0.3)
    return int(herder.task().attempt)


def test_out_of_memory_is_tried_again_with_more(client: herder.Client) -> None:
    options = client.options(memory="64MiB", memory_max="512MiB", memory_growth=4)
    future = options.submit(touch_memory, 120)
    assert future.result(WAIT_S) == 2
    first, last = future.explain().attempts
    assert (first.outcome, first.memory_bytes, last.outcome) == ("out_of_memory", 64 << 20, "succeeded")
    with pytest.raises(herder.TaskOutOfMemory):
        client.options(memory="64MiB", memory_max="80MiB").submit(touch_memory, 200).result(WAIT_S)


def what_it_holds(folder: str, name: str, others: int) -> tuple[int, ...]:
    (Path(folder) / name).touch()
    deadline_s = time.monotonic() + 10
    while len(list(Path(folder).iterdir())) < others and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return tuple(herder.task().gpus)


def test_gpus_have_indices_and_fractions_and_named_resources_are_counted(client: herder.Client, tmp_path: Path) -> None:
    (tmp_path / "gpus").mkdir()
    one_gpu = client.options(gpus=1, cores=0.5)
    futures = [one_gpu.submit(what_it_holds, str(tmp_path / "gpus"), str(each), 2) for each in range(2)]
    assert sorted(future.result(WAIT_S) for future in futures) == [(0,), (1,)]

    (tmp_path / "parts").mkdir()
    quarter = client.options(cores=0.25, resources={"licence": 0.25})
    futures = [quarter.submit(what_it_holds, str(tmp_path / "parts"), str(each), 6) for each in range(8)]
    begun = lambda: len(list((tmp_path / "parts").iterdir())) >= 6  # noqa: E731
    wait_until(begun, WAIT_S)
    for future in futures:
        future.result(WAIT_S)


def wait_for_one_with_a_gpu(path: str) -> int:
    future = herder.current_client().options(gpus=1).submit(abs, -1)
    Path(path).with_suffix(".tmp").write_text(future.task_id)
    Path(path).with_suffix(".tmp").rename(path)
    return int(future.result())


def test_a_parent_that_holds_what_its_child_needs_is_named(
    cluster: herder.LocalCluster, client: herder.Client, tmp_path: Path
) -> None:
    parent = client.options(gpus=2).submit(wait_for_one_with_a_gpu, str(tmp_path / "child"))
    try:
        assert wait_until((tmp_path / "child").exists, WAIT_S)
        child = (tmp_path / "child").read_text()
        expected = f"{parent.task_id} on local-1 holds 2 GPUs while it waits for tasks of its own"
        assert wait_until(lambda: expected in run(cluster, "job", child, "--explain"), WAIT_S), run(
            cluster, "job", child, "--explain"
        )
    finally:
        parent.cancel()


@pytest.fixture(scope="module")
def pair() -> Iterator[herder.LocalCluster]:
    with herder.LocalCluster(cores=2, agents=2) as pair:
        yield pair


def wait_if_first(place: int, gate: str) -> str:
    if place == 0:
        wait_for(gate)
    return str(herder.task().node)


def test_look_ahead_behind_what_takes_long_is_recalled_when_the_other_node_is_idle(
    pair: herder.LocalCluster, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    with pair.client() as client:
        # So that it is known how short they are.
        client.array(wait_if_first, range(1, 60), [str(gate)] * 59).wait(WAIT_S)
        job = client.array(wait_if_first, range(60), [str(gate)] * 60)
        asked: list[str] = []

        def is_stuck() -> bool:
            """Something lies behind the one that waits."""
            asked[:] = [job.explain(task.index).kind for task in job.tasks() if task.state == "assigned"]
            return "look_ahead" in asked and job.progress().ended > 0

        assert wait_until(is_stuck, WAIT_S)
        assert wait_until(lambda: job.progress().ended == 59, WAIT_S)
        blocked = job.explain(0)
        assert blocked.kind == "running"
        gate.touch()
        assert set(job.results(WAIT_S)) == {"local-1", "local-2"}
        # What lay behind the one that waits was run by the other node at last.
        assert {task.node for task in job.tasks()[-5:]} == {"local-1", "local-2"} - {blocked.node}


def test_a_node_that_says_when_it_ends_gets_what_ends_in_time_and_is_drained_before() -> None:
    with herder.LocalCluster(cores=2, agents=2) as cluster, cluster.client() as client:
        process = cluster.processes["local-2"]
        process.popen.kill()
        # Half a minute before its end it is drained: here, after two seconds and a half.
        process.arguments += ("--walltime", "0:32.5")
        cluster.restart("local-2")

        def node() -> NodeInfo:
            return next(node for node in client.nodes() if node.facts.node == "local-2")

        assert wait_until(lambda: node().state == "ready" and node().ends_in_s is not None, WAIT_S)
        too_long = client.options(nodes="local-2", timeout=20).submit(time.sleep, 0)
        assert "local-2: ends too soon" in str(too_long.explain())
        assert client.options(nodes="local-2", timeout=1).submit(abs, -2).result(WAIT_S) == 2
        assert node().state == "ready"
        assert wait_until(lambda: node().state == "draining", WAIT_S)
        assert "local-2: is draining: it will end soon" in str(too_long.explain())
        too_long.cancel()
