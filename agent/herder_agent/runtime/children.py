"""The children that exist: what they say becomes events, in the right order.

A child's answer and its exit come over two sockets, in any order; and an answer that is a large result is stored by a
thread first. So on a child's exit its task socket is read to the end, and the exit is told only after an answer that
is being stored.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import msgspec

from herder_agent.core import events
from herder_agent.core.events import Answer, Exit
from herder_agent.launch import command, control
from herder_agent.launch.child import Capture, Child, Kind
from herder_agent.launch.control import Channel, Exited, Forked, FromChild
from herder_agent.launch.forkserver import Template
from herder_agent.launch.poller import Poller
from herder_agent.runtime.blobs import BlobStore
from herder_agent.runtime.cgroups import Groups, NoGroups
from herder_agent.runtime.limits import BLOCK_BYTES, Limits
from herder_agent.runtime.oracle import Watchdog
from herder_agent.runtime.reap import anon_bytes
from herder_shared.errors import RemoteProtocolError
from herder_shared.ids import BlobId
from herder_shared.limits import BLOB_BYTES_MAX, ERROR_TEXT_BYTES_MAX, GIB, INLINE_BYTES_MAX, KIB
from herder_shared.states import Cause
from herder_shared.wire.messages import CommandSpec, Failure, Logs, Payload, WorkloadSpec

_log = logging.getLogger("herder.agent")

#: Forked children of one template begin alike: their RssAnon is read once in so many.
_BASELINE_EVERY = 64
#: A child that runs this long gets its output read as it comes.
_ATTACH_S = 0.02
#: A task that took less cannot have touched memory worth a look.
_UNSAMPLED_S = 0.002
#: Results above it go to disk when very much waits for acknowledgement.
_SMALL_BYTES = 4 * KIB


class _Expected:
    """What was asked for and is not there yet."""

    __slots__ = ("command", "is_limited", "kind", "spec")

    def __init__(self, kind: Kind, spec: WorkloadSpec, command_spec: CommandSpec | None, is_limited: bool) -> None:
        self.kind = kind
        self.spec = spec
        self.command = command_spec
        self.is_limited = is_limited


class _Handed(NamedTuple):
    """Forked with its task, and not heard of yet."""

    template: int
    scratch: str


class Children:
    """Owns every child's descriptors."""

    def __init__(  # noqa: PLR0917
        self,
        loop: asyncio.AbstractEventLoop,
        poller: Poller,
        store: BlobStore,
        dispatch: Callable[[events.Event], None],
        is_crowded: Callable[[], bool],
        groups: Groups | None = None,
        *,
        is_busy: Callable[[int], bool],
        open_client: Callable[[int, int], None],
    ) -> None:
        self._loop = loop
        self._poller = poller
        self._store = store
        self._dispatch = dispatch
        self._is_crowded = is_crowded
        self._open_client = open_client
        self._children: dict[int, Child] = {}
        self._expected: dict[int, _Expected] = {}
        self._handed: dict[int, _Handed] = {}
        self.limits = Limits(loop, groups or NoGroups("none are asked for"), dispatch)
        self._watchdog = Watchdog(loop, is_busy, dispatch)
        self._attach: list[Child] = []
        self._attach_timer: asyncio.TimerHandle | None = None
        #: Events that wait for an answer which is being stored.
        self._storing: dict[int, list[events.Event]] = {}
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="herder-blobs")
        self._is_closed = False

    def get(self, number: int) -> Child | None:
        """The child, if it exists."""
        return self._children.get(number)

    def expect(
        self,
        number: int,
        kind: Kind,
        spec: WorkloadSpec,
        command_spec: CommandSpec | None = None,
        is_limited: bool = False,
    ) -> None:
        """A fresh interpreter or command was ordered; what is not expected is a forked child."""
        self._expected[number] = _Expected(kind, spec, command_spec, is_limited)

    def hand(self, number: int, template: int, scratch: str) -> None:
        """A child is to be forked with its task."""
        self._handed[number] = _Handed(template, scratch)

    def template_of(self, number: int) -> int:
        """Who makes or has made this child; 0 = there is none."""
        child = self._children.get(number)
        if child is not None:
            return child.template
        handed = self._handed.get(number)
        return handed.template if handed is not None else 0

    def not_forked(self, number: int) -> None:
        """What was ordered will not come."""
        self._expected.pop(number, None)
        self._handed.pop(number, None)
        self.limits.leave(number)

    def is_command(self, number: int) -> bool:
        """Whether a command was ordered under this number."""
        expected = self._expected.get(number)
        return expected is not None and expected.command is not None

    def workload_of(self, child: Child) -> WorkloadSpec | None:
        """The workload for which a fresh interpreter was ordered."""
        expected = self._expected.get(child.number)
        return expected.spec if expected is not None else None

    def forked(self, template: Template, head: Forked, descriptors: list[int]) -> Child:
        """A child is there; its descriptors are ours now."""
        expected = self._expected.get(head.child)
        kind: Kind = expected.kind if expected is not None else "fork"
        child = Child(head.child, head.pid, kind, template.number)
        self._children[head.child] = child
        if kind != "command":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptors.pop(0))
            received, closed = partial(self._said, child), partial(self._closed, child)
            # A forked one has nothing to say before it has a task.
            child.channel = Channel(
                self._loop, sock, control.from_child, received, closed, self._poller, is_watched=kind != "fork"
            )
        out, err, child.pidfd = descriptors
        if kind == "command":
            sizes = (command.OUTPUT_HEAD_BYTES, command.OUTPUT_TAIL_BYTES)
            child.stdout, child.stderr = Capture(self._loop, out, *sizes), Capture(self._loop, err, *sizes)
        else:
            child.stdout, child.stderr = Capture(self._loop, out), Capture(self._loop, err)
        if kind == "fork":
            if template.baseline_age % _BASELINE_EVERY == 0:
                template.baseline_bytes = anon_bytes(child.pid)
            template.baseline_age += 1
            child.baseline_bytes = template.baseline_bytes
        handed = self._handed.pop(head.child, None)
        if handed is not None:
            # Its task takes longer than most: from now on it is one like others.
            child.scratch = handed.scratch
            child.is_watched = True
            child.attach()
            self._watchdog.add(child)
            self.limits.begin(child, is_limited=False)
        return child

    def begin(self, child: Child, open_fresh: Callable[[], None]) -> None:
        """What follows the birth of a fresh interpreter or a command."""
        if child.kind == "fork":
            return
        self._attach_later(child)
        if child.kind == "fresh":
            open_fresh()
            return
        expected = self._expected.get(child.number)
        self.limits.begin(child, is_limited=expected is not None and expected.is_limited)

    def send_task(
        self,
        child: Child,
        head: dict[str, object],
        parts: list[bytes],
        files: list[int],
        *,
        is_limited: bool,
        reuses: bool,
        in_crowd: bool = False,
    ) -> None:
        """Give it a task. One that `reuses` has its output cut by task, when it answers.

        In a crowd of tasks that wait, one that ends with its process is heard of when the template has reaped it: one
        wake-up instead of three. If it takes longer it is listened to like any other.
        """
        child.reuses = reuses
        child.send_task(head, parts, files)
        if child.channel is not None and (reuses or not in_crowd):
            child.channel.watch()
        self.limits.begin(child, is_limited=is_limited)
        self._attach_later(child)

    def cannot_start(self, child: Child, message: str) -> None:
        """What its task needs is gone."""
        failure = Failure(Cause.DATA_LOST, message)
        self._dispatch(events.ChildAnswered(child.number, Answer(failure=failure)))
        child.stop()

    def stop(self, number: int) -> None:
        """Ask an idle child to end."""
        child = self._children.get(number)
        if child is not None:
            child.stop()

    def drop(self, number: int) -> None:
        """Its template is gone: take what it said, kill it, let go of it."""
        child = self._children.pop(number, None)
        self._expected.pop(number, None)
        handed = self._handed.pop(number, None)
        if handed is not None:
            self._remove_folder(handed.scratch)
        self.limits.leave(number)
        if child is not None:
            child.kill()
            self._remove_scratch(child)
            child.close()

    def drop_all_of(self, template: int) -> None:
        """Let go of children of a template that is gone."""
        for child in [child for child in self._children.values() if child.template == template]:
            self.drop(child.number)

    def exited(self, head: Exited) -> None:
        """The template has reaped it."""
        child = self._children.pop(head.child, None)
        expected = self._expected.pop(head.child, None)
        if child is None:
            return
        if child.channel is not None and not child.channel.is_resting:
            child.channel.drain()
        child.drain_output()
        self._remove_scratch(child)
        number = head.status & 0x7F
        exit_ = _exit_of(head)
        exit_ = self.limits.exited(child.number, exit_, number == signal.SIGKILL)
        if expected is not None and expected.command is not None:
            self._command_exited(child, expected.command, exit_)
        else:
            self._tell(child.number, events.ChildExited(child.number, exit_, child.take_logs()))
        child.close()

    def done(self, head: control.Done, body: bytes, descriptors: list[int]) -> None:
        """A child that was forked with its task is over, and nothing is left of it."""
        handed = self._handed.pop(head.child, None)
        exit_ = _exit_of(head)
        logs: Logs | None = None
        if head.out or head.err:
            middle = head.answer + head.out
            out, err = body[head.answer : middle], body[middle:]
            kept_out, kept_err = Capture.shorten(out), Capture.shorten(err)
            logs = Logs(kept_out, kept_err, len(kept_out) < len(out) or len(kept_err) < len(err))

        def tell(answer: Answer | None) -> None:
            self._dispatch(events.ChildDone(head.child, head.pid, answer, exit_, logs))

        said: FromChild | None = None
        content = b""
        try:
            for each, content_of in control.said_in(memoryview(body)[: head.answer]):
                if isinstance(each, control.Result | control.Error):
                    said, content = each, content_of
        except (RemoteProtocolError, msgspec.MsgspecError) as error:
            _log.warning("child %d broke the protocol: %s", head.pid, error)
        if isinstance(said, control.Result):
            # Before a large result's, there may be that of a client which it has not waited for.
            for fd in descriptors[:-1] if said.blob else descriptors:
                os.close(fd)
            files = descriptors[-1:] if said.blob else []
            self._give_result(head.child, _account(said, None, said.peak), content, files, tell)
            return
        for fd in descriptors:
            os.close(fd)
        if isinstance(said, control.Error):
            tell(_account(said, _failure_of(said, content), said.peak))
            return
        if handed is not None:
            self._remove_folder(handed.scratch)
        exit_ = self.limits.exited(head.child, exit_, head.status & 0x7F == signal.SIGKILL)
        tell(None)

    def _remove_scratch(self, child: Child) -> None:
        """It could not do so itself, if the folder is still there."""
        if child.scratch:
            self._remove_folder(child.scratch)

    def _remove_folder(self, scratch: str) -> None:
        if not self._is_closed and os.path.isdir(scratch):
            self._threads.submit(shutil.rmtree, scratch, ignore_errors=True)

    def close(self) -> None:
        """Let go of all."""
        self._is_closed = True
        self.limits.close()
        self._watchdog.close()
        if self._attach_timer is not None:
            self._attach_timer.cancel()
        for child in list(self._children.values()):
            child.close()
        self._children.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)

    # What children say.

    def _said(self, child: Child, head: FromChild, body: bytes, descriptors: list[int]) -> None:
        match head:
            case control.Started():
                self._dispatch(events.ChildStarted(child.number))
            case control.Result():
                child.ends = head.last
                self._answered(child, head, body, descriptors)
            case control.Error():
                child.ends = head.last
                self._tell_answer(child, self._account(child, head, _failure_of(head, body)))
            case control.Client():
                self._open_client(child.number, descriptors[0])
            case control.Idle():
                child.baseline_bytes = anon_bytes(child.pid)
                self._dispatch(events.ChildIdle(child.number, head.python, child.baseline_bytes))
            case control.Failed():
                cause = Cause(head.cause) if head.cause in set(Cause) else Cause.START_FAILED
                self._dispatch(events.ChildSetupFailed(child.number, cause, head.message, head.traceback))

    def _closed(self, child: Child, error: RemoteProtocolError | None) -> None:
        """Its end follows from its template, unless it broke the protocol: then it is made to end."""
        if error is not None:
            _log.warning("child %d is killed: %s", child.pid, error)
            child.kill()

    def _answered(self, child: Child, head: control.Result, body: bytes, descriptors: list[int]) -> None:
        answer = self._account(child, head, None)
        self._give_result(child.number, answer, body, descriptors, partial(self._tell_answer, child))

    def _give_result(
        self, number: int, answer: Answer, body: bytes, descriptors: list[int], tell: Callable[[Answer], None]
    ) -> None:
        """Tell of a result when it is where it belongs: at once, or when it is stored."""

        def stored(payload: Payload | None, error: str) -> None:
            if payload is None:
                failure = Failure(Cause.DATA_LOST, f"its result cannot be stored on this node: {error}")
                tell(Answer(failure=failure))
            else:
                tell(msgspec.structs.replace(answer, result=payload))

        if descriptors:
            fd = descriptors[0]
            size = os.fstat(fd).st_size
            if size > BLOB_BYTES_MAX:
                # A child says so itself before it comes to this, if nobody has changed its code.
                os.close(fd)
                text = f"the result takes {size / GIB:.1f} GiB; at most {BLOB_BYTES_MAX / GIB:.0f} GiB are allowed"
                tell(Answer(failure=Failure(Cause.PAYLOAD_TOO_LARGE, text)))
                return

            def store() -> BlobId:
                try:
                    return self._store.put_descriptor(fd, size)
                finally:
                    os.close(fd)

            self._store_result(number, size, store, stored)
        elif len(body) > _SMALL_BYTES and self._is_crowded():
            self._store_result(number, len(body), partial(self._store.put, body), stored)
        else:
            tell(msgspec.structs.replace(answer, result=Payload(body, None, len(body))))

    def _tell_answer(self, child: Child, answer: Answer) -> None:
        self.limits.end(child.number)
        answer = self.limits.answered(child.number, answer)
        # It has flushed, and removed its scratch folder, before it answered.
        child.scratch = ""
        child.drain_output()
        logs = child.take_logs()
        if not child.reuses and child.channel is not None:
            child.channel.rest()
        self._dispatch(events.ChildAnswered(child.number, answer, logs, child.ends))

    def _account(self, child: Child, head: control.Result | control.Error, failure: Failure | None) -> Answer:
        return _account(head, failure, self._peak(child, head))

    def _peak(self, child: Child, head: control.Result | control.Error) -> int:
        if head.wall < _UNSAMPLED_S:
            return head.peak
        return max(head.peak, anon_bytes(child.pid) - child.baseline_bytes)

    # Results that go to disk first.

    def _store_result(
        self, number: int, size: int, store: Callable[[], BlobId], then: Callable[[Payload | None, str], None]
    ) -> None:
        self._storing.setdefault(number, [])
        future = self._loop.run_in_executor(self._threads, store)

        def stored(done: asyncio.Future[BlobId]) -> None:
            waiting = self._storing.pop(number, [])
            if self._is_closed or done.cancelled():
                return
            error = done.exception()
            if error is None:
                blob = done.result()
                self._store.pin(blob)
                self._store.keep(blob, size)
                then(Payload(b"", blob, size), "")
            else:
                then(None, str(error))
            for event in waiting:
                self._dispatch(event)

        future.add_done_callback(stored)

    def _tell(self, number: int, event: events.Event) -> None:
        waiting = self._storing.get(number)
        if waiting is not None:
            waiting.append(event)
        else:
            self._dispatch(event)

    def _command_exited(self, child: Child, spec: CommandSpec, exit_: Exit) -> None:
        content, out, err, dropped = command.result(child, exit_.status)
        capture_out, capture_err = Capture.shorten(out), Capture.shorten(err)
        cut = dropped or len(capture_out) < len(out) or len(capture_err) < len(err)
        logs = Logs(capture_out, capture_err, cut) if out or err else None

        def tell(payload: Payload | None, error: str) -> None:
            if payload is None:
                _log.error("the output of a command cannot be stored: %s", error)
            self._dispatch(events.ChildExited(child.number, exit_, logs, payload, spec.check))

        if len(content) <= INLINE_BYTES_MAX:
            tell(Payload(content, None, len(content)), "")
        else:
            self._store_result(child.number, len(content), partial(self._store.put, content), tell)

    # Output.

    def _attach_later(self, child: Child) -> None:
        self._attach.append(child)
        if self._attach_timer is None:
            self._attach_timer = self._loop.call_later(_ATTACH_S, self._attach_all)

    def _attach_all(self) -> None:
        self._attach_timer = None
        young, self._attach = self._attach, []
        for child in young:
            if self._children.get(child.number) is child:
                child.attach()
                if child.is_watched:
                    self._watchdog.add(child)


def _exit_of(head: control.Exited | control.Done) -> Exit:
    """How a child ended, as its template saw it."""
    return Exit(
        head.status,
        head.utime,
        head.stime,
        head.minflt,
        head.majflt,
        read_bytes=head.inblock * BLOCK_BYTES,
        write_bytes=head.oublock * BLOCK_BYTES,
    )


def _account(head: control.Result | control.Error, failure: Failure | None, peak_bytes: int) -> Answer:
    """What a child says that its task used; its result is added where there is one."""
    return Answer(
        None,
        failure,
        head.wall,
        head.utime,
        head.stime,
        head.minflt,
        head.majflt,
        peak_bytes,
        head.inblock * BLOCK_BYTES,
        head.oublock * BLOCK_BYTES,
    )


def _failure_of(head: control.Error, body: bytes) -> Failure:
    cause = Cause(head.cause) if head.cause in set(Cause) else Cause.EXCEPTION
    return Failure(
        cause=cause,
        message=head.message[:ERROR_TEXT_BYTES_MAX],
        type_name=head.type[:1000],
        traceback=head.traceback[-ERROR_TEXT_BYTES_MAX:],
        pickled=body if 0 <= head.pickled <= INLINE_BYTES_MAX else None,
        retryable=head.retryable,
    )
