"""A template's life: open → preload step by step, audit after each → setup → audit → canary → seal → serve.

The fork point. A template may fork from any state that the audit calls safe; the deepest is the best. When a later step
(usually `setup`) made it unsafe, there is no way back in this process, so it execs itself anew, takes the steps up to
the deepest safe one, and lets each child take the rest. When no state is safe, or a canary child fails, it says "fresh"
and ends.
"""

from __future__ import annotations

import gc
import os
import sys
import time

from . import audit, canary, child, preload, seal, serve, spawn, system, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

#: Descriptor of the control socket.
CONTROL = 3


def run(argv: list[str]) -> None:
    """`argv`: the program, the control socket's descriptor, and in a second life the descriptor of what the first
    left."""
    began = time.monotonic()
    system.die_with(os.getppid())
    fd = int(argv[1])
    if fd != CONTROL:
        os.dup2(fd, CONTROL, inheritable=False)
        os.close(fd)
    os.set_inheritable(CONTROL, False)
    resumed = _read_will(int(argv[2])) if len(argv) > 2 else None
    if resumed is None and os.getpgrp() != os.getpid():
        os.setsid()
    channel = wire.Channel(CONTROL)
    frame = resumed or channel.receive()
    if frame is None:
        os._exit(0)
    opening, setup = frame[0], bytes(frame[1])
    opening.setdefault("began", began)
    try:
        plan = None if opening.get("spawner") else Template(channel, opening, setup).build()
        if opening.get("spawner"):
            spawn.settle()
            _send_ready(channel, opening, {"start": "fork", "fork_point": preload.START, "reason": ""})
        if plan is not None or opening.get("spawner"):
            serve.Server(channel, plan).run()
    except (BrokenPipeError, ConnectionResetError):
        pass  # the agent is gone
    os._exit(0)


class Template:
    """Builds a workload's template in this process."""

    def __init__(self, channel: wire.Channel, opening: dict[str, Any], setup: bytes) -> None:
        self._channel = channel
        self._opening = opening
        self._workload: dict[str, Any] = opening["workload"]
        self._setup = setup
        self._own = {int(name) for name in os.listdir("/proc/self/fd")}
        self._seen = child.load_seen()
        self._steps = preload.Preload(opening, setup, self._seen)
        self._reports: list[audit.Report] = []
        self._start = self._workload.get("start", "auto")

    def build(self) -> child.Plan | None:
        """Take the steps. Returns the plan by which to fork, or None when the agent was told that there is none."""
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
        fd = os.memfd_create("herder-template")
        os.set_inheritable(fd, True)
        with open(fd, "wb", closefd=False) as file:
            file.write(wire.pack(will, self._setup))
        os.lseek(fd, 0, os.SEEK_SET)
        os.set_inheritable(CONTROL, True)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        original = sys.orig_argv
        script = next(i for i, word in enumerate(original) if word == sys.argv[0])
        os.execv(sys.executable, [sys.executable, *original[1 : script + 1], str(CONTROL), str(fd)])

    def _prove(self, taken: list[str], rest: list[str]) -> child.Plan | None:
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
        report.applied = sealed
        self._tell_step("seal", seconds, report)
        reason = self._opening.get("reason", "")
        if rest:
            reason += f" Each child takes these steps itself: {', '.join(rest)}"
        how = {"start": "fork", "fork_point": taken[-1], "reason": reason.strip(), "python": plan.python}
        _send_ready(self._channel, self._opening, how)
        return plan

    def _tell_fresh(self, reason: str) -> None:
        python = preload.python_tag() if "cloudpickle" in sys.modules else ""
        how = {"start": "fresh", "fork_point": "", "reason": reason, "python": python}
        _send_ready(self._channel, self._opening, how)

    def _tell_failed(self, message: str) -> None:
        self._channel.send({"t": "failed", "cause": "fork_unsafe", "message": message, "traceback": ""})


def _send_ready(channel: wire.Channel, opening: dict[str, Any], how: dict[str, str]) -> None:
    """`how`: start, fork_point, reason, python."""
    own = f"{sys.version_info.major}.{sys.version_info.minor}/"
    account = {
        "python": how.get("python") or own,
        "pid": os.getpid(),
        "start_s": time.monotonic() - opening["began"],
        "rss": system.memory_bytes()[0],
    }
    channel.send({"t": "ready", **how, **account})


def _read_will(fd: int) -> tuple[dict[str, Any], memoryview]:
    """What the first life of this template left in a memory file: its `open` frame, with the fork point."""
    with open(fd, "rb") as file:
        content = file.read()
    import json

    head_bytes, _ = wire.HEADER.unpack_from(content)
    middle = wire.HEADER.size + head_bytes
    return json.loads(content[wire.HEADER.size : middle]), memoryview(content)[middle:]
