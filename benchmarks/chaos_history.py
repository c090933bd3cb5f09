"""What happened in a run of `chaos.py`, as its witnesses say, and whether the promises were kept. No I/O but reading.

Witnesses: each client writes down what it submitted and what it was told; each attempt appends a line when its code
begins; the journal says which terminal records there are. A key is the name that a client gave a task.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from herder_coordinator.core.records import Record, TasksEnded


@dataclass(slots=True)
class Submitted:
    """A task, as its client wrote it down."""

    key: str
    #: At most once.
    once: bool = False
    #: Somebody is still there to be told, or the job is detached and was acknowledged.
    is_owed: bool = False


@dataclass(slots=True)
class History:
    """All that the witnesses say."""

    submitted: dict[str, Submitted] = field(default_factory=dict)
    #: Attempts that began, by key, in order.
    ran: dict[str, list[str]] = field(default_factory=dict)
    #: `(outcome, attempt that the value names, "job.index")` of each end of which a client was told.
    told: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)
    #: `(cursor, outcome)` of each terminal record, by (job, index); what contradicts it.
    records: dict[tuple[str, int], tuple[int, str]] = field(default_factory=dict)
    contradictions: list[str] = field(default_factory=list)
    #: Prefixes of tasks of detached jobs that were forgotten, as so many newer ones are kept.
    forgotten: list[str] = field(default_factory=list)

    def read_client(self, lines: Iterable[str]) -> None:
        """One client's own record. It is owed its ends if it lived to say that it waited for them all."""
        mine: list[Submitted] = []
        for line in _whole(lines):
            word = json.loads(line)
            match word["t"]:
                case "submit":
                    mine.append(Submitted(word["key"], word.get("once", False)))
                case "end":
                    self.told.setdefault(word["key"], []).append((word["outcome"], word["attempt"], word["task"]))
                case "accepted":
                    for one in mine:
                        one.is_owed = one.is_owed or one.key.startswith(word["prefix"])
                case "forgotten":
                    self.forgotten.append(word["prefix"])
                case "done":
                    for one in mine:
                        one.is_owed = True
                case _:
                    raise ValueError(line)
        self.submitted |= {one.key: one for one in mine}

    def read_ran(self, lines: Iterable[str]) -> None:
        """The attempts' own record."""
        for line in _whole(lines):
            key, attempt = line.split()
            self.ran.setdefault(key, []).append(attempt.rpartition("/")[2])

    def read_journal(self, records: Iterable[Record]) -> None:
        """One life's journal; what an earlier one has said must hold."""
        for record in records:
            if not isinstance(record, TasksEnded):
                continue
            for cursor, end in enumerate(record.ends, record.cursor):
                found = (cursor, str(end.outcome))
                known = self.records.setdefault((record.job, end.index), found)
                if known != found:
                    self.contradictions.append(f"{record.job}.{end.index} has records {known} and {found}")

    def broken(self) -> Iterator[tuple[str, str]]:
        """`(promise, what broke it)`."""
        for key, one in self.submitted.items():
            ends = self.told.get(key, [])
            if one.is_owed and not ends and not key.startswith(tuple(self.forgotten)):
                yield "lost", f"{key} was accepted and its client never told of an end"
            if len(ends) > 1:
                yield "doubled", f"{key} ended {len(ends)} times for its client: {ends}"
            if one.once and len(self.ran.get(key, [])) > 1:
                yield "run twice", f"{key} may run once and ran as {self.ran[key]}"
        for text in self.contradictions:
            yield "doubled", text
        for key, attempts in self.ran.items():
            if key not in self.submitted:
                yield "ghost", f"{key} ran as {attempts} and was never submitted"
            if len(set(attempts)) < len(attempts):
                yield "run twice", f"one attempt of {key} began twice: {attempts}"
        for key, ends in self.told.items():
            for outcome, attempt, task in ends:
                if outcome == "succeeded" and attempt not in self.ran.get(key, []):
                    yield "ghost", f"{key} succeeded as attempt {attempt!r}, which never ran"
                job, _, index = task.rpartition(".")
                recorded = self.records.get((job, int(index))) if index else None
                # Who cancels is told at once, whatever is decided meanwhile.
                if recorded is not None and recorded[1] != outcome and outcome != "cancelled":
                    yield "doubled", f"{key} ended {outcome} for its client and {recorded[1]} in the journal"

    def summary(self) -> Mapping[str, int]:
        """Counts, for people."""
        outcomes = Counter(end[0] for ends in self.told.values() for end in ends)
        reruns = sum(len(attempts) - 1 for attempts in self.ran.values())
        return {
            "submitted": len(self.submitted),
            "at most once": sum(one.once for one in self.submitted.values()),
            "owed": sum(one.is_owed for one in self.submitted.values()),
            "attempts that ran": sum(map(len, self.ran.values())),
            "of these again": reruns,
            "terminal records read": len(self.records),
            **{f"told {outcome}": count for outcome, count in sorted(outcomes.items())},
        }


def read(folder: Path) -> History:
    """What clients and attempts left in `folder`."""
    history = History()
    for file in sorted(folder.glob("client-*.jsonl")):
        with file.open() as lines:
            history.read_client(lines)
    if (folder / "ran").exists():
        with (folder / "ran").open() as lines:
            history.read_ran(lines)
    return history


def slope_per_hour(lives: Iterable[list[tuple[float, float]]]) -> float:
    """The common slope of `(seconds, value)` series, each with a level of its own (least squares), an hour."""
    above = below = 0.0
    for life in lives:
        if len(life) < 3:
            continue
        middle_s = sum(at_s for at_s, _ in life) / len(life)
        middle = sum(value for _, value in life) / len(life)
        above += sum((at_s - middle_s) * (value - middle) for at_s, value in life)
        below += sum((at_s - middle_s) ** 2 for at_s, _ in life)
    return 3600 * above / below if below else 0.0


def _whole(lines: Iterable[str]) -> Iterator[str]:
    """Without what a killed writer left unfinished."""
    return (line for line in lines if line.endswith("\n") and line.strip())
