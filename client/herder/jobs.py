"""Job: the tasks of one `array`, and of one `map`; fed lazily, kept compactly, with a `Future` only where one is asked
for.

Theory of operation. A *feeder* (the caller's thread or one of its own) pickles arguments into batches; the
connection's back-pressure stops it when too much is unacknowledged. A `Record` gets the events: a task's end is kept
encoded, some hundred bytes, until it is asked for by index. What runs in user threads waits on the record's condition.
"""

from __future__ import annotations

import threading
import time
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from herder.futures import Future, error_for, guard
from herder.options import Options
from herder.outcomes import Kind, TaskLogs, is_cancelled, logs_of, outcome_of
from herder.turnstile import Patience
from herder_shared.errors import DataLost, HerderError, JobNotFound
from herder_shared.ids import task_id
from herder_shared.states import Outcome
from herder_shared.wire.messages import ChangeJob, Query, RetryFailed, TaskEnd

if TYPE_CHECKING:
    from herder.connection import Connection
    from herder.explaining import Explanation
    from herder.tracks import Track
    from herder_shared.ids import NodeName
    from herder_shared.wire.messages import JobInfo, TaskInfo

_encode_end = msgspec.msgpack.Encoder().encode
_decode_end = msgspec.msgpack.Decoder(TaskEnd).decode


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a job is. `total` is None while the iterables are still being consumed."""

    total: int | None
    submitted: int
    running: int
    succeeded: int
    failed: int
    cancelled: int

    @property
    def ended(self) -> int:
        """Tasks that have ended, however."""
        return self.succeeded + self.failed + self.cancelled

    @property
    def pending(self) -> int:
        """Tasks that were submitted and neither run nor have ended."""
        return max(0, self.submitted - self.ended - self.running)


class Record:
    """The sink of an array job. Everything is guarded by `changed`, on which all who wait for it wait."""

    def __init__(self, kind: Kind) -> None:
        self.kind: Kind = kind
        self.changed = threading.Condition()
        self.submitted_count = 0
        #: How many there are in all; None while they are being fed.
        self.total: int | None = None
        #: What ended the feeding early: the iterable's own exception, or one of ours.
        self.feed_error: BaseException | None = None
        #: Nobody wants more tasks: feeding is to stop, and what was fed to be cancelled, running tasks too if so said.
        self.is_stopped = False
        self.stops_running = False
        self.order = array("Q")
        self.running: set[int] = set()
        self.outcome_counts: dict[Outcome, int] = dict.fromkeys(Outcome, 0)
        self._ends: dict[int, bytes] = {}
        #: Tasks that ended without a word from the coordinator: None = cancelled.
        self._local: dict[int, BaseException | None] = {}
        self._lost_from: int | None = None
        self._lost_error: HerderError | None = None
        self._futures: weakref.WeakValueDictionary[int, Future[Any]] = weakref.WeakValueDictionary()
        #: One for each `Job` that shows it.
        self._holders: list[None] = []
        self._is_abandoned = False

    # --- the connection's side ----------------------------------------------------------------------------------------

    def started(self, tasks: Sequence[tuple[int, NodeName]]) -> None:
        """Sink."""
        with self.changed:
            self.running.update(index for index, _ in tasks if not self._has_ended(index))
            futures = [self._futures.get(index) for index, _ in tasks] if self._futures else []
        for future in futures:
            if future is not None:
                future.start()

    def ended(self, ends: Sequence[TaskEnd]) -> None:
        """Sink."""
        told: list[tuple[Future[Any], TaskEnd]] = []
        with self.changed:
            for end in ends:
                self.running.discard(end.index)
                if end.index in self._local:
                    continue
                if end.index in self._ends:
                    self._reset((end.index,))
                self.outcome_counts[Outcome.CANCELLED if is_cancelled(end) else end.outcome] += 1
                self.order.append(end.index)
                if not self._is_abandoned:
                    self._ends[end.index] = _encode_end(end)
                if self._futures and (future := self._futures.get(end.index)) is not None:
                    told.append((future, end))
            self.changed.notify_all()
        for future, end in told:
            guard(future.finish, end)

    def reset(self, indices: Sequence[int]) -> None:
        """Sink."""
        with self.changed:
            self._reset(indices)
            self.changed.notify_all()

    def _reset(self, indices: Sequence[int]) -> None:
        anew = {index for index in indices if index in self._ends}
        for index in anew:
            end = _decode_end(self._ends.pop(index))
            self.outcome_counts[Outcome.CANCELLED if is_cancelled(end) else end.outcome] -= 1
            self._futures.pop(index, None)
        if anew:
            self.order = array("Q", (index for index in self.order if index not in anew))

    def lost(self, first: int, error: HerderError | None) -> None:
        """Sink."""
        with self.changed:
            self._lost_from, self._lost_error = first, error
            self.running.clear()
            futures = [
                each for each in self._futures.values() if each.index >= first and not self._has_ended(each.index)
            ]
            self.changed.notify_all()
        for future in futures:
            if error is None:
                guard(future.abandon)
            else:
                guard(future.fail, error_for(error, future.task_id))

    @property
    def is_wanted(self) -> bool:
        """Sink."""
        return not self._is_abandoned

    def ended_among(self, count: int) -> set[int]:  # noqa: ARG002  # all that ended
        """Sink."""
        with self.changed:
            return set(self.order)

    def miss(self, indices: Iterable[int]) -> None:
        """Sink."""
        text = "its result went to this client's own future, or to its own Job: ask that"
        failed: list[tuple[Future[Any], DataLost]] = []
        with self.changed:
            for index in indices:
                self._local[index] = error = DataLost(text)
                self.outcome_counts[Outcome.LOST] += 1
                self.order.append(index)
                future = self._futures.get(index)
                if future is not None:
                    failed.append((future, error))
            self.changed.notify_all()
        for future, error in failed:
            guard(future.fail, error)

    # --- the feeder's side --------------------------------------------------------------------------------------------

    def end_locally(self, index: int, error: BaseException | None) -> None:
        """This task ends here, whatever the coordinator will say of it. None: it is cancelled."""
        with self.changed:
            self._local[index] = error
            self.outcome_counts[Outcome.CANCELLED if error is None else Outcome.FAILED] += 1
            self.order.append(index)
            self.changed.notify_all()

    def fed(self, error: BaseException | None) -> None:
        """All tasks were submitted, or feeding ended early."""
        with self.changed:
            self.total = self.submitted_count
            self.feed_error = error
            self.changed.notify_all()

    # --- the user's side ----------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """One more shows it."""
        self._holders.append(None)

    def let_go(self) -> None:
        """One less. Takes no lock: the garbage collector calls it."""
        self._holders.pop()
        if not self._holders:
            self.abandon()

    @property
    def is_held(self) -> bool:
        """Whether it shows all there is, and somebody has it."""
        return bool(self._holders) and not self._is_abandoned

    def abandon(self) -> None:
        """Nobody will ask for results any more. Takes no lock: the garbage collector calls it."""
        self._is_abandoned = True
        self._ends.clear()

    def stop(self, *, running: bool) -> None:
        """Feed no more. Takes no lock."""
        self.is_stopped, self.stops_running = True, running

    def has_ended(self, index: int) -> bool:
        """Whether how it ended is known here, or will never be. `changed` is held."""
        return self._has_ended(index) or (self._lost_from is not None and index >= self._lost_from)

    def is_over(self) -> bool:
        """All tasks have ended and no more will come. `changed` is held."""
        if self._lost_from is not None:
            return True
        return self.total is not None and len(self.order) >= self.total

    def outcome(self, index: int, track: Track, *, forget: bool = False) -> tuple[Any, BaseException | None, bool]:
        """`(value, error, is_cancelled)` of a task that has ended. `forget`: it will not be asked for again.

        `changed` must not be held: this unpickles, which runs the task's code.
        """
        if index in self._local:
            error = self._local[index]
            return None, error, error is None
        encoded = self._ends.pop(index, None) if forget else self._ends.get(index)
        if encoded is None:
            if self._lost_error is not None:
                return None, error_for(self._lost_error, task_id(track.job, index)), False
            return None, None, True
        end = _decode_end(encoded)
        if is_cancelled(end):
            return None, None, True
        value, error = outcome_of(end, track.job, self.kind)
        return value, error, False

    def end_of(self, index: int) -> TaskEnd | None:
        """The record of a task's end, where there is one."""
        encoded = self._ends.get(index)
        return _decode_end(encoded) if encoded is not None else None

    def future(self, index: int, make: Callable[[], Future[Any]]) -> Future[Any]:
        """The one future of this task."""
        with self.changed:
            future = self._futures.get(index)
            if future is not None:
                return future
            future = make()
            future.index = index
            self._futures[index] = future
            end = self.end_of(index)
            local = self._local.get(index, False)
            is_running = index in self.running
            lost = self.has_ended(index) and end is None
        if end is not None:
            future.finish(end)
        elif isinstance(local, BaseException):
            future.fail(local)
        elif lost and self._lost_error is not None and local is False:
            future.fail(error_for(self._lost_error, future.task_id))
        elif lost:
            future.abandon()
        elif is_running:
            future.start()
        return future

    def progress(self) -> JobProgress:
        """Counts as of now."""
        counts = self.outcome_counts
        bad = sum(counts[each] for each in Outcome if each not in (Outcome.SUCCEEDED, Outcome.CANCELLED))
        return JobProgress(
            self.total,
            self.submitted_count,
            len(self.running),
            counts[Outcome.SUCCEEDED],
            bad,
            counts[Outcome.CANCELLED],
        )

    def _has_ended(self, index: int) -> bool:
        return index in self._ends or index in self._local


class MapResults(Iterator[Any]):
    """What `map` returns: the results in order. Closing it, dropping it, or an exception cancels what has not
    started."""

    def __init__(
        self,
        connection: Connection,
        track: Track,
        record: Record,
        deadline_s: float | None,
        feed_one: Callable[[], None] | None,
    ) -> None:
        self._connection = connection
        self._track = track
        self._record = record
        self._deadline_s = deadline_s
        self._feed_one = feed_one
        self._next = 0
        self._is_closed = False

    def __iter__(self) -> MapResults:
        return self

    def __next__(self) -> Any:
        if self._is_closed:
            raise StopIteration
        try:
            if self._feed_one is not None:
                self._feed_one()
            value, error, cancelled = self._wait_next()
        except BaseException:
            self.close()
            raise
        self._next += 1
        if cancelled:
            self.close()
            from concurrent.futures import CancelledError

            raise CancelledError
        if error is not None:
            self.close()
            try:
                raise error
            finally:
                del error  # or the traceback would keep this frame, and the frame the exception
        return value

    def close(self) -> None:
        """Cancel what has not started. Takes no lock: the garbage collector may call it."""
        if self._is_closed:
            return
        self._is_closed = True
        record = self._record
        record.stop(running=False)
        if record.total is None or len(record.order) < record.total:
            self._connection.close_job(self._track)
            self._connection.cancel(self._track.job, None, running=False)
        record.abandon()

    __del__ = close

    def _wait_next(self) -> tuple[Any, BaseException | None, bool]:
        index, record = self._next, self._record
        with self._connection.patience() as patience, record.changed:
            while not record.has_ended(index):
                if record.total is not None and index >= record.total:
                    raise StopIteration
                _wait(record.changed, self._deadline_s, self._connection, patience)
            if index >= record.submitted_count:
                raise StopIteration
        return record.outcome(index, self._track, forget=True)


class Job:
    """The tasks of one `array` (or of `client.job(id)`). Results are kept here until the job is dropped."""

    def __init__(
        self, connection: Connection, track: Track, record: Record, name: str, *, cancel_running: bool
    ) -> None:
        self._connection = connection
        self._track = track
        self._record = record
        self._cancel_running = cancel_running
        self.name = name
        record.hold()
        weakref.finalize(self, record.let_go).atexit = False

    @property
    def id(self) -> str:
        """16 hex digits."""
        return self._track.job

    def __len__(self) -> int:
        """How many tasks there are; as many as were submitted, while the iterables are still consumed."""
        return self._record.submitted_count

    def __repr__(self) -> str:
        progress = self.progress()
        total = "?" if progress.total is None else progress.total
        return f"<herder.Job {self.id} {self.name!r}: {progress.ended} of {total} ended>"

    def progress(self) -> JobProgress:
        """Counts as of now, without asking anybody."""
        with self._record.changed:
            return self._record.progress()

    def status(self) -> JobInfo:
        """The job as the coordinator sees it now.

        Raises:
            JobNotFound: it was forgotten.
            Unreachable: no answer.
        """
        job = self._track.job
        answer = self._connection.ask(lambda number: Query(number, "job", job))
        if not answer.jobs:
            raise JobNotFound(f"there is no job {job}, or it has been forgotten")
        return answer.jobs[0]

    def tasks(self) -> tuple[TaskInfo, ...]:
        """The job's tasks as the coordinator sees them now. Raises as `status`."""
        job = self._track.job
        return self._connection.ask(lambda number: Query(number, "tasks", job)).tasks or ()

    def logs(self, index: int) -> TaskLogs:
        """What one task has written. Raises as `status`."""
        end = self._record.end_of(index)
        if end is not None and end.logs is not None:
            return logs_of(end.logs)
        job = self._track.job
        answer = self._connection.ask(lambda number: Query(number, "logs", job, index))
        return logs_of(answer.logs) if answer.logs is not None else TaskLogs()

    def future(self, index: int) -> Future[Any]:
        """The future of one task.

        Raises:
            IndexError: there is no such task.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"job {self.id} has {len(self)} tasks, there is none of index {index}")
        return self._record.future(index, self._new_future)

    def results(self, timeout: float | None = None) -> Iterator[Any]:
        """Results in the order of the index; raises the first failure when it is reached. `timeout` counts from the
        call.

        Raises:
            TimeoutError: the next result was not there in time.
            CancelledError: the task was cancelled.
        """
        deadline_s = None if timeout is None else time.monotonic() + timeout
        return self._results(deadline_s)

    def _results(self, deadline_s: float | None) -> Iterator[Any]:
        record = self._record
        index = 0
        while self._wait_for(index, deadline_s):
            value, error, cancelled = record.outcome(index, self._track)
            if cancelled:
                from concurrent.futures import CancelledError

                raise CancelledError
            if error is not None:
                raise error
            yield value
            del value
            index += 1
        if record.feed_error is not None:
            raise record.feed_error

    def as_completed(self, timeout: float | None = None) -> Iterator[Future[Any]]:
        """Futures, each with its `.index`, in the order in which the tasks end.

        Raises:
            TimeoutError: nothing ended in time; it counts from the call.
        """
        deadline_s = None if timeout is None else time.monotonic() + timeout
        return self._as_completed(deadline_s)

    def _as_completed(self, deadline_s: float | None) -> Iterator[Future[Any]]:
        record = self._record
        seen = 0
        while True:
            with self._connection.patience() as patience, record.changed:
                while seen >= len(record.order) and not record.is_over():
                    _wait(record.changed, deadline_s, self._connection, patience)
                index = record.order[seen] if seen < len(record.order) else None
            if index is None:
                break
            seen += 1
            yield self.future(index)
        ended = set(record.order)
        for index in range(record.submitted_count):
            if index not in ended:
                yield self.future(index)
        if record.feed_error is not None:
            raise record.feed_error

    def wait(self, timeout: float | None = None, progress: bool = False) -> bool:
        """Wait until every task has ended; whether that came to pass within `timeout` seconds. Never raises for a
        failed task.

        `progress` draws a bar, in a terminal or a notebook.

        Raises:
            Exception: what one of the iterables raised, or the error of an argument that could not be sent.
        """
        deadline_s = None if timeout is None else time.monotonic() + timeout
        over = self._wait_with_bar(deadline_s) if progress else self._wait_over(deadline_s)
        if over and self._record.feed_error is not None:
            raise self._record.feed_error
        return over

    def cancel(self) -> None:
        """End every task that has not ended. Never blocks."""
        if self._connection.is_foreign:
            self._connection.check_usable()
        self._record.stop(running=self._cancel_running)
        self._connection.cancel(self._track.job, None, running=self._cancel_running)

    def retry_failed(self) -> int:
        """Run the tasks again that did not succeed and were not cancelled, dependants of failed ones included, with
        their retries as at first. How many; 0 if none has failed. `wait`, `results` and `failures` then tell of the new
        ends; futures and iterators made before do not.

        The coordinator keeps what it takes while the client that submitted the job is there, and of detached jobs;
        tasks that may run at most once are not run again where nobody knows how they ended.

        Raises:
            JobNotFound: it was forgotten.
            Unauthorized: it is somebody else's.
            HerderError: it was cancelled.
            Unreachable: no answer, and so not known.
        """
        job = self._track.job
        with self._connection.following(self._track):
            answer = self._connection.ask(lambda number: RetryFailed(number, job))
        return answer.count or 0

    def pause(self) -> None:
        """Start no more of its tasks until `resume`; those that run go on. Survives restarts. Raises as `status`."""
        self._change(paused=True)

    def resume(self) -> None:
        """Take a `pause` back. Raises as `status`."""
        self._change(paused=False)

    def set_priority(self, priority: int) -> None:
        """From now on its tasks go before all of a lower priority. Raises as `status`.

        Raises:
            TypeError, ValueError: that is no priority.
        """
        Options().with_given({"priority": priority})
        self._change(priority=priority)

    def _change(self, *, paused: bool | None = None, priority: int | None = None) -> None:
        job = self._track.job
        self._connection.ask(lambda number: ChangeJob(number, job, paused, priority))

    def explain(self, index: int) -> Explanation:
        """Why a task waits, runs where it runs, or ended as it did; `str()` of it is text. Raises as `status`."""
        from herder.explaining import ask

        return ask(self._connection, self._track.job, index)

    def failures(self) -> dict[int, BaseException]:
        """Why tasks failed, by index, of those that have ended by now. Cancelled ones are not among them."""
        record = self._record
        found: dict[int, BaseException] = {}
        with record.changed:
            indices = sorted(record.order)
        for index in indices:
            end = record.end_of(index)
            if end is not None and end.outcome is Outcome.SUCCEEDED:
                continue
            _, error, _ = record.outcome(index, self._track)
            if error is not None:
                found[index] = error
        return found

    # --- inside -------------------------------------------------------------------------------------------------------

    def _new_future(self) -> Future[Any]:
        return Future(self._connection, self._track, self._record.kind, cancel_running=self._cancel_running)

    def _wait_for(self, index: int, deadline_s: float | None) -> bool:
        """Wait until this task has ended. False: there is no such task."""
        record = self._record
        with self._connection.patience() as patience, record.changed:
            while not record.has_ended(index):
                if record.total is not None and index >= record.total:
                    return False
                _wait(record.changed, deadline_s, self._connection, patience)
            return index < record.submitted_count

    def _wait_over(self, deadline_s: float | None) -> bool:
        record = self._record
        with self._connection.patience() as patience, record.changed:
            while not record.is_over():
                try:
                    _wait(record.changed, deadline_s, self._connection, patience)
                except TimeoutError:
                    return False
        return True

    def _wait_with_bar(self, deadline_s: float | None) -> bool:
        from herder.progress import progress_bar

        with progress_bar(self.name) as show:
            while True:
                step_s = time.monotonic() + 0.1
                until_s = step_s if deadline_s is None else min(step_s, deadline_s)
                over = self._wait_over(until_s)
                show(self.progress())
                if over or (deadline_s is not None and time.monotonic() >= deadline_s):
                    return over


def _wait(changed: threading.Condition, deadline_s: float | None, connection: Connection, patience: Patience) -> None:
    if connection.is_foreign:
        connection.check_usable()
    if connection.is_in_loop:
        raise HerderError("a callback of a future cannot wait for a job: it runs in the connection's own thread")
    left_s = None if deadline_s is None else deadline_s - time.monotonic()
    if left_s is not None and left_s <= 0:
        raise TimeoutError
    patience.begin()
    changed.wait(left_s)
