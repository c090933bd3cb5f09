"""`herder pause`, `resume`, `priority`, and which tasks `herder job --explain` explains."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from herder.cli.jobs import EXPLAINED_OF_EACH, telling
from herder.cli.main import cli
from herder_shared.states import Outcome, TaskState
from herder_shared.wire.messages import TaskInfo


def test_those_that_wait_are_explained_first_and_only_a_few_of_each() -> None:
    tasks = [TaskInfo(index, TaskState.ENDED, Outcome.SUCCEEDED) for index in range(10)]
    tasks += [TaskInfo(index, TaskState.PENDING) for index in range(10, 20)]
    tasks += [TaskInfo(20, TaskState.ENDED, Outcome.CRASHED)]
    chosen = [task.index for task in telling(tasks)]
    assert chosen == [10, 11, 12, 20, 0, 1, 2]
    assert len(chosen) == 2 * EXPLAINED_OF_EACH + 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["priority", "00ff", "high"], "not a valid integer"),
        (["job", "00ff.3"], "ask for --explain"),
        (["pause"], "ID"),
    ],
)
def test_what_is_wrong_is_said_without_asking_anybody(arguments: list[str], text: str) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert text in result.output
