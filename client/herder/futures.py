"""Future: one task, as `submit` returns it; and the sink of a job's one-by-one submissions.

A result stays pickled until somebody asks for it, and is unpickled in the thread that does: unpickling runs the task's
code and imports its modules, which must neither block the connection nor wait for a lock that the asking thread holds.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from herder.outcomes import Kind, TaskLogs, TaskUsage, is_cancelled, logs_of, outcome_of, usage_of
from herder.turnstile import Patience, Waiters
from herder_shared.errors import HerderError, NotSerializable
from herder_shared.ids import task_id
from herder_shared.states import Outcome
from herder_shared.wire.messages import Query

if TYPE_CHECKING:
    from herder.connection import Connection
    from herder.explaining import Explanation
    from herder.tracks import Track
    from herder_shared.ids import JobId, NodeName
    from herder_shared.wire.messages import TaskEnd, Usage

_log = logging.getLogger("herder")

T = TypeVar("T")

# The standard library's own states; `wait` and `as_completed` compare with them.
_PENDING = "PENDING"
_RUNNING = "RUNNING"
_CANCELLED = "CANCELLED"
_CANCELLED_AND_NOTIFIED = "CANCELLED_AND_NOTIFIED"
_FINISHED = "FINISHED"
_DONE = frozenset({_CANCELLED, _CANCELLED_AND_NOTIFIED, _FINISHED})


class _Condition:
    """`threading.Condition` at a fifth of its size and cost: a client may hold a million futures that nobody waits
    for."""

    __slots__ = ("_lock", "_waiters")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiters: list[Any] | None = None

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> bool:
        return self._lock.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """As `threading.Condition.wait`, for a lock that is held once."""
        gate = threading.Lock()
        gate.acquire()
        if self._waiters is None:
            self._waiters = []
        self._waiters.append(gate)
        self._lock.release()
        notified = False
        try:
            notified = gate.acquire(timeout=-1 if timeout is None else max(0.0, timeout))
        finally:
            self._lock.acquire()
            if not notified and self._waiters is not None and gate in self._waiters:
                self._waiters.remove(gate)
        return notified

    def notify_all(self) -> None:
        """Wake everybody who waits."""
        waiters, self._waiters = self._waiters, None
        for gate in waiters or ():
            gate.release()


class Future(concurrent.futures.Future[T], Generic[T]):
    """One task. Everything of `concurrent.futures.Future`, and what Herder knows of the task besides.

    `cancel()` never blocks and also ends a task that runs already (SIGTERM, then SIGKILL), unless the option
    `cancel_running=False` was given. Callbacks run in the connection's thread: they must be quick and must not wait
    for other futures.
    """

    def __init__(self, connection: Connection, track: Track, kind: Kind, *, cancel_running: bool = True) -> None:
        # In place of the standard library's own, which makes a `threading.Condition`.
        self._condition: Any = _Condition()
        self._state = _PENDING
        self._result: Any = None
        self._exception: BaseException | None = None
        turnstile = connection.turnstile
        self._waiters: list[Any] = [] if turnstile is None else Waiters(turnstile)
        self._done_callbacks: list[Any] = []
        self._connection = connection
        self._track = track
        self._kind: Kind = kind
        self._cancel_running = cancel_running
        #: Set when it is submitted, before `submit` returns.
        self.index = -1
        self._undecoded: TaskEnd | None = None
        self._usage: Usage | HerderError | None = None
        self._logs: TaskLogs | None = None

    @property
    def job_id(self) -> str:
        """The job that it belongs to."""
        return self._track.job

    @property
    def task_id(self) -> str:
        """`<job>.<index>`, as everywhere in Herder."""
        return task_id(self._track.job, self.index)

    def result(self, timeout: float | None = None) -> T:
        """The task's value. See `concurrent.futures.Future.result`."""
        try:
            self._settle(timeout)
            return super().result(timeout)
        finally:
            del self  # an exception's traceback would keep this frame, and it the future which holds the exception

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Why there is no value, or None. See `concurrent.futures.Future.exception`."""
        self._settle(timeout)
        return super().exception(timeout)

    def cancel(self) -> bool:
        """Cancel the task, wherever it is. Never blocks; False only when it is done and was not cancelled (or, with
        `cancel_running=False`, when it runs)."""
        if self._connection.is_foreign:
            self._connection.check_usable()
        with self._condition:
            if self._state in (_CANCELLED, _CANCELLED_AND_NOTIFIED):
                return True
            if self._state == _FINISHED or (self._state == _RUNNING and not self._cancel_running):
                return False
        self._connection.cancel(self._track.job, (self.index,), running=self._cancel_running)
        return self._end_as_cancelled()

    def usage(self, timeout: float | None = None) -> TaskUsage:
        """What the task used, also after a failure. Waits for the task's end, which for a cancelled one comes after
        `cancel`.

        Raises:
            TimeoutError: not ended within `timeout` seconds.
            HerderError: it will never be known, as the connection has ended.
        """
        deadline_s = None if timeout is None else time.monotonic() + timeout
        with self._connection.patience() as patience, self._condition:
            while self._usage is None:
                self._wait(deadline_s, patience)
            usage = self._usage
        if isinstance(usage, HerderError):
            raise usage
        return usage_of(usage)

    def logs(self) -> TaskLogs:
        """What the task has written to stdout and stderr, as far as the cluster knows now.

        Raises:
            Unreachable, JobNotFound: it has to be asked for and cannot be.
        """
        if self._logs is not None:
            return self._logs
        job, index = self._track.job, self.index
        answer = self._connection.ask(lambda number: Query(number, "logs", job, index))
        return logs_of(answer.logs) if answer.logs is not None else TaskLogs()

    def explain(self) -> Explanation:
        """Why the task waits, runs where it runs, or ended as it did, as the cluster knows now; `str()` of it is text.

        Raises:
            Unreachable, JobNotFound: it cannot be asked, or the task has been forgotten.
        """
        from herder.explaining import ask

        return ask(self._connection, self._track.job, self.index)

    def __repr__(self) -> str:
        return f"<herder.Future {self.task_id} {self._state.removesuffix('_AND_NOTIFIED').lower()}>"

    def __reduce__(self) -> Any:
        raise NotSerializable("a Future can be sent only as an argument of submit, map or array of its own client")

    # --- for the client -----------------------------------------------------------------------------------------------

    def belongs_to(self, connection: Connection) -> bool:
        """Whether that connection submitted it, so that tasks of the same may depend on it."""
        return self._connection is connection

    @property
    def job(self) -> JobId:
        """The job's identity on the wire."""
        return self._track.job

    def start(self) -> None:
        """The task's code runs now."""
        if self._state == _PENDING:
            with self._condition:
                if self._state == _PENDING:
                    self._state = _RUNNING

    def finish(self, end: TaskEnd) -> None:
        """The task has ended. The first end counts; a later one only tells a cancelled future's usage."""
        if is_cancelled(end):
            self._end_as_cancelled()
        with self._condition:
            self._usage = end.usage
            if end.logs is not None:
                self._logs = logs_of(end.logs)
            if self._state in _DONE:
                self._condition.notify_all()
                return
            self._undecoded = end
            self._end_as_finished(well=end.outcome is Outcome.SUCCEEDED)
        self._call_back()

    def fail(self, error: BaseException) -> None:
        """The task will have no end: this is why."""
        with self._condition:
            self._usage = error if isinstance(error, HerderError) else HerderError("the task never ran")
            if self._state in _DONE:
                self._condition.notify_all()
                return
            self._exception = error
            self._end_as_finished(well=False)
        self._call_back()

    def end_locally(self, error: BaseException | None) -> None:
        """The task ends here, whatever the coordinator will say of it. None: it is cancelled."""
        if error is None:
            self._end_as_cancelled()
        else:
            self.fail(error)

    def abandon(self) -> None:
        """The task is cancelled and nobody will say when it was over."""
        self._end_as_cancelled()
        with self._condition:
            self._usage = self._usage or HerderError(f"task {self.task_id} was cancelled; its usage is not known")
            self._condition.notify_all()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _end_as_finished(self, *, well: bool) -> None:
        self._state = _FINISHED
        for waiter in self._waiters:
            if well:
                waiter.add_result(self)
            else:
                waiter.add_exception(self)
        self._condition.notify_all()

    def _end_as_cancelled(self) -> bool:
        """Whether it is cancelled now."""
        with self._condition:
            if self._state in _DONE:
                return self._state != _FINISHED
            self._state = _CANCELLED_AND_NOTIFIED
            for waiter in self._waiters:
                waiter.add_cancelled(self)
            self._condition.notify_all()
        self._call_back()
        return True

    def _call_back(self) -> None:
        if self._done_callbacks:
            self._invoke_callbacks()  # type: ignore[attr-defined]
            self._done_callbacks.clear()

    def _settle(self, timeout: float | None) -> None:
        """Wait for the end and unpickle what came."""
        if self._state == _FINISHED and self._undecoded is None:
            return
        deadline_s = None if timeout is None else time.monotonic() + timeout
        with self._connection.patience() as patience, self._condition:
            while self._state not in _DONE:
                self._wait(deadline_s, patience)
            end = self._undecoded
        if end is None:
            return
        value, error = outcome_of(end, self._track.job, self._kind)
        with self._condition:
            if self._undecoded is not None:  # another thread may have been faster
                self._result, self._exception = value, error
                self._undecoded = None

    def _wait(self, deadline_s: float | None, patience: Patience) -> None:
        if self._connection.is_foreign:
            self._connection.check_usable()
        if self._connection.is_in_loop:
            raise HerderError(
                f"a callback waits for task {self.task_id} in the connection's own thread, which could then never end: "
                "wait in another thread, or pass the future as an argument to a further task"
            )
        left_s = None if deadline_s is None else deadline_s - time.monotonic()
        if left_s is not None and left_s <= 0:
            raise TimeoutError
        patience.begin()
        self._condition.wait(left_s)


class Submissions:
    """The sink of one open job: tasks submitted one by one, each with a future from the start."""

    def __init__(self) -> None:
        self._futures: dict[int, Future[Any]] = {}

    def admit(self, future: Future[Any], index: int) -> None:
        """This future's events may come from now on."""
        future.index = index
        self._futures[index] = future

    def pending(self) -> list[Future[Any]]:
        """Futures whose tasks have not ended."""
        return list(self._futures.values())

    def started(self, tasks: Sequence[tuple[int, NodeName]]) -> None:
        """Sink."""
        for index, _ in tasks:
            future = self._futures.get(index)
            if future is not None:
                future.start()

    def ended(self, ends: Sequence[TaskEnd]) -> None:
        """Sink."""
        for end in ends:
            future = self._futures.pop(end.index, None)
            if future is not None:
                guard(future.finish, end)

    @property
    def is_wanted(self) -> bool:
        """Sink."""
        return True

    def ended_among(self, count: int) -> set[int]:
        """Sink."""
        return set(range(count)).difference(list(self._futures))

    def miss(self, indices: Iterable[int]) -> None:
        """Sink: it is the first of its job."""

    def reset(self, indices: Sequence[int]) -> None:
        """Sink. A future that is done stays so: `client.job(...)` follows what is run again."""

    def lost(self, first: int, error: HerderError | None) -> None:
        """Sink."""
        for index in [index for index in list(self._futures) if index >= first]:
            future = self._futures.pop(index)
            if error is None:
                guard(future.abandon)
            else:
                guard(future.fail, error_for(error, future.task_id))


def error_for(error: HerderError, task: str) -> HerderError:
    """A task's own copy of the error that ended many."""
    own = type(error)(*error.args)
    own.__dict__.update(error.__dict__)
    own.task_id = task
    own.__cause__ = error.__cause__
    return own


def guard(act: Callable[..., None], *arguments: Any) -> None:
    """A callback that raises what `Future` does not catch itself (SystemExit, say) ends neither its neighbours nor
    us."""
    try:
        act(*arguments)
    except BaseException:  # noqa: BLE001 - the connection's thread must live on
        _log.exception("a future's callback failed")
