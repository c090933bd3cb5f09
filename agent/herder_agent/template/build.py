"""Builds a workload's template: preload step by step, audit after each → setup → audit → seal → canary → ready.

The fork point. A template may fork from any state that the audit calls safe; the deepest is the best. When a later step
(usually `setup`) made it unsafe, there is no way back in this process, so it execs itself anew, takes the steps up to
the deepest safe one, and lets each child take the rest. When no state is safe, or a canary child fails, it says
"fresh".
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import time

from . import audit, canary, child, life, preload, seal, system, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn


class Template:
    """Builds a workload's template in this process."""

    def __init__(self, channel: wire.Channel, opening: dict[str, Any], setup: bytes) -> None:
        self._channel = channel
        self._opening = opening
        self._workload: dict[str, Any] = opening["workload"]
        self._setup = setup
        self._own = _open_descriptors()
        self._seen = child.load_seen()
        self._steps = preload.Preload(opening, setup, self._seen)
        self._reports: list[audit.Report] = []
        self._start = self._workload.get("start", "auto")

    def build(self) -> Callable[[int, child.Ends], NoReturn] | None:
        """Take the steps. Returns what a forked child is to become, or None when the agent was told that none can
        be."""
        gc.disable()
        if self._start == "fresh":
            self._tell_fresh("asked for by the workload")
            return None
        names = self._steps.names
        count = self._opening.get("until", len(names))
        try:
            for name in names[:count]:
                self._take(name)
        except preload.Broken as broken:
            self._channel.send({"t": "failed", **broken.head})
            return None
        if self._reports[-1].verdict == audit.UNSAFE:
            self._step_back(names)
            return None
        return self._prove(names[:count], names[count:])

    def _take(self, name: str) -> None:
        seconds = self._steps.take(name)
        began = time.perf_counter()
        report = audit.audit(self._own, self._workload.get("allow_threads") or ())
        report.applied[:0] = self._steps.applied
        self._steps.applied.clear()
        self._reports.append(report)
        self._tell_step(name, seconds, report, time.perf_counter() - began)

    def _tell_step(self, name: str, seconds: float, report: audit.Report, audit_seconds: float = 0.0) -> None:
        head = {
            "t": "step",
            "step": name,
            "seconds": seconds,
            "audit_seconds": audit_seconds,
            "rss": system.memory_bytes()[0],
            "threads": report.thread_count,
            "verdict": report.verdict,
            "findings": [finding.encode() for finding in report.findings],
            "applied": report.applied,
        }
        if "until" not in self._opening or name in ("canary", "seal"):
            self._channel.send(head)

    def _step_back(self, names: list[str]) -> None:
        """The last step made this process unsafe: begin anew without it, or say that there is no safe state."""
        finding = self._reports[-1].first_unsafe()
        safe = [index for index, report in enumerate(self._reports) if report.verdict != audit.UNSAFE]
        first = self._reports[safe[-1] + 1].first_unsafe() if safe else finding
        step = names[safe[-1] + 1] if safe else names[0]
        reason = f"after {step!r}: {first or finding}"
        cure = f" Cure: {first.cure}" if first is not None and first.cure else ""
        if self._start == "fork":
            self._tell_failed(f"forking is not safe {reason}.{cure}")
        elif not safe or "until" in self._opening:
            self._tell_fresh(reason + cure)
        else:
            self._begin_anew(safe[-1] + 1, reason + cure)

    def _begin_anew(self, until: int, reason: str) -> NoReturn:
        """Exec this template again; it takes `until` steps only. Threads and descriptors of this life end here."""
        will = {**self._opening, "until": until, "reason": reason}
        fd = life.leave_will(will, self._setup)
        os.set_inheritable(life.CONTROL, True)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        original = sys.orig_argv
        script = next(i for i, word in enumerate(original) if word == sys.argv[0])
        os.execv(sys.executable, [sys.executable, *original[1 : script + 1], str(life.CONTROL), str(fd)])

    def _prove(self, taken: list[str], rest: list[str]) -> Callable[[int, child.Ends], NoReturn] | None:
        """Fork a canary; if it sings, seal and be ready."""
        workload = self._workload
        plan = child.Plan(
            seen=self._seen,
            python=preload.python_tag(),
            tasks_max=int(workload.get("max_tasks_per_child", 1)),
            rest=[],
            steps=self._steps,
        )
        report = audit.Report()
        report.thread_count = self._reports[-1].thread_count
        began = time.perf_counter()
        kept = self._reports[-1].kept
        sealed = seal.seal(plan, kept)
        seconds = time.perf_counter() - began
        complaint = canary.trial(plan)
        plan.rest = rest  # not in the canary, whose time is limited
        if complaint:
            seen = f"a forked child {complaint}"
            report.findings.append(audit.Finding("canary", seen, "forking is not safe here", 'use start="fresh"'))
        self._tell_step("canary", time.perf_counter() - began - seconds, report)
        if complaint:
            unknown = "; ".join(str(f) for f in self._reports[-1].findings if f.verdict == audit.UNKNOWN)
            reason = f"a child forked after {taken[-1]!r} {complaint}" + (f" ({unknown})" if unknown else "")
            if self._start == "fork":
                self._tell_failed(f'forking is not safe: {reason}. Cure: start="fresh"')
            else:
                self._tell_fresh(reason)
            return None
        report.applied = sealed + seal.prefault(plan)
        self._tell_step("seal", seconds, report)
        reason = self._opening.get("reason", "")
        if rest:
            reason += f" Each child takes these steps itself: {', '.join(rest)}"
        how = {"start": "fork", "fork_point": taken[-1], "reason": reason.strip(), "python": plan.python}
        life.send_ready(self._channel, self._opening, how)
        return functools.partial(child.run_forked, plan)

    def _tell_fresh(self, reason: str) -> None:
        python = preload.python_tag() if "cloudpickle" in sys.modules else ""
        how = {"start": "fresh", "fork_point": "", "reason": reason, "python": python}
        life.send_ready(self._channel, self._opening, how)

    def _tell_failed(self, message: str) -> None:
        self._channel.send({"t": "failed", "cause": "fork_unsafe", "message": message, "traceback": ""})


def _open_descriptors() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}
