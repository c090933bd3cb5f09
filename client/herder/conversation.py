"""What a connection's own thread does: it hears the coordinator and says what waits in the outbox.

Callers do not come here: what they ask for is `Connection` (connection.py), which puts it into `_intake`; `_turn` takes
it from there, in this thread. The link's other side is a dialler, which tries again for as long as it takes and tells
`opened`, `received` and `closed`.

Everything that must not be lost lives in the `Outbox` until acknowledged, and every submitted task is counted in its
track until its end was delivered. So after a reconnection the same three steps restore everything: attach to the known
jobs, say again what was not acknowledged, ask again for what was being fetched or queried. When the connection ends
for good, for whatever reason, each unresolved task's sink is told: nothing waits for ever on a connection that is
gone.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import getpass
import logging
import os
import secrets
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec

from herder import __version__
from herder.fetches import Fetches
from herder.outbox import Batch, Cancel, Close, Outbox
from herder.payload import PYTHON_TAG
from herder.questions import Question, Questions, error_named
from herder.tracks import Shared, Sink, Track
from herder_shared.errors import HerderError, Unreachable
from herder_shared.ids import ClusterId, Incarnation, JobId
from herder_shared.limits import PROTOCOL_VERSION, UNACKED_SUBMIT_BYTES_MAX
from herder_shared.states import Cause, Outcome
from herder_shared.tls import client_context, server_name
from herder_shared.wire.messages import (
    AckEvents,
    Answer,
    Attach,
    BlobStored,
    CancelOk,
    ClientToCoordinator,
    Failure,
    Goodbye,
    Hello,
    Message,
    NoBlob,
    Notice,
    Payload,
    PutBlob,
    SubmitOk,
    SubmitRefused,
    TaskEnd,
    TasksEnded,
    TasksReset,
    TasksStarted,
    WantBlob,
)
from herder_shared.wire.stream import Dialler, Link

_log = logging.getLogger("herder")

#: Without a connection for this long: say so, once.
SILENT_LOSS_S = 5.0
#: Acknowledgements of events are gathered for this long.
_ACK_DELAY_S = 0.05
#: ... or until there are this many of one job.
_ACK_EVENTS_MAX = 2_000
#: After a refusal which says that trying again may help.
_SUBMIT_AGAIN_S = 1.0
#: That submissions wait is told at most this often.
_REFUSAL_LOG_S = 30.0

#: In `Track.held`, which is by index: somebody asks for more of a job that was over.
_FOLLOWED = -1


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a cluster is and who we are there. `label` is for messages: the profile or the address."""

    addresses: tuple[tuple[str, int], ...]
    identity: Path
    cluster: ClusterId
    label: str


class _Dialler(Protocol):
    """What keeps a link, and tells its observer."""

    async def run(self) -> None: ...

    async def close(self) -> None: ...


class Conversation:
    """A connection as its thread has it. Callers have a `Connection`, which is one."""

    def __init__(
        self, endpoint: Endpoint, reconnect_timeout_s: float | None, disconnect_grace_s: float | None = None
    ) -> None:
        self.endpoint = endpoint
        self.is_foreign = False  # in a forked child: nothing here may be used
        self._context: ssl.SSLContext | None = None
        self._reconnect_timeout_s = reconnect_timeout_s
        self._disconnect_grace_s = disconnect_grace_s
        self._incarnation = Incarnation(secrets.token_hex(8))
        self.owner = _owner()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._intake: deque[Batch | Callable[[], None]] = deque()
        self._woken = False
        self._unacked_bytes = 0
        self._feeder_count = 0
        #: Why it is over; None while it is not.
        self._error: HerderError | None = None
        self._first_link: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._last_error: HerderError | None = None
        # The loop's.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None
        self._link: Link | None = None
        self._epoch_seen = 0
        self._tracks: dict[JobId, Track] = {}
        self._outbox = Outbox()
        self._fetches = Fetches()
        self._questions = Questions()
        self._ack_timer: asyncio.TimerHandle | None = None
        self._loss_timers: list[asyncio.TimerHandle] = []
        self._is_retiring = False
        self._refusal_told_s = -_REFUSAL_LOG_S

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _later(self, work: Callable[[], None]) -> None:
        if self._error is not None or self.is_foreign:
            return
        self._intake.append(work)
        self._wake()

    def _wake(self) -> None:
        if self._woken:
            return
        self._woken = True
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(self._turn)
            except RuntimeError:
                pass  # the loop has ended; `_finish` resolves whatever the intake holds

    def _prepare(self) -> None:
        self._context = client_context(self.endpoint.identity)

    def _make_dialler(self) -> _Dialler:
        assert self._context is not None
        return Dialler(
            addresses=self.endpoint.addresses,
            context=self._context,
            server_name=server_name(self.endpoint.cluster),
            hello=self._hello,
            observer=self,
            failing=self._failing,
        )

    def _run(self, ready: threading.Event) -> None:
        error: HerderError | None = None
        try:
            asyncio.run(self._serve(ready))
        except BaseException as bug:  # noqa: BLE001 - the loop's top: whatever it was, nobody may wait for ever
            _log.exception("the connection's thread failed")
            error = HerderError(f"the connection's thread failed: {type(bug).__name__}: {bug}")
            error.__cause__ = bug
        finally:
            self._finish(error)
            ready.set()

    async def _serve(self, ready: threading.Event) -> None:
        self._ending = asyncio.Event()
        dialler = self._make_dialler()
        self._loop = asyncio.get_running_loop()
        self._start_loss_timers()
        ready.set()
        self._turn()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._dial(dialler))
            await self._ending.wait()
            await dialler.close()
        for timer in self._loss_timers:
            timer.cancel()

    async def _dial(self, dialler: _Dialler) -> None:
        try:
            await dialler.run()
        except HerderError as error:
            self._end(error)

    def _hello(self) -> Hello:
        return Hello(
            protocol=PROTOCOL_VERSION,
            cluster=self.endpoint.cluster,
            incarnation=self._incarnation,
            version=__version__,
            epoch_seen=self._epoch_seen,
            owner=self.owner,
            python=PYTHON_TAG,
            disconnect_grace_s=self._disconnect_grace_s,
        )

    def _turn(self) -> None:
        """Take in everything that user threads left, then say it in as few messages as possible."""
        self._woken = False
        intake = self._intake
        while intake:
            work = intake.popleft()
            if isinstance(work, Batch):
                self._outbox.add(work)
            else:
                work()
        self._flush()
        self._retire_if_done()

    def _flush(self) -> None:
        if self._link is not None:
            for message in self._outbox.pump():
                self._link.send(message)
            for message in self._fetches.pump():
                self._link.send(message)

    def _say(self, message: ClientToCoordinator) -> None:
        if self._link is not None:
            self._link.send(message)

    # --- what the link reports ----------------------------------------------------------------------------------------

    def opened(self, link: Link) -> None:
        """LinkObserver: restore everything on a new link."""
        self._link = link
        self._epoch_seen = max(self._epoch_seen, link.epoch)
        for timer in self._loss_timers:
            timer.cancel()
        self._loss_timers.clear()
        if not self._first_link.done():
            self._first_link.set_result(None)
        for track in self._tracks.values():
            # Of a job that takes no more tasks nothing more is said, but those that it took have not all ended.
            is_known = track.is_observer or track.is_settled or track.error is not None
            if is_known or self._outbox.is_opened(track.job):
                link.send(Attach(track.job, track.wanted_from))
        self._flush()
        for question in self._questions.again():
            link.send(question)
        self._ack_soon()

    def closed(self, link: Link, error: HerderError | None) -> None:
        """LinkObserver: the dialler tries again; we wait with it, as long as the user allows."""
        if self._link is not link:
            return
        self._link = None
        self._last_error = error or self._last_error
        self._outbox.rewind()
        self._fetches.rewind()
        if self._ending is not None and not self._ending.is_set():
            self._start_loss_timers()

    def received(self, link: Link, messages: list[Message]) -> None:
        """LinkObserver: everything that arrived together."""
        if link is not self._link:
            return
        for message in messages:
            self._receive(message)
        self._flush()

    def _receive(self, message: Message) -> None:
        match message:
            case TasksEnded():
                self._tasks_ended(message)
            case TasksReset():
                self._tasks_reset(message)
            case TasksStarted():
                track = self._tracks.get(message.job)
                if track is not None:
                    track.sink.started(message.tasks)
            case SubmitOk():
                self._acknowledged(self._outbox.submit_ok(message.job, message.upto))
            case CancelOk():
                self._outbox.cancel_ok(message.job, message.indices, message.running)
            case SubmitRefused():
                self._refused(message)
            case Answer():
                self._questions.answered(message)
            case Notice():
                _log.log(logging.WARNING if message.level == "warning" else logging.INFO, "%s", message.text)
            case PutBlob():
                for answer in self._fetches.received(message):
                    self._say(answer)
            case NoBlob():
                self._fetches.missing(message.id)
            case BlobStored():
                self._outbox.blob_stored(message.id, message.upto)
            case WantBlob():
                self._outbox.blob_wanted(message.id, message.offset)
            case _:
                pass  # of a newer minor version, or the session's own

    # --- events of jobs -----------------------------------------------------------------------------------------------

    def _tasks_ended(self, message: TasksEnded) -> None:
        track = self._tracks.get(message.job)
        if track is None:
            return
        if message.cursor > track.cursor:
            # A gap: events of an attachment that this link has not made yet. Asked for again from where we are.
            self._say(Attach(track.job, track.wanted_from))
            return
        known = track.cursor
        fresh = message.ends[known - message.cursor :]
        track.cursor += len(fresh)
        ready: list[tuple[int, TaskEnd]] = []
        for cursor, end in enumerate(fresh, start=known):
            if end.result is not None and end.result.blob is not None:
                track.held[end.index] = cursor
                track.fetching.add(end.index)
                self._fetches.want(end.result.blob, partial(self._fetched, track, cursor, end))
            else:
                ready.append((cursor, end))
        if ready:
            self._deliver(track, ready)
        if track.cursor - track.acked >= _ACK_EVENTS_MAX and track.ackable > track.acked:
            self._ack()
        else:
            self._ack_soon()

    def _tasks_reset(self, message: TasksReset) -> None:
        track = self._tracks.get(message.job)
        if track is None:
            return
        with self._lock:
            track.resolve(message.indices, ended=False)
        track.sink.reset(message.indices)

    def _fetched(self, track: Track, cursor: int, end: TaskEnd, content: bytes | None) -> None:
        track.held.pop(end.index, None)
        track.fetching.discard(end.index)
        if content is not None:
            end = msgspec.structs.replace(end, result=Payload(inline=content, size_bytes=len(content)))
        else:
            lost = Failure(Cause.DATA_LOST, "the task's result was forgotten by the cluster before it could be fetched")
            end = msgspec.structs.replace(end, outcome=Outcome.LOST, result=None, failure=lost)
        self._deliver(track, [(cursor, end)])
        self._ack_soon()

    def _deliver(self, track: Track, ends: list[tuple[int, TaskEnd]]) -> None:
        track.sink.ended([end for _, end in ends])
        with self._changed:
            if track.claims:
                for cursor, end in ends:
                    if end.index in track.claims:
                        track.held[end.index] = cursor
            track.resolve((end.index for _, end in ends), ended=True)
            if not track.unresolved_count:
                self._changed.notify_all()
        self._retire_if_done()

    def _acknowledged(self, batches: list[Batch]) -> None:
        if not batches:
            return
        claims = [claim for batch in batches for claim in batch.claims]
        with self._changed:
            before = self._unacked_bytes
            self._unacked_bytes -= sum(batch.size_bytes for batch in batches)
            if not self._unacked_bytes or before > UNACKED_SUBMIT_BYTES_MAX >= self._unacked_bytes:
                self._changed.notify_all()
        self._unclaim(claims)
        self._retire_if_done()

    def _unclaim(self, claims: Iterable[tuple[JobId, int]]) -> None:
        released = False
        with self._lock:
            for job, index in claims:
                track = self._tracks.get(job)
                if track is not None and track.unclaim(index) and index not in track.fetching:
                    released |= track.held.pop(index, None) is not None
        if released:
            self._ack_soon()

    def _refused(self, message: SubmitRefused) -> None:
        track = self._tracks.get(message.job)
        if track is None:
            return
        if track.refused_from is not None and message.first >= track.refused_from:
            return  # it followed on what is to be submitted again, and will be with it; so does a close
        if message.again:
            assert self._loop is not None
            if self._loop.time() >= self._refusal_told_s + _REFUSAL_LOG_S:
                self._refusal_told_s = self._loop.time()
                _log.warning("what was submitted waits, and is sent again: %s", message.message)
            track.refused_from = message.first
            self._loop.call_later(_SUBMIT_AGAIN_S, self._submit_again, track)
            return
        error = error_named(message.error, message.message)
        dropped = self._outbox.forget(message.job)
        first = min([message.first, *(batch.first for batch in dropped)])
        with self._changed:
            track.error = error
            track.resolve(range(first, track.submitted_count), ended=True)
            track.closed_count = track.submitted_count
            self._changed.notify_all()
        self._acknowledged(dropped)
        track.sink.lost(first, error)
        self._ack_soon()
        self._retire_if_done()

    def _submit_again(self, track: Track) -> None:
        track.refused_from = None
        self._outbox.rewind()
        self._flush()

    def _close_job(self, track: Track) -> None:
        if track.closed_count is None and track.error is None:
            track.closed_count = track.submitted_count
            self._outbox.add(Close(track.job, track.closed_count))
        self._ack_soon()

    def _cancel_all(self, running: bool) -> None:
        for track in list(self._tracks.values()):
            if track.unresolved_count and not track.is_detached and not track.is_observer:
                self._outbox.add(Cancel(track.job, None, running))

    def _ack_soon(self) -> None:
        if self._ack_timer is None and self._loop is not None:
            self._ack_timer = self._loop.call_later(_ACK_DELAY_S, self._ack)

    def _ack(self) -> None:
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        if self._link is None:
            return  # `opened` sees to it
        self._flush()
        unsaid: list[Batch] = []
        for track in list(self._tracks.values()):
            ackable = track.ackable
            if ackable != track.acked:
                track.acked = ackable
                self._link.send(AckEvents(track.job, ackable))
            if track.is_over:
                track.is_settled = True
                with self._lock:
                    del self._tracks[track.job]
                # All of it has ended, so it was accepted: the acknowledgements went down with an older connection.
                unsaid += self._outbox.forget(track.job)
        self._acknowledged(unsaid)

    def _share(self, track: Track, sink: Sink) -> None:
        """Another one follows a job of ours: from its beginning, if all of it is kept for anybody, else from now on."""
        has_begun_anew = track.is_detached and track.error is None
        if not has_begun_anew:
            sink.miss(sorted(track.sink.ended_among(track.submitted_count)))
        if track.error is not None:
            sink.lost(0, track.error)
        track.sink = Shared(track.sink, sink)
        if has_begun_anew and track.cursor:
            track.cursor = 0
            self._say(Attach(track.job, 0))

    def _follow(self, track: Track) -> None:
        with self._lock:
            self._tracks[track.job] = track
        track.held[_FOLLOWED] = track.cursor
        if track.is_settled:  # nothing was asked about it on this link
            self._say(Attach(track.job, track.wanted_from))

    def _follow_no_more(self, track: Track) -> None:
        track.held.pop(_FOLLOWED, None)
        self._ack_soon()

    def _ask(self, question: Question, answered: concurrent.futures.Future[Answer]) -> None:
        self._flush()  # it may be about what was submitted before it
        self._say(self._questions.ask(question, answered))

    # --- loss and end -------------------------------------------------------------------------------------------------

    def _failing(self, error: HerderError, _away_s: float) -> None:
        self._last_error = error

    def _start_loss_timers(self) -> None:
        assert self._loop is not None
        self._loss_timers = [self._loop.call_later(SILENT_LOSS_S, self._warn)]
        if self._reconnect_timeout_s is not None and self._first_link.done():
            self._loss_timers.append(self._loop.call_later(self._reconnect_timeout_s, self._give_up))

    def _warn(self) -> None:
        _log.warning(
            "no connection with the coordinator (%s) for %g s: %s; trying on",
            self.endpoint.label,
            SILENT_LOSS_S,
            self._last_error or "it does not answer",
        )

    def _give_up(self) -> None:
        self._end(
            Unreachable(
                f"no connection with the coordinator ({self.endpoint.label}) for {self._reconnect_timeout_s:g} s "
                f"(reconnect_timeout): {self._last_error or 'it does not answer'}. What became of the tasks is "
                "unknown; when it is back, `herder jobs` shows them"
            )
        )

    def _retire(self) -> None:
        self._is_retiring = True
        self._retire_if_done()

    def _retire_if_done(self) -> None:
        if not self._is_retiring or self._intake or self._unacked_bytes or self._feeder_count:
            return
        if not any(track.unresolved_count for track in self._tracks.values() if not track.is_detached):
            self._end(None)

    def _end(self, error: HerderError | None) -> None:
        if self._ending is None or self._ending.is_set():
            return
        if self._link is not None:
            self._flush()
            self._ack()
            self._say(Goodbye())
        self._fail(error)
        self._ending.set()

    def _fail(self, error: HerderError | None) -> None:
        """Nothing more will be heard: tell everybody who waits."""
        with self._changed:
            if self._error is not None:
                return
            self._error = error or HerderError("this client was shut down: make a new Client")
            tracks = list(self._tracks.values())
            self._tracks.clear()
            for track in tracks:
                track.unresolved_count = 0
            self._unacked_bytes = 0
            self._changed.notify_all()
        for track in tracks:
            track.sink.lost(0, _detached(track) if error is None and track.is_detached else error)
        self._questions.give_up(self._error)
        if not self._first_link.done():
            self._first_link.set_exception(self._error)

    def _finish(self, error: HerderError | None) -> None:
        """The thread ends. What entered the intake too late was counted in a track that `_fail` has told, or will
        be."""
        self._fail(error)
        while self._intake:
            work = self._intake.popleft()
            if isinstance(work, partial) and work.func == self._ask:
                work.args[1].set_exception(self._error)
        self._link = None


def _detached(track: Track) -> HerderError:
    return HerderError(
        f"this client was shut down while the detached job {track.job} goes on: client.job({track.job!r}) finds it"
    )


def _owner() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no entry for this uid, as in many containers
        user = f"uid{os.getuid()}"
    return f"{user}@{socket.gethostname()}"
