"""The chaos benchmark: some seconds of it, and that its checker sees what it is there to see."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from chaos_history import History, slope_per_hour

from herder_coordinator.core.records import TasksEnded
from herder_shared.ids import JobId
from herder_shared.states import Outcome
from herder_shared.wire.messages import TaskEnd

CHAOS = Path(__file__).resolve().parents[2] / "benchmarks" / "chaos.py"
JOB = JobId("1" * 16)


def history(*words: dict[str, object], ran: str = "", outcome: Outcome = Outcome.SUCCEEDED) -> History:
    made = History()
    made.read_client(json.dumps(word) + "\n" for word in words)
    made.read_ran(line + "\n" for line in ran.split(",") if line)
    made.read_journal([TasksEnded(JOB, 0, (TaskEnd(0, outcome),))])
    return made


def submit(*, once: bool = False) -> dict[str, object]:
    return {"t": "submit", "key": "k", "once": once}


END: dict[str, object] = {"t": "end", "key": "k", "outcome": "succeeded", "attempt": "1.1", "task": f"{JOB}.0"}
DONE: dict[str, object] = {"t": "done"}


def kinds(made: History) -> list[str]:
    return [kind for kind, _ in made.broken()]


def test_a_history_without_fault_is_clean() -> None:
    assert kinds(history(submit(once=True), END, DONE, ran="k 1.1")) == []


def test_a_client_that_was_killed_is_owed_nothing_but_what_was_accepted_of_detached_jobs() -> None:
    assert kinds(history(submit())) == []
    assert kinds(history(submit(), {"t": "accepted", "prefix": "k", "job": JOB})) == ["lost"]


def test_what_its_client_cancelled_may_have_ended_otherwise_and_old_detached_jobs_are_forgotten() -> None:
    assert kinds(history(submit(), {**END, "outcome": "cancelled"}, DONE, ran="k 1.1")) == []
    accepted: dict[str, object] = {"t": "accepted", "prefix": "k", "job": JOB}
    assert kinds(history(submit(), accepted, {"t": "forgotten", "key": "k", "prefix": "k"})) == []


def test_what_a_killed_writer_left_unfinished_is_not_read() -> None:
    made = History()
    made.read_client([json.dumps(submit()) + "\n", '{"t": "en'])
    made.read_ran(["k 1.1\n", "k 1."])
    assert made.ran == {"k": ["1.1"]}


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (history(submit(), DONE), "lost"),
        (history(submit(), END, END, DONE, ran="k 1.1"), "doubled"),
        (history(submit(), END, DONE, ran="k 1.1", outcome=Outcome.LOST), "doubled"),
        (history(submit(once=True), END, DONE, ran="k 1.1,k 1.2"), "run twice"),
        (history(submit(), END, DONE, ran="k 1.1,k 1.1"), "run twice"),
        (history(submit(), END, DONE), "ghost"),
        (history(ran="k 1.1"), "ghost"),
    ],
    ids=["no end", "two ends", "other in the journal", "twice", "same attempt twice", "never ran", "never submitted"],
)
def test_every_broken_promise_is_seen(made: History, expected: str) -> None:
    assert kinds(made) == [expected]


def test_a_second_terminal_record_is_seen_across_lives() -> None:
    made = history(submit(), END, DONE, ran="k 1.1")
    made.read_journal([TasksEnded(JOB, 1, (TaskEnd(0, Outcome.SUCCEEDED),))])
    assert kinds(made) == ["doubled"]


def test_the_slope_is_common_to_lives_of_different_levels() -> None:
    lives = [
        [(second, 10.0 + second) for second in (0.0, 1.0, 2.0)],
        [(second, second) for second in (9.0, 10.0, 12.0)],
    ]
    assert slope_per_hour(lives) == pytest.approx(3600.0)
    assert slope_per_hour([[(0.0, 5.0), (1.0, 5.0), (2.0, 5.0)]]) == 0.0


@pytest.mark.slow
def test_some_seconds_of_chaos_break_no_promise() -> None:
    command = [sys.executable, str(CHAOS), "--seed", "4", "--minutes", "0.1", "--pace", "0.3"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost 0, doubled 0, run twice 0, ghost 0, forgotten 0" in done.stdout
