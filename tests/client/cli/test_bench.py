"""What benchmarks make of their measurements; the floor really forks."""

from __future__ import annotations

import json
import os

import pytest
from click.testing import CliRunner

from herder.cli.bench.command import BENCHMARKS, benchmark, figure_row
from herder.cli.bench.figure import Figure, percentile, tasks_for
from herder.cli.bench.idle import cpu_ticks
from herder.cli.bench.process_per_task import floor_of
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
