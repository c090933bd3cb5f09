"""One client's connection, as its callers have it: submit in batches, cancel, follow, ask, wait, end.

Theory of operation. User threads never touch the loop's state, which is a `Conversation` (conversation.py) in a thread
of its own. They append to `_intake`, a deque, and wake the loop once per batch; what finalizers call (`cancel`,
`close_job`, `retire`) takes no lock at all, since the garbage collector may run them anywhere, also while this very
thread holds one. Only submissions and waiting take `_lock`: a submission fixes its index, counts itself and enters the
intake in one short critical section, so that the intake is in the order of the indices.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from herder.conversation import Conversation, Endpoint
from herder.lifetime import register
from herder.outbox import Batch, Cancel, Open
from herder.questions import Question, error_named
from herder.tracks import Sink, Track
from herder.turnstile import Patience, Turnstile
from herder_shared.errors import HerderError, Unreachable
from herder_shared.ids import JobId
from herder_shared.limits import UNACKED_SUBMIT_BYTES_MAX
from herder_shared.wire.messages import Answer, Attach, JobSpec

__all__ = ["Connection", "Endpoint"]

#: A query that is not answered in this time, connection or not, raises `Unreachable`.
QUERY_TIMEOUT_S = 30.0
#: How long the loop's thread may take to end after it was told to.
_JOIN_S = 10.0


class Connection(Conversation):
    """Thread-safe. Made by `Client`, shared by its views, jobs and futures."""

    def __init__(
        self, endpoint: Endpoint, reconnect_timeout_s: float | None, disconnect_grace_s: float | None = None
    ) -> None:
        super().__init__(endpoint, reconnect_timeout_s, disconnect_grace_s)
        #: Of a task's own client: where the task stands while it waits.
        self.turnstile: Turnstile | None = None
        self._is_shut = False
        self._thread: threading.Thread | None = None

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
        """Follow a job that somebody else submitted, or this user in another session, or this client itself: then what
        it has been told already is not told again."""
        self.check_usable()
        with self._lock:
            track = self._tracks.get(job)
            is_ours = track is not None and not track.is_observer
            if track is None or not is_ours:
                track = self._tracks[job] = Track(job, sink, None)
        self._later(partial(self._share, track, sink) if is_ours else partial(self._say, Attach(job, 0)))
        return track

    def sink_of(self, job: JobId) -> tuple[Track, Sink] | None:
        """Who follows this job here, if anybody does."""
        with self._lock:
            track = self._tracks.get(job)
        return (track, track.sink) if track is not None else None

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
            track.has_ended += bytes(len(batch.items))
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

    def disown(self) -> None:
        """We are in a forked child: the socket and the thread are the parent's."""
        self.is_foreign = True


def _again(error: HerderError) -> HerderError:
    """A copy to raise: one exception object raised in several threads would gather all their tracebacks."""
    copy = type(error)(*error.args)
    copy.__dict__.update(error.__dict__)
    copy.__cause__ = error.__cause__
    return copy
