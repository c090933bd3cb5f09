"""What `herder demo` makes of what the cluster reports; and the demo's own tasks, run here."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from herder import demo
from herder.cli.demo import (
    Answer,
    NodeAccount,
    Run,
    account,
    accounted_s,
    check_installed,
    run_of,
    show_answer,
    show_nodes,
)
from herder.cli.main import cli
from herder_shared.errors import ConfigError
from herder_shared.ids import NodeName
from herder_shared.states import AgentState
from herder_shared.wire.messages import NodeFacts, NodeInfo, NodeReport


def node(name: str, **core_seconds: float) -> NodeInfo:
    return NodeInfo(NodeFacts(NodeName(name), 2, 0), AgentState.READY, report=NodeReport(core_seconds))


def test_account_is_the_difference_of_two_reports() -> None:
    before = [node("a", task=1.0, idle=5.0), NodeInfo(NodeFacts(NodeName("b"), 2, 0), AgentState.READY)]
    after = [node("b", task=2.0), node("a", task=4.0, idle=6.0, start=0.5)]
    first, second = account(before, after)
    assert (first.node, second.node) == ("a", "b")
    assert first.core_seconds == {
        "task": 3.0,
        "start": 0.5,
        "transfer": 0.0,
        "idle_work_waiting": 0.0,
        "idle": 1.0,
        "system": 0.0,
    }
    assert second.core_seconds["task"] == 2.0


def test_node_without_a_report_has_accounted_nothing() -> None:
    assert accounted_s(NodeInfo(NodeFacts(NodeName("b"), 2, 0), AgentState.READY)) == 0.0


def test_share_is_of_the_core_seconds_that_had_work(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"task": 9.0, "start": 1.0, "transfer": 0.0, "idle_work_waiting": 0.0, "idle": 90.0, "system": 0.0}
    show_nodes((NodeAccount("n1", 2, seconds),))
    assert "90.0 %" in capsys.readouterr().out


def test_p_value_above_the_usual_level_is_not_called_a_yes(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(1.0, 0.05, 100, {"fork": 100})
    show_answer(Answer(100, 0.1, 0.1, 0.2, 0.5), run)
    show_answer(Answer(100, 0.9, 0.1, 0.2, 0.01), run)
    first, second = capsys.readouterr().out.split("Can a linear")[1:]
    assert "no: chance" in first
    assert "yes (p = 0.0100)" in second


def test_missing_scikit_learn_is_a_config_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"pip install 'herder\[demo\]'"):
        check_installed()


def test_too_few_fits_are_a_usage_error() -> None:
    assert CliRunner().invoke(cli, ["demo", "--fits", "1"]).exit_code == 2


@pytest.mark.slow
def test_true_labels_fit_better_than_shuffled_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    digits = demo.load()
    monkeypatch.setitem(sys.modules, "_herder_task", SimpleNamespace(shared=lambda: digits))
    assert demo.fit(demo.TRUE_LABELS) > 0.9
    assert demo.fit(1) < 0.3
    assert demo.fit(1) == demo.fit(1)


def test_run_counts_processes_and_start_methods() -> None:
    usages = [SimpleNamespace(node="n", pid=pid, start_method="fork", wall_s=0.1) for pid in (1, 2, 2)]
    futures: list[Any] = [SimpleNamespace(usage=lambda usage=usage: usage) for usage in usages]
    assert run_of(futures, 1.0) == Run(1.0, 0.1, 2, {"fork": 3})
