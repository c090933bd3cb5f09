"""One client's connection: a thread with an event loop, which submits in batches, reconnects, and hands events to
their jobs.

Theory of operation. User threads never touch the loop's state. They append to `_intake`, a deque, and wake the loop
once per batch; what finalizers call (`cancel`, `close_job`, `retire`) takes no lock at all, since the garbage
collector may run them anywhere, also while this very thread holds one. Only submissions and waiting take `_lock`: a
submission fixes its index, counts itself and enters the intake in one short critical section, so that the intake is in
the order of the indices.

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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec

from herder import __version__
from herder.fetches import Fetches
from herder.lifetime import register
from herder.outbox import Batch, Cancel, Close, Open, Outbox
from herder.payload import PYTHON_TAG
from herder.tracks import Sink, Track
from herder.turnstile import Patience, Turnstile
from herder_shared import errors
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
    JobSpec,
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
#: A query that is not answered in this time, connection or not, raises `Unreachable`.
QUERY_TIMEOUT_S = 30.0
#: How long the loop's thread may take to end after it was told to.
_JOIN_S = 10.0

#: In `Track.held`, which is by index: somebody asks for more of a job that was over.
_FOLLOWED = -1

Question = Callable[[int], ClientToCoordinator]


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


class Connection:
    """Thread-safe but for what is marked as the loop's. Made by `Client`, shared by its views, jobs and futures."""

    def __init__(
        self, endpoint: Endpoint, reconnect_timeout_s: float | None, disconnect_grace_s: float | None = None
    ) -> None:
        self.endpoint = endpoint
        self.is_foreign = False  # in a forked child: nothing here may be used
        #: Of a task's own client: where the task stands while it waits.
        self.turnstile: Turnstile | None = None
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
        self._is_shut = False
        self._first_link: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._last_error: HerderError | None = None
        self._thread: threading.Thread | None = None
        # The loop's.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None
        self._link: Link | None = None
        self._epoch_seen = 0
        self._tracks: dict[JobId, Track] = {}
        self._outbox = Outbox()
        self._fetches = Fetches()
        self._questions: dict[int, tuple[Question, concurrent.futures.Future[Answer]]] = {}
        self._question_count = 0
        self._ack_timer: asyncio.TimerHandle | None = None
        self._loss_timers: list[asyncio.TimerHandle] = []
        self._is_retiring = False
        self._refusal_told_s = -_REFUSAL_LOG_S

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self, timeout_s: float | None) -> None:
        """Connect, and wait until the coordinator welcomes us. None: however long that takes.

        Raises:
            Unreachable: nobody answered within `timeout_s`.
            Unauthorized, ProtocolMismatch, ConfigError: trying again would not help.
        """
        self._prepare()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="herder-client", daemon=True)
        register(self)
        self._thread.start()
        ready.wait()
        try:
            self._first_link.result(timeout_s)
        except TimeoutError:
            self.end(None)
            places = ", ".join(f"{host}:{port}" for host, port in self.endpoint.addresses)
            last = f" (last error: {self._last_error})" if self._last_error is not None else ""
            raise Unreachable(
                f"no coordinator answered at {places} ({self.endpoint.label}) within {timeout_s:g} s{last}. Is it "
                "running (`herder up`, `herder coordinator`), is the address right, does a firewall stand between?"
            ) from self._last_error
        except BaseException:
            self.end(None)
            raise

    def patience(self) -> Patience:
        """For a thread that may have to wait for tasks: to be entered without a lock, and begun before it blocks."""
        return Patience(self.turnstile)

    def check_usable(self) -> None:
        """Raises:
        RuntimeError: after shutdown.
        HerderError: in a forked child, or the connection has ended for good.
        """
        if self.is_foreign:
            raise HerderError("this client was made before a fork; make a new Client in the child process")
        if self._is_shut:
            raise RuntimeError("cannot schedule new futures after shutdown: make a new Client")
        self._check_alive()

    @property
    def is_usable(self) -> bool:
        """Whether `check_usable` would not raise."""
        return not self.is_foreign and not self._is_shut and self._error is None

    def _check_alive(self) -> None:
        if self._error is not None:
            raise _again(self._error)

    @property
    def is_in_loop(self) -> bool:
        """The caller runs in the connection's own thread (a callback of a future)."""
        return threading.current_thread() is self._thread

    def refuse_new(self) -> None:
        """From now on `check_usable` raises; what was submitted goes on."""
        self._is_shut = True

    def retire(self) -> None:
        """End as soon as everything that was submitted has ended. Takes no lock."""
        self._is_shut = True
        self._later(self._retire)

    def end(self, error: HerderError | None) -> None:
        """End now: jobs that are not detached are cancelled by the coordinator; unresolved futures get `error`, or are
        cancelled when it is None. Waits for the thread, unless it is this one."""
        if self.is_foreign:
            return
        self._is_shut = True
        self._later(partial(self._end, error))
        if self._thread is not None and not self.is_in_loop:
            self._thread.join(_JOIN_S)

    def wait_settled(self, tracks: Iterable[Track] | None = None, timeout_s: float | None = None) -> bool:
        """Wait until no task of these jobs (None: of any that is not detached) is unresolved and everything that was
        submitted is acknowledged. Whether that came to pass in time."""

        def settled() -> bool:
            if self._error is not None:
                return True
            if tracks is not None:
                return all(not track.unresolved_count for track in watched)
            return (
                not self._unacked_bytes
                and not self._feeder_count
                and not any(track.unresolved_count for track in list(self._tracks.values()) if not track.is_detached)
            )

        watched = list(tracks) if tracks is not None else []
        with self._changed:
            return self._changed.wait_for(settled, timeout_s)

    # --- what user threads ask for ------------------------------------------------------------------------------------

    def open_job(self, spec: JobSpec, sink: Sink) -> Track:
        """Begin a job."""
        self.check_usable()
        track = Track(spec.job, sink, spec)
        with self._lock:
            self._tracks[track.job] = track
        self._later(partial(self._outbox.add, Open(spec)))
        return track

    def observe_job(self, job: JobId, sink: Sink) -> Track:
        """Follow a job that somebody else submitted, or this user in another session."""
        self.check_usable()
        track = Track(job, sink, None)
        with self._lock:
            self._tracks[job] = track
        self._later(partial(self._say, Attach(job, 0)))
        return track

    def submit(self, track: Track, batch: Batch, admit: Callable[[int], None]) -> None:
        """Take the batch as the job's next tasks; `admit(first)` is called with the first one's index before any event
        of it can arrive. Waits while too much is unacknowledged.

        Raises:
            HerderError: the connection or the job is over.
        """
        with self._changed:
            self._check_alive()
            while self._unacked_bytes > UNACKED_SUBMIT_BYTES_MAX and not self.is_in_loop:
                self._changed.wait()
                self._check_alive()
            if track.error is not None:
                raise _again(track.error)
            batch.first = track.submitted_count
            track.submitted_count += len(batch.items)
            track.unresolved_count += len(batch.items)
            self._unacked_bytes += batch.size_bytes
            admit(batch.first)
            self._intake.append(batch)
        self._wake()

    @contextmanager
    def feeding(self) -> Iterator[None]:
        """While this is entered more tasks are to come: nobody may take the client for settled."""
        with self._lock:
            self._feeder_count += 1
        try:
            yield
        finally:
            with self._changed:
                self._feeder_count -= 1
                self._changed.notify_all()
            self._wake()

    def close_job(self, track: Track) -> None:
        """No more tasks come. Takes no lock."""
        self._later(partial(self._close_job, track))

    def cancel(self, job: JobId, indices: tuple[int, ...] | None, *, running: bool) -> None:
        """Ask for these tasks' end, reliably. Takes no lock."""
        self._later(partial(self._outbox.add, Cancel(job, indices, running)))

    def cancel_all(self, *, running: bool) -> None:
        """Ask for the end of every task of every job that is not detached. Takes no lock."""
        self._later(partial(self._cancel_all, running))

    @contextmanager
    def following(self, track: Track) -> Iterator[None]:
        """While this is entered the job's events are heard, also if all was said about it: more may come."""
        self._later(partial(self._follow, track))
        try:
            yield
        finally:
            self._later(partial(self._follow_no_more, track))

    def claim(self, job: JobId, index: int) -> None:
        """Keep this task's result at the coordinator until `unclaim`, or until the batch that claims it is
        acknowledged."""
        with self._lock:
            track = self._tracks.get(job)
            if track is not None:
                track.claim(index)

    def unclaim(self, claims: Iterable[tuple[JobId, int]]) -> None:
        """Give claims back."""
        self._later(partial(self._unclaim, tuple(claims)))

    def ask(self, question: Question, timeout_s: float = QUERY_TIMEOUT_S) -> Answer:
        """Ask the coordinator and wait for its answer. Asked again after a reconnection.

        Raises:
            Unreachable: no answer within `timeout_s`.
            HerderError: the answer is an error, as its class.
        """
        self.check_usable()
        if self.is_in_loop:
            raise HerderError(
                "a callback of a future cannot ask the coordinator: it runs in the connection's own thread"
            )
        answered: concurrent.futures.Future[Answer] = concurrent.futures.Future()
        self._later(partial(self._ask, question, answered))
        try:
            answer = answered.result(timeout_s)
        except TimeoutError:
            raise Unreachable(
                f"the coordinator ({self.endpoint.label}) did not answer within {timeout_s:g} s"
            ) from None
        if answer.error:
            raise error_named(answer.error, answer.message)
        return answer

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
            if track.is_observer or self._outbox.is_opened(track.job):
                link.send(Attach(track.job, track.ackable))
        for number, (question, _) in self._questions.items():
            link.send(question(number))
        self._flush()
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
                self._outbox.cancel_ok(message.job, message.indices)
            case SubmitRefused():
                self._refused(message)
            case Answer():
                _, answered = self._questions.pop(message.id, (None, None))
                if answered is not None:
                    answered.set_result(message)
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
            self._say(Attach(track.job, track.ackable))
            return
        known = track.cursor
        fresh = message.ends[known - message.cursor :]
        track.cursor += len(fresh)
        ready: list[tuple[int, TaskEnd]] = []
        for cursor, end in enumerate(fresh, start=known):
            if end.result is not None and end.result.blob is not None:
                track.held[end.index] = cursor
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
            if not track.is_observer:
                track.unresolved_count += len(message.indices)
        track.sink.reset(message.indices)

    def _fetched(self, track: Track, cursor: int, end: TaskEnd, content: bytes | None) -> None:
        track.held.pop(end.index, None)
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
            if not track.is_observer:
                track.unresolved_count = max(0, track.unresolved_count - len(ends))
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
                if track is not None and track.unclaim(index):
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
            track.unresolved_count = max(0, track.unresolved_count - (track.submitted_count - first))
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
                with self._lock:
                    del self._tracks[track.job]
                # All of it has ended, so it was accepted: the acknowledgements went down with an older connection.
                unsaid += self._outbox.forget(track.job)
        self._acknowledged(unsaid)

    def _follow(self, track: Track) -> None:
        with self._lock:
            self._tracks[track.job] = track
        track.held[_FOLLOWED] = track.cursor

    def _follow_no_more(self, track: Track) -> None:
        track.held.pop(_FOLLOWED, None)
        self._ack_soon()

    def _ask(self, question: Question, answered: concurrent.futures.Future[Answer]) -> None:
        self._question_count += 1
        self._questions[self._question_count] = (question, answered)
        self._say(question(self._question_count))

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
        for _, answered in self._questions.values():
            answered.set_exception(self._error)
        self._questions.clear()
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

    def disown(self) -> None:
        """We are in a forked child: the socket and the thread are the parent's."""
        self.is_foreign = True


def error_named(name: str, message: str) -> HerderError:
    """The error class that a coordinator named."""
    cls = getattr(errors, name, HerderError)
    if not (isinstance(cls, type) and issubclass(cls, HerderError)):
        cls = HerderError
    error: HerderError = cls(message)
    return error


def _again(error: HerderError) -> HerderError:
    """A copy to raise: one exception object raised in several threads would gather all their tracebacks."""
    copy = type(error)(*error.args)
    copy.__dict__.update(error.__dict__)
    copy.__cause__ = error.__cause__
    return copy


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
