"""The agent's loop: the only owner of `State`. Everything that happens becomes an event; effects become calls.

Nothing here waits. Events that arise while an event is taken are taken after it, in order. What is to be reported in
one turn of the event loop leaves in one message per kind; a task that starts and ends within `STARTED_DELAY_S` is
reported by its end alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from herder_agent.core import effects as fx
from herder_agent.core import events
from herder_agent.core.state import ChildPhase, State
from herder_agent.core.step import next_deadline_s, step
from herder_agent.launch import command, fresh
from herder_agent.launch.child import Child
from herder_agent.launch.control import encode as encode_json
from herder_agent.launch.poller import Poller
from herder_agent.metrics import Counts
from herder_agent.runtime import cgroups, host
from herder_agent.runtime.blobs import BlobStore, FunctionCache
from herder_agent.runtime.children import Children
from herder_agent.runtime.connection import Connection, size_of
from herder_agent.runtime.environments import Environments
from herder_agent.runtime.reap import Reaper
from herder_agent.runtime.relays import Relays
from herder_agent.runtime.templates import Templates
from herder_shared.errors import DataLost
from herder_shared.ids import AttemptId, ClusterId, WorkloadKey
from herder_shared.limits import MIB
from herder_shared.states import Cause
from herder_shared.wire.messages import (
    AttemptEnd,
    AttemptStart,
    NodeReport,
    Payload,
    TaskOptions,
    WorkloadReport,
)

_log = logging.getLogger("herder.agent")

#: A start is reported this much later, unless the end comes first.
STARTED_DELAY_S = 0.005
#: Ends are kept this long while attempts wait here, so that one message, and one acknowledgement, serves several. With
#: nothing waiting they leave at once.
_REPORT_DELAY_S = 0.002
#: ... and up to this long while so many wait that the slots cannot run out of work meanwhile: what waits must last
#: `_QUEUE_LASTS` times as long.
_REPORT_DELAY_S_MAX = 0.025
_QUEUE_LASTS = 2.0
#: Weight of the last interval between two ends in their mean.
_PACE_WEIGHT = 0.1
#: Leftovers that cannot be killed: looked at again later and later. After so long their attempts are reported, keep
#: their slots, and the node takes nothing more.
_SWEEP_RETRY_S = 0.001
_SWEEP_RETRY_S_MAX = 0.5
_STUCK_S = 10.0
#: Ends that the coordinator has not acknowledged: above it, results go to disk.
_HELD_BYTES_MAX = 64 * MIB
#: What the log says of that which the core observes.
_TOLD = {
    "fork_unsafe": "forking is not safe, fresh interpreters are used",
    "hung": "killed, as it cannot go on",
    "oracle_off": "the deadlock oracle is off",
    "template_replaced": "a template is replaced",
    "demoted": "fresh interpreters are used from now on",
}
#: How long stopping may take before what is left is killed without asking.
_STOP_LIMIT_S = 3.0


class Place(NamedTuple):
    """Where and whose this agent is."""

    cluster: ClusterId
    state_dir: Path
    #: The agent's own environment.
    environ: Mapping[str, str]
    #: Of control groups: "auto", "off", or a folder.
    cgroup: str = "auto"


class AgentLoop:
    """Owns the state, and every process and descriptor of the agent."""

    def __init__(
        self, state: State, place: Place, *, stop: Callable[[str], None], linked: Callable[[int], None]
    ) -> None:
        self.state = state
        self.place = place
        self.counts = Counts()
        self.loop = asyncio.get_running_loop()
        self.reaper = Reaper()
        self.store = BlobStore(place.state_dir / "blobs")
        self.functions = FunctionCache(self.store)
        self.relays = Relays(self.loop, state, self.dispatch)
        self.connection = Connection(
            store=self.store,
            functions=self.functions,
            dispatch=self.dispatch,
            exposition=self._exposition,
            stop=stop,
            linked=linked,
            relays=self.relays,
        )
        self.exposition: Callable[[bool], tuple[bytes, str]] = lambda _openmetrics: (b"", "text/plain")
        self.environments = Environments(self.loop, place, state.node, self.reaper)
        self.poller = Poller(self.loop)
        self.groups = cgroups.probe(place.cgroup)
        _log.info("limits of attempts: %s", self.groups.reason)
        self.children = Children(
            self.loop,
            self.poller,
            self.store,
            self.dispatch,
            self.is_crowded,
            self.groups,
            is_busy=self._is_busy,
            open_client=self.relays.open,
        )
        self.children.limits.pids = state.pids
        self._cloudpickle = host.offer_cloudpickle(place.state_dir)
        self.templates = Templates(
            place,
            state.node,
            loop=self.loop,
            poller=self.poller,
            environments=self.environments,
            reaper=self.reaper,
            children=self.children,
            cloudpickle_path=self._cloudpickle,
            dispatch=self.dispatch,
            begun=self._open_fresh,
            sweep_soon=self._sweep_soon,
            left_stuck=self._keep_stuck,
        )
        self._scratch = place.state_dir.absolute() / "scratch"
        self._pending: deque[events.Event] = deque()
        self._is_stepping = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0
        self._report_timer: asyncio.Handle | None = None
        self._is_sweep_due = False
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._sweep_since_s = 0.0
        self._sweep_wait_s = _SWEEP_RETRY_S
        self._stuck: set[int] = set()
        self._has_new_stuck = False
        self._started: list[AttemptId] = []
        self._started_timer: asyncio.TimerHandle | None = None
        self._ends: list[AttemptEnd] = []
        self._last_end_s = 0.0
        self._pace_s = 0.0
        self._workloads: dict[WorkloadKey, WorkloadReport] = {}
        self._held_bytes = 0
        self._use = host.CpuUse(state.cpus or host.usable_cpus())
        self._is_closing = False
        self._is_closed = False

    # Events and effects.

    def dispatch(self, event: events.Event) -> None:
        """Take an event, and do what follows from it."""
        if self._is_closing:
            return
        self._pending.append(event)
        if self._is_stepping:
            return
        self._is_stepping = True
        try:
            while self._pending:
                event = self._pending.popleft()
                if type(event) is events.AttemptsAcked:
                    self._acked(event)
                for effect in step(self.state, event, time.monotonic()):
                    self._do(effect)
        finally:
            self._is_stepping = False
        self._set_timer()

    def _do(self, effect: fx.Effect) -> None:
        match effect:
            case fx.SendTask():
                self._send_task(effect)
            case fx.RunTask():
                self._run_task(effect)
            case fx.ReportStarted():
                self._started.append(effect.attempt)
                if self._started_timer is None:
                    delay_s = max(STARTED_DELAY_S, self._report_delay_s() if self.state.queue else 0.0)
                    self._started_timer = self.loop.call_later(delay_s, self._flush_started)
            case fx.SweepLeftovers():
                self._sweep_soon()
            case fx.ReportEnd():
                self._ends.append(effect.end)
                self._note_pace()
                self._held_bytes += size_of(effect.end)
                self._report_soon()
            case fx.ForkChildren():
                orders = [{"child": child} for child in effect.children]
                self.templates.order(effect.template, {"t": "fork", "n": len(orders), "children": orders})
            case fx.Observe():
                self.counts.observe(effect)
                if effect.text:
                    _log.warning("%s: %s", _TOLD[effect.kind], effect.text)
            case fx.SpawnFresh():
                self._spawn_fresh(effect)
            case fx.SpawnCommand():
                self._spawn_command(effect)
            case fx.SignalChild():
                self._signal(effect)
            case fx.StopChild():
                self.children.stop(effect.child)
            case fx.DropChild():
                self.children.drop(effect.child)
            case fx.StartTemplate():
                self.templates.start(effect)
            case fx.BranchTemplate():
                self.templates.branch(effect)
            case fx.StopTemplate():
                self.templates.stop(effect.template)
            case fx.DropValue():
                self.templates.values.drop(effect.workload)
            case fx.LookAtTemplate():
                self.templates.look_at(effect.template)
            case fx.FetchBlobs():
                self.connection.fetch(effect.attempt, effect.blobs)
            case fx.ReleaseBlobs():
                self.connection.release(effect.attempt)
            case fx.UploadBlob():
                self.connection.upload(effect.blob)
            case fx.SendSync():
                self._ends.clear()
                self._started.clear()
                self.connection.sync(effect.running, effect.ended)
            case fx.ReportSlot():
                self.relays.report(effect)
            case fx.ResumeTask():
                self.relays.resume(effect)
            case fx.RefuseClient():
                self.relays.refuse(effect.attempt, effect.message)
            case fx.ReportWorkload():
                self._workloads[effect.report.key] = effect.report
                self._report_soon()

    def _is_busy(self, number: int) -> bool:
        child = self.state.children.get(number)
        return child is not None and child.attempt is not None

    def _is_demoted(self, number: int) -> bool:
        child = self.state.children.get(number)
        return child is not None and bool(child.pool.workload.demoted)

    def is_crowded(self) -> bool:
        """So much waits for acknowledgement that further results belong on disk."""
        return self._held_bytes > _HELD_BYTES_MAX

    def _acked(self, event: events.AttemptsAcked) -> None:
        for attempt in dict.fromkeys(
            event.attempts
        ):  # an end that was said twice is acknowledged twice, in one message
            end = self.state.ends.get(attempt)
            if end is not None:
                self._held_bytes = max(0, self._held_bytes - size_of(end))
                if end.result is not None and end.result.blob is not None:
                    self.store.unpin(end.result.blob)

    # Time.

    def _set_timer(self) -> None:
        due_s = next_deadline_s(self.state)
        if due_s is None or (self._timer is not None and self._timer_s <= due_s):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_s = due_s
        self._timer = self.loop.call_later(max(0.0, due_s - time.monotonic()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.dispatch(events.Ticked())

    # Reports: those of one turn of the loop together; while more attempts wait here than can run, of a few turns.

    def _report_soon(self) -> None:
        if self._report_timer is not None and (self.state.queue or not self._ends):
            return
        if self._report_timer is not None:
            self._report_timer.cancel()
        if self.state.queue:
            self._report_timer = self.loop.call_later(self._report_delay_s(), self._report)
        else:
            self._report_timer = self.loop.call_soon(self._report)

    def _report(self) -> None:
        self._report_timer = None
        if self._is_closing:
            return
        if self._started and self._ends:
            ended = {end.attempt for end in self._ends}
            self._started = [attempt for attempt in self._started if attempt not in ended]
        ends, self._ends = self._ends, []
        workloads, self._workloads = self._workloads, {}
        self.connection.report([], ends, list(workloads.values()))

    def _note_pace(self) -> None:
        """The mean time between two ends of late; a pause is none."""
        now_s = time.monotonic()
        interval_s = min(now_s - self._last_end_s, _REPORT_DELAY_S_MAX)
        self._pace_s += _PACE_WEIGHT * (interval_s - self._pace_s)
        self._last_end_s = now_s

    def _report_delay_s(self) -> float:
        lasts_s = len(self.state.queue) * self._pace_s
        return max(_REPORT_DELAY_S, min(_REPORT_DELAY_S_MAX, lasts_s / _QUEUE_LASTS))

    def _flush_started(self) -> None:
        """Report the starts whose ends are not about to be reported."""
        self._started_timer = None
        ended = {end.attempt for end in self._ends}
        started, self._started = [attempt for attempt in self._started if attempt not in ended], []
        self.connection.report(started, [], [])

    # What ended children left behind, once a turn.

    def _sweep_soon(self) -> None:
        if not self._is_sweep_due and self._sweep_timer is None:
            self._is_sweep_due = True
            self.loop.call_soon(self._sweep)

    def _sweep(self) -> None:
        self._is_sweep_due = False
        self._sweep_timer = None
        if self._is_closing:
            return
        left = self.reaper.sweep() | (self.groups.settle() - self.reaper.known)
        now_s = time.monotonic()
        if left:
            self._sweep_since_s = self._sweep_since_s or now_s
            if now_s - self._sweep_since_s < _STUCK_S:
                self._sweep_timer = self.loop.call_later(self._sweep_wait_s, self._sweep)
                self._sweep_wait_s = min(2 * self._sweep_wait_s, _SWEEP_RETRY_S_MAX)
                return
            self._keep_stuck(left)
        if self._has_new_stuck:
            self._has_new_stuck = False
            self.dispatch(events.LeftoversStuck())
        self._sweep_since_s = 0.0
        self._sweep_wait_s = _SWEEP_RETRY_S
        self.dispatch(events.LeftoversGone())

    def _keep_stuck(self, pids: set[int]) -> None:
        """These cannot be killed. Whoever left them, which are those that are swept for next, keeps his slot."""
        _log.error("processes that tasks left behind cannot be killed: %s", sorted(pids))
        self._stuck |= pids
        self.reaper.known |= pids  # should their template die, they are ours
        self._has_new_stuck = True

    # Children.

    def _spawn_fresh(self, effect: fx.SpawnFresh) -> None:
        self.children.expect(effect.child, "fresh", effect.workload)

        def with_environment(environment: dict[str, str]) -> None:
            self.templates.order(effect.template, fresh.order(effect.child, effect.workload, environment))

        def without(message: str) -> None:
            self.dispatch(events.ChildForkFailed(effect.child, message))

        self.environments.get(effect.workload, with_environment, without)

    def _open_fresh(self, child: Child) -> None:
        spec = self.children.workload_of(child)
        if spec is None or child.channel is None:
            return
        known = self.state.children.get(child.number)
        opening = self.templates.values.opening(
            spec,
            known.pool.tasks_max if known is not None else spec.max_tasks_per_child,
            cluster=self.place.cluster,
            node=self.state.node,
            cloudpickle_path=self._cloudpickle,
        )
        child.channel.send(*opening)
        if spec.memory_bytes:
            over = partial(self._fresh_over, child)
            self.templates.watch.add(child.pid, spec.memory_bytes, partial(self._is_warming, child), over, True)

    def _is_warming(self, child: Child) -> bool:
        known = self.state.children.get(child.number)
        return known is not None and known.phase is ChildPhase.WARMING

    def _fresh_over(self, child: Child, message: str) -> None:
        self.dispatch(events.ChildSetupFailed(child.number, Cause.SETUP_FAILED, message))
        child.kill()

    def _spawn_command(self, effect: fx.SpawnCommand) -> None:
        start = effect.attempt
        try:
            spec = command.decode(self._content(start.args))
        except (DataLost, ValueError) as error:
            self.dispatch(events.ChildForkFailed(effect.child, f"its arguments cannot be read: {error}"))
            return
        self.children.expect(effect.child, "command", effect.workload, spec, bool(effect.options.memory_bytes))

        def with_environment(environment: dict[str, str]) -> None:
            threads = host.thread_environment(environment, effect.workload, effect.grant.threads)
            full = {**environment, **threads, **self._marks(start, effect.grant)}
            groups = self.children.limits.enter(effect.child, effect.options.memory_bytes, effect.grant.pids)
            head = {**command.order(effect, spec, full), "groups": groups}
            stdin = command.stdin_file(spec)
            self.templates.order(effect.template, head, stdin)
            for fd in stdin:
                os.close(fd)

        def without(message: str) -> None:
            self.dispatch(events.ChildForkFailed(effect.child, message))

        self.environments.get(effect.workload, with_environment, without)

    def _marks(self, start: AttemptStart, grant: fx.Grant) -> dict[str, str]:
        marks = {"HERDER_ATTEMPT": f"{self.place.cluster}/{start.attempt.epoch}.{start.attempt.n}"}
        if grant.gpus:
            marks["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, grant.gpus))
        return marks

    def _content(self, payload: Payload) -> bytes:
        if payload.blob is None:
            return payload.inline
        fd = self.store.open(payload.blob)
        try:
            return os.pread(fd, self.store.size_of(payload.blob), 0)
        finally:
            os.close(fd)

    def _send_task(self, effect: fx.SendTask) -> None:
        child = self.children.get(effect.child)
        if child is None:
            return
        start, options, grant = effect.attempt, effect.options, effect.grant
        names: list[tuple[str, int]] = []
        parts: list[bytes] = []
        file_names: list[str] = []
        files: list[int] = []

        def add(name: str, payload: Payload) -> None:
            if payload.blob is None:
                names.append((name, len(payload.inline)))
                parts.append(payload.inline)
            else:
                files.append(self.store.open(payload.blob))
                file_names.append(name)

        try:
            function = start.function or ""
            if function and function != child.function:
                content = self.functions.get(start.function) if start.function is not None else None
                add("function", Payload(content) if content is not None else Payload(blob=start.function))
                child.function = function
            add("args", start.args)
            if options.retry_on:
                add("retry_on", Payload(options.retry_on))
            for job, index, payload in start.deps:
                add(f"dep:{job}:{index}", payload)
        except DataLost as error:
            for fd in files:
                os.close(fd)
            child.function = ""
            self.children.cannot_start(child, str(error))
            return
        child.is_watched = child.kind == "fork" or start.start == "fresh" or self._is_demoted(child.number)
        scratch = child.scratch = f"{self._scratch}/{start.attempt}"
        head = self._task_head(start, options, grant, names, file_names, scratch)
        head["quiet"] = effect.is_quiet
        head["groups"] = self.children.limits.enter(child.number, options.memory_bytes, grant.pids)
        self.children.send_task(
            child,
            head,
            parts,
            files,
            is_limited=bool(options.memory_bytes),
            reuses=effect.reuses,
            in_crowd=effect.in_crowd,
        )
        for fd in files:
            os.close(fd)

    def _task_head(  # noqa: PLR0917
        self,
        start: AttemptStart,
        options: TaskOptions,
        grant: fx.Grant,
        names: list[tuple[str, int]],
        file_names: list[str],
        scratch: str,
    ) -> dict[str, Any]:
        """What a child is told of its task."""
        return {
            "t": "task",
            "attempt": f"{start.attempt.epoch}.{start.attempt.n}",
            "ordinal": start.ordinal,
            "job": start.job,
            "index": start.index,
            "node": self.state.node,
            "function": start.function or "",
            "parts": names,
            "fds": file_names,
            "cpus": grant.cpus or None,
            "threads": grant.threads,
            "seed": options.seed,
            "env": self._marks(start, grant),
            "python": start.python,
            "scratch": scratch,
            "gpus": grant.gpus,
            "discard": options.stdout == "discard",
            "limits": {},
            "quiet": True,
            "groups": (),
        }

    def _run_task(self, effect: fx.RunTask) -> None:
        if not self.templates.is_there(effect.template):
            return
        start, options, grant = effect.attempt, effect.options, effect.grant
        function = start.function or ""
        parts: list[bytes] = []
        content = self.functions.get(start.function) if start.function is not None else None
        if content is None:
            message = f"function {function} is not on node {self.state.node} any more"
            self.dispatch(events.ChildForkFailed(effect.child, message))
            return
        scratch = f"{self._scratch}/{start.attempt}"
        parts += [content, self._content(start.args)]
        names = [("function", len(content)), ("args", len(parts[1]))]
        if options.retry_on:
            parts.append(options.retry_on)
            names.append(("retry_on", len(options.retry_on)))
        for job, index, payload in start.deps:
            parts.append(payload.inline)
            names.append((f"dep:{job}:{index}", len(payload.inline)))
        head = self._task_head(start, effect.options, grant, names, [], scratch)
        text = encode_json(head)
        marks = head["env"]
        first = len(text)
        middle = first + len(content)
        order: dict[str, object] = {
            "t": "run",
            "child": effect.child,
            "cpus": grant.cpus or None,
            "attempt": marks["HERDER_ATTEMPT"],
            "plain": options.seed is None and options.stdout != "discard" and len(marks) == 1 and not start.deps,
            "threads": grant.threads,
            "python": start.python,
            "len": first,
            "cuts": (first, middle, middle + len(parts[1])),
        }
        self.children.hand(effect.child, effect.template, scratch)
        self.templates.run(effect.template, order, [text, *parts])

    def _signal(self, effect: fx.SignalChild) -> None:
        template = self.children.template_of(effect.child)
        if template:
            self.templates.order(template, {"t": "kill", "child": effect.child, "signal": int(effect.signal)})
            if effect.signal == signal.SIGKILL:
                self.children.limits.kill(effect.child)

    # Reports.

    def report(self) -> NodeReport:
        """The node's account, now."""
        self.dispatch(events.Ticked())
        state = self.state
        return NodeReport(
            core_seconds={core.value: seconds for core, seconds in state.account.seconds.items()},
            running=state.running_count,
            queued=len(state.queue),
            slots_used=state.slots.used,
            cpu_busy_ratio=self._use.busy_ratio(),
            memory_used_bytes=host.memory_used_bytes(),
            fault=self._fault(),
        )

    def _fault(self) -> str:
        """Why nothing more should be started here, if so."""
        gone = {pid for pid in self._stuck if not host.is_there(pid)}
        if gone:
            self._stuck -= gone
            self.reaper.known -= gone
            if not self._stuck:
                self.dispatch(events.StuckGone())
        if self._stuck:
            return f"processes that tasks left behind cannot be killed: {sorted(self._stuck)}"
        if self.state.unkillable:
            pids = sorted(attempt.pid for attempt in self.state.unkillable.values())
            return f"processes of tasks cannot be killed: {pids}"
        return self.store.trouble() or host.disk_trouble(self.place.state_dir)

    def _exposition(self, openmetrics: bool) -> tuple[bytes, str]:
        return self.exposition(openmetrics)

    # The end.

    def leave(self, reason: str) -> None:
        """Tell the coordinator that everything ends here now."""
        self.dispatch(events.StopOrdered(reason))
        self._report()

    async def close(self) -> None:
        """End every process of ours, and let go of everything. What runs is killed. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._is_closing = True
        for timer in (self._timer, self._sweep_timer, self._started_timer, self._report_timer):
            if timer is not None:
                timer.cancel()
        self.environments.close()
        self.templates.end_all()
        try:
            async with asyncio.timeout(_STOP_LIMIT_S):
                await self.templates.wait_gone()
                self.end_now()
                while self.reaper.sweep():  # noqa: ASYNC110 - nothing tells when a killed orphan is gone
                    await asyncio.sleep(_SWEEP_RETRY_S)
        except TimeoutError:
            self.end_now()
        self.children.close()
        self.relays.close()
        self.templates.close()
        self.poller.close()
        self.connection.close()
        self.reaper.close()

    def end_now(self) -> None:
        """SIGKILL to all that is ours, without waiting."""
        self._is_closing = True
        self.templates.kill_all()
        self.reaper.known.clear()
        self.reaper.sweep()
