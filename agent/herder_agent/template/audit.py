"""Is this process safe to fork? Applies the known cures, then lets each rule (`rules`) look at what is left."""

from __future__ import annotations

import os
import time

from . import cures, rules, system, threads
from .findings import SAFE, UNKNOWN, UNSAFE, Finding, Report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

#: Threads that are about to end (of a channel just closed, an executor told to stop) get this long.
SETTLE_S = 0.25
SETTLE_POLL_S = 0.005

__all__ = ["SAFE", "UNKNOWN", "UNSAFE", "Finding", "Report", "audit", "probe_fork"]


def audit(
    own: Iterable[int],
    allow_threads: Iterable[str] = (),
    baseline: list[Any] | None = None,
    environment: cures.Environment | None = None,
) -> Report:
    """Look at this process. `own` are the descriptors of the template itself, `baseline` locks that were held before
    its first step, `environment` the cures that were set there."""
    report = Report()
    maps = system.mappings()
    if environment is not None:
        report.applied.extend(environment.take_effect(maps))
    ended: list[threads.Thread] = []
    alive = threads.others(maps)
    if any("openblas" in thread.owner or not rules.is_harmless(thread) for thread in alive):
        alive = _settled(_end_openmp(report, alive, maps), list(allow_threads), maps)
        # Libraries with fork handlers (OpenBLAS) end their threads when the process forks: what is left is what
        # matters.
        before = {thread.tid: thread for thread in alive}
        probe_fork()
        maps = system.mappings()  # others start theirs anew
        alive = threads.others(maps)
        left = {thread.tid for thread in alive}
        ended = [thread for tid, thread in before.items() if tid not in left]
    report.thread_count = len(alive) + 1
    scene = rules.Scene(own=own, allowed=allow_threads, baseline=baseline or [], alive=alive, ended=ended, maps=maps)
    for rule in rules.RULES:
        report.findings.extend(rule.apply(scene))
    report.kept = [descriptor.fd for descriptor in scene.descriptors if descriptor.finding is None]
    return report


def _settled(alive: list[threads.Thread], allowed: list[str], maps: list[system.Mapping]) -> list[threads.Thread]:
    """What is left of these threads once those which nothing excuses have had a moment to end."""
    doubtful = {thread.tid for thread in alive if not rules.is_excused(thread, allowed)}
    if not doubtful:
        return alive
    deadline = time.monotonic() + SETTLE_S
    while doubtful.intersection(system.thread_ids()) and time.monotonic() < deadline:
        time.sleep(SETTLE_POLL_S)
    return threads.others(maps)


def probe_fork() -> None:
    """Fork a child which ends at once."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _end_openmp(report: Report, alive: list[threads.Thread], maps: list[system.Mapping]) -> list[threads.Thread]:
    """End the idle threads of each OpenMP runtime. Returns the threads that are left."""
    paused = cures.end_openmp(maps)
    if not paused:
        return alive
    left = threads.others(maps)
    if len(left) < len(alive):
        report.applied.extend(f"omp_pause_resource_all on {name}: its idle threads were ended" for name in paused)
    return left
