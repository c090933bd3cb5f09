"""What benchmarks make of their measurements; the floor really forks."""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from herder.cli.bench.against_pool import PoolHangs, pool_of
from herder.cli.bench.command import BENCHMARKS, benchmark, figure_row
from herder.cli.bench.data import by_bare_name
from herder.cli.bench.figure import (
    Conditions,
    Figure,
    LeftOut,
    data_bytes,
    need_modules,
    percentile,
    tasks_for,
    times_in_turn,
)
from herder.cli.bench.fork_sealed import sealed_loop
from herder.cli.bench.idle import cpu_ticks
from herder.cli.bench.journal_cost import file_system_of
from herder.cli.bench.process_per_task import floor_of
from herder.cli.bench.shared_memory import descendants, tree_bytes
from herder.cli.main import cli
from herder_shared.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "low", "verdict"),
    [(0.6, False, "aim"), (0.4, False, "must"), (0.1, False, "below"), (0.2, True, "aim"), (0.9, True, "below")],
)
def test_verdict_is_the_best_that_is_reached(value: float, low: bool, verdict: str) -> None:
    must, aim = (0.5, 0.3) if low else (0.35, 0.5)
    assert Figure("x", value, "", must, aim, best_is_low=low).verdict == verdict


def test_figure_without_a_must_has_no_verdict() -> None:
    assert figure_row(Figure("x", 12345.6, "tasks/s")) == ("x", "12,346", "tasks/s", "-", "-", "", "")


def test_percentile() -> None:
    assert percentile(range(100), 99) == 99
    assert percentile([5.0], 99) == 5.0


def test_every_benchmark_can_be_found() -> None:
    assert all(callable(benchmark(name)) for name in BENCHMARKS)


def test_number_of_tasks_grows_until_a_run_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herder.cli.bench.figure.timed", lambda _call: 0.001)
    asked: list[int] = []
    assert tasks_for(asked.append, 1e-9) == 100
    assert asked[0] == 100


@pytest.mark.slow
def test_floor_forks_on_each_core_and_ends_with_its_block() -> None:
    with floor_of(("json",), 2) as floor:
        assert floor.rate(0.05) > 10


@pytest.mark.slow
def test_floor_with_a_module_that_cannot_be_imported_is_an_error() -> None:
    with pytest.raises(ConfigError, match="fork loop"), floor_of(("no_such_module_at_all",), 1):
        pass


@pytest.mark.slow
def test_sealed_template_forks_in_the_same_loop() -> None:
    with sealed_loop(("json",)) as loop:
        assert loop.rate(0.05) > 10


@pytest.mark.slow
def test_pool_answers_and_leaves_nothing() -> None:
    with pool_of("forkserver", ("json",), 1) as pool:
        assert pool.run(2) > 0


@pytest.mark.slow
def test_pool_that_hangs_is_given_up() -> None:
    with pool_of("fork", (), 1) as pool:
        with pytest.raises(PoolHangs):
            pool.run(100_000, limit_s=0.05)
        assert pool.hangs


@pytest.mark.slow
def test_pool_that_is_busy_outlives_no_benchmark_that_is_killed() -> None:
    code = """
import os, signal
from herder.cli.bench import against_pool
with against_pool.pool_of("forkserver", (), 1) as pool:
    try:
        pool.run(1_000_000, limit_s=0.05)
    except against_pool.PoolHangs:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    with (
        tempfile.TemporaryDirectory() as folder,  # which it has no time to remove; by a name that fits into a socket's
        subprocess.Popen(
            [sys.executable, "-c", code], stderr=subprocess.PIPE, env={**os.environ, "TMPDIR": folder}
        ) as killed,
    ):
        assert killed.wait(30) == -signal.SIGKILL
        assert killed.stderr is not None
        # Its processes all have this pipe, and end it. The last of them complains of semaphores, and removes them.
        while select.select([killed.stderr], [], [], 30.0)[0]:
            if not os.read(killed.stderr.fileno(), 4096):
                return
    pytest.fail("it lives on")


def test_file_system_of_a_folder_is_that_of_the_nearest_mount() -> None:
    assert file_system_of(Path("/proc/self/task")) == "proc"
    assert file_system_of(Path("/dev/shm")) == "tmpfs"


def test_benchmark_that_lacks_something_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(_: Conditions) -> list[Figure]:
        need_modules("json", "no_such_module_at_all")
        return []

    monkeypatch.setattr("herder.cli.bench.command.benchmark", lambda name: measure)
    result = CliRunner().invoke(cli, ["bench", "idle", "--json"])
    assert json.loads(result.stdout)["figures"] == []
    assert "not installed: no_such_module_at_all" in result.stderr


def test_data_is_as_large_as_asked_for_and_else_as_fits() -> None:
    assert data_bytes(8, Conditions(1, 1, data_gib=0.5), 0.1) == 2**29
    assert 0 < data_bytes(1e9, Conditions(1, 1), 0.001) < 2**60
    with pytest.raises(LeftOut, match="free memory"):
        data_bytes(1e9, Conditions(1, 1), 1e9)


def test_memory_of_a_tree_counts_the_children() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in descendants(os.getpid())
        assert tree_bytes(os.getpid()) > tree_bytes(child.pid) > 2**20
        child.communicate(b"\n")


def test_functions_of_tasks_are_pickled_by_a_name_that_needs_no_herder() -> None:
    assert pickle.loads(pickle.dumps(by_bare_name().sizes)) is by_bare_name().sizes
    assert by_bare_name().sizes.__module__ == "herder_bench_data"


def test_times_are_taken_in_turn() -> None:
    calls: list[str] = []
    times = times_in_turn([lambda: calls.append("a"), lambda: calls.append("b")], 0.0, warm_ups=0)
    assert calls == ["a", "b"] * 50
    assert [len(each) for each in times] == [50, 50]


def test_cpu_time_of_this_process_grows() -> None:
    assert cpu_ticks(os.getpid()) > 0


def test_benchmarks_are_listed_with_their_questions() -> None:
    result = CliRunner().invoke(cli, ["bench", "--list"])
    assert result.exit_code == 0
    assert "one-by-one" in result.stdout


def test_unknown_benchmark_is_a_usage_error() -> None:
    assert CliRunner().invoke(cli, ["bench", "no-such"]).exit_code == 2


def test_figures_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herder.cli.bench.command.benchmark", lambda name: lambda _conditions: [Figure(name, 1.0, "x")])
    result = CliRunner().invoke(cli, ["bench", "idle", "--json"])
    assert json.loads(result.stdout)["figures"][0]["name"] == "idle"
