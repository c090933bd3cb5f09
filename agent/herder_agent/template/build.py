"""Builds a workload's template: preload step by step, audit after each → setup → audit → seal → canary → ready.

The fork point. A template may fork from any state that the audit calls safe; the deepest is the best. When a later step
(usually `setup`) made it unsafe, there is no way back in this process, so it execs itself anew, takes the steps up to
the deepest safe one, and lets each child take the rest. The same when a canary child fails: the next shallower safe
state is tried. When no state is left, or after `LIVES_MAX` lives, it says "fresh".
"""

from __future__ import annotations

import gc
import os
import sys
import time

from . import audit, birth, canary, child, cures, handover, life, objects, preload, rehome, seal, system, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from typing import Any, NoReturn

#: Times that a template may begin, counting the first: a canary that hangs costs some seconds each.
LIVES_MAX = 4


class Template:
    """Builds a workload's template in this process.

    `stem`: the template whose fork this process is, and whose steps are the first of this one's.
    """

    plan: child.Plan
    births: birth.Births

    def __init__(
        self, channel: wire.Channel, opening: dict[str, Any], setup: bytes, stem: Template | None = None
    ) -> None:
        self._channel = channel
        self._opening = opening
        self._workload: dict[str, Any] = opening["workload"]
        self._setup = setup
        self._own = _open_descriptors()
        self._seen = child.load_seen()
        self._steps = preload.Preload(opening, setup, self._seen)
        self._reports: list[audit.Report] = []
        self._cures = cures.Environment()
        self._locks = objects.held_locks()
        self._start = self._workload.get("start", "auto")
        self._published = handover.Handover(opening)
        #: What was told of the steps taken, for branches; and what `ready` said.
        self._told: list[dict[str, Any]] = []
        self.how: dict[str, Any] = {}
        if stem is not None:
            self._continue(stem)

    @property
    def key(self) -> str:
        """Of its workload."""
        return str(self._workload.get("key", ""))

    def _continue(self, stem: Template) -> None:
        """Take over what the stem has done: this process is its fork."""
        self._own -= {kept.fd for kept in stem.plan.kept}
        self._seen, self._cures, self._locks = stem._seen, stem._cures, stem._locks
        self._steps = preload.Preload(self._opening, self._setup, self._seen)
        self._reports = list(stem._reports)
        for head in stem._told:
            self._tell(head)

    def become_branch(self, parent: int, end: _socket.socket, log: int) -> NoReturn:
        """In a fork of this process: a template of its own."""
        from . import branch

        branch.become(self, parent, end, log)

    def build(self) -> birth.Births | None:
        """Take the steps. Returns what its children are to do, or None when the agent was told that none can
        be."""
        gc.disable()
        rehome.prepare()
        if self._start == "fresh" and not self._opening.get("publish"):
            self._tell_fresh("asked for by the workload")
            return None
        self._cures.apply()
        names = self._steps.names
        count = self._opening.get("until", len(names))
        try:
            for name in names[len(self._reports) : count]:
                self._take(name)
        except preload.Broken as broken:
            self._channel.send({"t": "failed", **broken.head})
            return None
        if self._opening.get("publish"):
            self._tell_fresh("asked for by the workload")
            return None
        if self._reports[-1].verdict == audit.UNSAFE:
            self._step_back(names)
            return None
        return self._prove(names[:count], names[count:])

    def _take(self, name: str) -> None:
        seconds = self._steps.take(name)
        began = time.perf_counter()
        report = audit.audit(self._own, self._workload.get("allow_threads") or (), self._locks, self._cures)
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
        if name in ("canary", "seal"):
            self._channel.send(head)
        elif "until" not in self._opening:
            self._tell(head)

    def _tell(self, head: dict[str, Any]) -> None:
        self._told.append(head)
        self._channel.send(head)

    def _step_back(self, names: list[str]) -> None:
        """The last step made this process unsafe: begin anew without it, or say that there is no safe state."""
        finding = self._reports[-1].first_unsafe()
        safe = [index for index, report in enumerate(self._reports) if report.verdict != audit.UNSAFE]
        first = self._reports[safe[-1] + 1].first_unsafe() if safe else finding
        step = names[safe[-1] + 1] if safe else names[0]
        reason = f"after {step!r}: {first or finding}"
        cure = f". Cure: {first.cure}" if first is not None and first.cure else ""
        if self._start == "fork":
            self._tell_failed(f"forking is not safe {reason}{cure}")
        else:
            self._retreat(len(self._reports) - 1, reason + cure)

    def _retreat(self, below: int, reason: str) -> None:
        """Fork from the deepest safe state among the first `below`, in another life; or say that there is none."""
        safe = [index for index in range(below) if self._reports[index].verdict != audit.UNSAFE]
        lives = self._opening.get("lives", 1)
        earlier = self._opening.get("reason", "")
        reason = f"{earlier}; then {reason}" if earlier and earlier != reason else reason
        if not safe or lives >= LIVES_MAX:
            self._tell_fresh(reason)
            return
        self._opening["lives"] = lives + 1
        names, until = self._steps.names, safe[-1] + 1
        self._published.publish(self._steps)
        # The value alone may well be safe to have, where making it was not.
        is_setup = names[until] == preload.SETUP and self._published.fd >= 0 and self._steps.setup_from == "ran"
        self._begin_anew(len(names) if is_setup else until, reason)

    def _begin_anew(self, until: int, reason: str) -> NoReturn:
        """Exec this template again; it takes `until` steps only. Threads and descriptors of this life end here."""
        will = {**self._opening, "until": until, "reason": reason, **self._published.hand_on(self._steps)}
        fd = life.leave_will(will, self._setup)
        os.set_inheritable(life.CONTROL, True)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        original = sys.orig_argv
        script = next(i for i, word in enumerate(original) if word == sys.argv[0])
        os.execv(sys.executable, [sys.executable, *original[1 : script + 1], str(life.CONTROL), str(fd)])

    def _prove(self, taken: list[str], rest: list[str]) -> birth.Births | None:
        """Fork a canary; if it sings, seal and be ready."""
        plan = child.Plan(
            seen=self._seen,
            python=preload.python_tag(),
            tasks_max=self._published.tasks_max(self._steps, rest),
            rest=[],
            steps=self._steps,
        )
        plan.immortal = self._workload.get("immortal", True)
        report = audit.Report()
        report.thread_count = self._reports[-1].thread_count
        began = time.perf_counter()
        kept = self._reports[-1].kept
        sealed = seal.seal(plan, kept)
        plan.runner.anon_bytes = system.anon_bytes()
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
                self._retreat(len(taken) - 1, reason)
            return None
        report.applied = sealed
        self._tell_step("seal", seconds, report)
        reason = self._opening.get("reason", "")
        if self._steps.setup_from == "mapped":
            reason += " Setup's value was made in a process of its own and is mapped."
        if rest:
            reason += f"{'. ' if reason else ''}Each child takes these steps itself: {', '.join(rest)}"
        how: dict[str, Any] = {
            "start": "fork",
            "fork_point": taken[-1],
            "reason": reason.strip(),
            "python": plan.python,
        }
        how["fork_cost_s"] = canary.fork_cost_s()
        how["shared"] = rehome.moved.size_bytes
        account = {**plan.account, **self._published.tell(self._steps, rest)}
        self.plan, self.how = plan, {**how, **account, "value_fd": -1}
        plan.takes_plain = not rest and not plan.kept and plan.runner.is_ordinary
        self.births = birth.Births(plan)
        life.send_ready(self._channel, self._opening, {**how, **account})
        return self.births

    def _tell_fresh(self, reason: str) -> None:
        python = preload.python_tag() if "cloudpickle" in sys.modules else ""
        how: dict[str, Any] = {"start": "fresh", "fork_point": "", "reason": reason, "python": python}
        self._published.publish(self._steps)
        life.send_ready(self._channel, self._opening, {**how, **self._published.tell(self._steps)})

    def _tell_failed(self, message: str) -> None:
        self._channel.send({"t": "failed", "cause": "fork_unsafe", "message": message, "traceback": ""})


def _open_descriptors() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}
