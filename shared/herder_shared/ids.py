"""Identities: what names a job, an attempt, a node, a blob, a cluster.

A *task* is `(JobId, index)`; its public spelling is `<job>.<index>`. An *attempt* is `(epoch, n)`, totally ordered over
all lives of the coordinator, so that it can fence a task's side effects.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, NewType

#: 32 hex digits, random, made by `herder init`: one per cluster for its whole life.
ClusterId = NewType("ClusterId", str)
#: 16 hex digits, random, made by the client: so a submission can be sent twice and exist once.
JobId = NewType("JobId", str)
#: The name by which users, metrics and placement know a machine (or one of several agents on it).
NodeName = NewType("NodeName", str)
#: 16 hex digits, random, one per process of an agent or client: tells a restart from a reconnection.
Incarnation = NewType("Incarnation", str)
#: 40 hex digits: BLAKE2b-160 of the bytes.
BlobId = NewType("BlobId", str)
#: 16 hex digits: hash of everything that makes two workloads need different templates.
WorkloadKey = NewType("WorkloadKey", str)


class AttemptId(NamedTuple):
    """One execution of a task. `epoch` is the coordinator's life that made it, `n` counts within it, from 1."""

    epoch: int
    n: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.n}"


def blob_id(content: bytes | bytearray | memoryview) -> BlobId:
    """Name immutable bytes by their hash."""
    return BlobId(hashlib.blake2b(content, digest_size=20).hexdigest())


def task_id(job: JobId, index: int) -> str:
    """The public spelling of a task's identity."""
    return f"{job}.{index}"


def parse_task_id(text: str) -> tuple[JobId, int]:
    """Read `<job>.<index>`.

    Raises:
        ValueError: `text` is not of that form.
    """
    job, dot, index = text.rpartition(".")
    if not dot or not job or not index.isdecimal():
        raise ValueError(f"{text!r} is not a task id: expected <job>.<index>, as in 3f9a0c1d2e4b5a69.17")
    return JobId(job), int(index)
