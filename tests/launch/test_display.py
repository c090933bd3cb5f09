"""What is seen while hosts come up."""

from __future__ import annotations

import io

from rich.console import Console

from herder_launch.display import Board


def test_without_a_terminal_each_change_is_one_plain_line_and_nothing_is_said_twice() -> None:
    out = io.StringIO()
    with Board(Console(file=out, force_terminal=False, width=40), "up") as board:
        board.set("agent n1", "connecting", "bob@n1")
        board.set("agent n1", "connecting", "bob@n1")
        board.set("agent n1", "failed", "n1: [red]no[/red] " + "x" * 60)
    assert out.getvalue().splitlines() == [
        "agent n1: connecting (bob@n1)",
        "agent n1: failed (n1: [red]no[/red] " + "x" * 60 + ")",
    ]


def test_on_a_terminal_the_last_state_of_every_row_stands_in_a_table() -> None:
    out = io.StringIO()
    with Board(Console(file=out, force_terminal=True, width=80), "up") as board:
        board.set("agent n1", "connecting")
        board.set("agent n2", "failed", "no answer")
        board.set("agent n1", "ready")
    last = out.getvalue().rpartition("program")[2]
    assert "ready" in last
    assert "no answer" in last
    assert "connecting" not in last
