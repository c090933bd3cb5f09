"""Explanations in words: what `herder job ID --explain` prints, and what `print(future.explain())` shows.

What an explanation says is the coordinator's (`coordinator/.../core/explain.py`); how it looks is decided here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from herder_shared.ids import JobId, task_id
from herder_shared.wire.messages import Explanation as Told
from herder_shared.wire.messages import PastAttempt, Query

if TYPE_CHECKING:
    from herder.connection import Connection

#: Nodes that are shown of many.
NODES_SHOWN_MAX = 12


class Explanation(Told, frozen=True):
    """Why a task waits, runs where it runs, or ended as it did. `str()` gives it in words."""

    def __str__(self) -> str:
        return "\n".join(lines(self))


def ask(connection: Connection, job: JobId, index: int) -> Explanation:
    """Ask the coordinator.

    Raises:
        JobNotFound: the job has been forgotten, or has no such task.
        Unreachable: no answer.
    """
    told = connection.ask(lambda number: Query(number, "explain", job, index)).explanation
    assert told is not None
    return Explanation(**{name: getattr(told, name) for name in told.__struct_fields__})


def lines(told: Told) -> list[str]:
    """It in words, line by line; what is not the first line is indented."""
    out = [f"{task_id(told.job, told.index)} {told.outcome or told.state}: {told.summary}"]
    out += [f"  {detail}" for detail in told.details]
    if told.nodes:
        out.append("  nodes:")
        shown = sorted(told.nodes, key=lambda verdict: not verdict.fits)[:NODES_SHOWN_MAX]
        out += [f"    {verdict.node}: {verdict.text}" for verdict in shown]
        if len(shown) < len(told.nodes):
            out.append(f"    and {len(told.nodes) - len(shown)} more")
    if told.attempts:
        out.append("  attempts:")
        out += [f"    {attempt_line(attempt)}" for attempt in told.attempts]
    return out


def attempt_line(attempt: PastAttempt) -> str:
    """One attempt that is over."""
    how = f" ({attempt.start_method})" if attempt.start_method else ""
    times = f"queued {attempt.queued_s:.3g} s, start {attempt.start_s:.3g} s, ran {attempt.wall_s:.3g} s"
    memory = f", limit {attempt.memory_bytes} bytes" if attempt.memory_bytes else ""
    peak = f", peak {attempt.peak_memory_bytes} bytes" if attempt.peak_memory_bytes else ""
    why = f": {attempt.message}" if attempt.message else ""
    return f"{attempt.attempt}. on {attempt.node}{how}, {attempt.outcome}; {times}{peak}{memory}{why}"
