"""Client: an executor whose processes are a cluster's; and its views, the same executor with other options."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import msgspec

from herder.calls import Call, Dependencies, prepare_arguments, prepare_call, prepare_data
from herder.connection import Connection, Endpoint
from herder.feeding import Feeder, feed
from herder.futures import Future, Submissions
from herder.in_task import OPTIONS_ATTRIBUTE
from herder.jobs import Job, MapResults, Record
from herder.options import OPTION_NAMES, Options, check_options, unknown_keyword
from herder.outcomes import Kind
from herder.payload import DependencyEnded, FunctionCache, PickledFunction, function_name
from herder.tracks import Shared, Track
from herder.workload import Workload
from herder_shared.config import Profile, load_profile, parse_address
from herder_shared.errors import ConfigError, JobNotFound
from herder_shared.ids import JobId, NodeName
from herder_shared.limits import BATCH_TASKS_MAX, DISCONNECT_GRACE_S_MAX, NAME_CHARS_MAX
from herder_shared.wire.messages import CommandSpec, DrainNode, JobSpec, Key, KeyInfo, ListKeys, Query, RevokeKeys

if TYPE_CHECKING:
    from herder.completed import Completed
    from herder_shared.wire.messages import JobInfo, NodeInfo, StatusInfo, WorkloadInfo

T = TypeVar("T")

_COMMAND = msgspec.msgpack.Encoder()
_DEFAULT_WORKLOAD = Workload()
DEFAULT_PORT = 7711
CONNECT_TIMEOUT_S = 10.0


class _Lane:
    """The open job to which one kind of one-by-one submissions of a view goes."""

    __slots__ = ("code_by_value", "kind", "options", "sink", "track")

    def __init__(self, track: Track, sink: Submissions, options: Options, kind: Kind, *, code_by_value: bool) -> None:
        self.track = track
        self.sink = sink
        self.options = options
        self.kind: Kind = kind
        self.code_by_value = code_by_value


class View(concurrent.futures.Executor):
    """An executor on a cluster with fixed options. `client.options(...)` makes one; the client is one itself.

    Shutting it down, or leaving its `with` block, ends and waits for what was submitted through it alone.
    """

    def __init__(self, connection: Connection, base: Options, given: Mapping[str, Any], parent: View | None) -> None:
        self._connection = connection
        self._parent = parent  # keeps the client, and so the connection, for as long as a view of it is used
        self._base = base
        self._given = dict(given)
        self._plain = base.with_given(self._given)
        self._functions: FunctionCache = parent._functions if parent is not None else FunctionCache()
        self._lock = threading.Lock()
        self._lanes: dict[tuple[Options, Kind], _Lane] = {}
        self._tracks: weakref.WeakSet[Track] = weakref.WeakSet()
        self._records: weakref.WeakSet[Record] = weakref.WeakSet()
        self._has_ended = False
        weakref.finalize(self, _close_lanes, connection, self._lanes).atexit = False

    # --- submitting ---------------------------------------------------------------------------------------------------

    def options(self, **options: Any) -> View:
        """A view with these options, above the client's own (API.md lists them).

        Raises:
            TypeError: an option that does not exist (the nearest is named), or of the wrong type.
            ValueError: a value out of range.
        """
        return View(self._connection, self._base, {**self._given, **options}, self)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn(*args, **kwargs)` in a process of its own somewhere on the cluster.

        Futures of this client anywhere in the arguments are waited for there and replaced by their values. Waits here
        only while too many submissions are unacknowledged.

        Raises:
            NotSerializable, PayloadTooLarge: nothing was submitted; the message names the object.
            RuntimeError: after shutdown.
            HerderError: the connection has ended for good.
        """
        self._check_open()
        lane = self._lane(self._options_of(fn), "python", fn)
        call = prepare_call(self._connection, self._functions, fn, args, kwargs, code_by_value=lane.code_by_value)
        return cast("Future[T]", self._submit(lane, call))

    def map(
        self,
        fn: Callable[..., T],
        /,
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """As `concurrent.futures.Executor.map`: results in order. The tasks are one array job; `chunksize` merges none
        of them.

        Raises:
            ValueError, TypeError: `chunksize` below 1, `buffersize` not above 0.
            NotSerializable: as `submit`; what was submitted before it is cancelled.
        """
        deadline_s = None if timeout is None else time.monotonic() + timeout
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        self._check_open()
        track, record, calls = self._open_array(fn, zip(*iterables, strict=False), None)
        feeder = Feeder(self._connection, track, record)
        if buffersize is None:
            with self._connection.feeding():
                feed(feeder, calls)
            if record.feed_error is not None:
                self._connection.cancel(track.job, None, running=True)
                raise record.feed_error
            return MapResults(self._connection, track, record, deadline_s, None)
        feed_one = partial(_feed_one, feeder, calls, weakref.ref(self))
        for _ in range(buffersize - 1):
            feed_one()
        return MapResults(self._connection, track, record, deadline_s, feed_one)

    def array(self, fn: Callable[..., Any], /, *iterables: Iterable[Any], name: str | None = None) -> Job:
        """An array job: `fn` over the iterables, 1 to 10,000,000 tasks. Large or endless-looking ones are consumed in a
        thread, as fast as the coordinator takes them.

        Raises:
            NotSerializable: the function, or an argument of an array that is small enough to be sent at once.
        """
        self._check_open()
        track, record, calls = self._open_array(fn, zip(*iterables, strict=False), name)
        return self._feed_array(track, record, calls, iterables, cancel_running=self._options_of(fn).cancel_running)

    def command(
        self,
        argv: Sequence[str | os.PathLike[str]] | str,
        *,
        stdin: bytes | Path | None = None,
        check: bool = True,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Future[Completed]:
        """Run a command: a list is exec'd, a text goes to `/bin/sh -c`. `stdin` as a path, and `cwd`, are the node's.

        The future's result is a `herder.Completed`; an exit status other than 0 is `CommandFailed` unless
        `check=False`.

        Raises:
            TypeError, ValueError: not a command.
        """
        self._check_open()
        spec = _command_spec(argv, stdin=stdin, check=check, cwd=cwd, env=env)
        lane = self._lane(self._plain, "command", spec.shell or spec.argv[0])
        return self._submit(lane, prepare_data(_COMMAND.encode(spec)))

    def command_array(
        self,
        commands: Iterable[Sequence[str | os.PathLike[str]] | str],
        *,
        check: bool = True,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        name: str | None = None,
    ) -> Job:
        """One task a command, as one array job. See `command` and `array`."""
        self._check_open()
        record = self._new_record("command")
        track = self._open_job(self._plain, "command", name or self._plain.name or "commands", record, "array")
        calls = (
            prepare_data(_COMMAND.encode(_command_spec(argv, stdin=None, check=check, cwd=cwd, env=env)))
            for argv in commands
        )
        return self._feed_array(track, record, calls, (commands,), cancel_running=self._plain.cancel_running)

    def graph(self, dsk: Mapping[Any, Any], keys: Any) -> Any:
        """Compute a Dask-style graph: `client.graph({"a": 1, "b": (add, "a", 2)}, "b")`. `keys` is a key or nested
        lists of keys; the values come in the same structure. Every key that stands for a task is one task; only what
        is needed is run.

        Raises:
            KeyError, ValueError: a key that there is not, a cycle.
            DependencyFailed: a task which a wanted key depends on failed: `__cause__` is its exception, `task_id` its
                id, a note names the keys. The exception itself where it is the wanted key's own task.
        """
        from herder.graphs import compute_graph

        self._check_open()
        return compute_graph(self.options(**({} if self._plain.name else {"name": "graph"})), dsk, keys)

    async def gather(self, *futures: concurrent.futures.Future[Any], return_exceptions: bool = False) -> list[Any]:
        """`asyncio.gather` over futures. Cancelling it cancels the tasks."""
        import asyncio

        waiting = [asyncio.wrap_future(future) for future in futures]
        with self._connection.patience() as patience:
            if not all(future.done() for future in futures):
                patience.begin()
            return list(await asyncio.gather(*waiting, return_exceptions=return_exceptions))

    # --- the end ------------------------------------------------------------------------------------------------------

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take nothing more. `wait`: until all that was submitted through this view has ended. `cancel_futures`
        cancels what has not started; what runs is never killed. May be called again."""
        self._stop(cancel_futures=cancel_futures)
        if wait:
            self._connection.wait_settled(list(self._tracks))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> Literal[False]:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._interrupt()
        self.shutdown(wait=True)
        return False

    def _interrupt(self) -> None:
        """Ctrl-C: end what runs, too."""
        self.cancel_all()

    def _stop(self, *, cancel_futures: bool) -> None:
        with self._lock:
            self._has_ended = True
        if self._connection.is_foreign:
            self._connection.check_usable()
        if cancel_futures:
            for record in list(self._records):
                record.stop(running=False)
        _close_lanes(self._connection, self._lanes)
        if cancel_futures:
            for track in list(self._tracks):
                self._connection.cancel(track.job, None, running=False)

    def cancel_all(self) -> None:
        """Cancel everything that was submitted through this view and has not ended, running tasks too."""
        for track in list(self._tracks):
            self._connection.cancel(track.job, None, running=True)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._has_ended:
            if self._connection.is_foreign:
                self._connection.check_usable()
            raise RuntimeError("cannot schedule new futures after shutdown")
        self._connection.check_usable()

    def _options_of(self, fn: Callable[..., Any]) -> Options:
        own = getattr(fn, OPTIONS_ATTRIBUTE, None)
        return self._base.with_given({**own, **self._given}) if own else self._plain

    def _lane(self, options: Options, kind: Kind, what: Callable[..., Any] | str) -> _Lane:
        key = (options, kind)
        lane = self._lanes.get(key)
        if lane is None or lane.track.error is not None:
            with self._lock:
                lane = self._lanes.get(key)
                if lane is None or lane.track.error is not None:
                    lane = self._lanes[key] = self._new_lane(options, kind, what)
        return lane

    def _new_lane(self, options: Options, kind: Kind, what: Callable[..., Any] | str) -> _Lane:
        sink = Submissions()
        name = options.name or (what if isinstance(what, str) else function_name(what))
        track = self._open_job(options, kind, name, sink, "submit")
        by_value = (options.workload or _DEFAULT_WORKLOAD).for_wire(kind).code_by_value
        return _Lane(track, sink, options, kind, code_by_value=by_value)

    def _open_job(
        self, options: Options, kind: Kind, name: str, sink: Submissions | Record, job_kind: Literal["submit", "array"]
    ) -> Track:
        workload = (options.workload or _DEFAULT_WORKLOAD).for_wire(kind)
        spec = JobSpec(
            job=JobId(secrets.token_hex(8)),
            name=name[:NAME_CHARS_MAX],
            workload=workload.spec,
            options=options.for_wire(),
            owner=self._connection.owner,
            tags=options.tags,
            detached=options.detached,
            kind=job_kind,
        )
        track = self._connection.open_job(spec, sink)
        self._tracks.add(track)
        return track

    def _submit(self, lane: _Lane, call: Call) -> Future[Any]:
        future: Future[Any] = Future(
            self._connection, lane.track, lane.kind, cancel_running=lane.options.cancel_running
        )

        def admit(index: int) -> None:
            lane.sink.admit(future, index)
            if call.ended is not None:
                # Before the coordinator can say that it failed: its arguments are not usable.
                future.end_locally(call.ended.outcome)

        try:
            self._connection.submit(lane.track, call.batch(lane.track.job), admit)
        except BaseException:
            self._connection.unclaim(call.claims)
            raise
        if call.ended is not None:
            self._connection.cancel(lane.track.job, (future.index,), running=True)
        return future

    def _new_record(self, kind: Kind) -> Record:
        record = Record(kind)
        self._records.add(record)
        return record

    def _open_array(
        self, fn: Callable[..., Any], arguments: Iterator[tuple[Any, ...]], name: str | None
    ) -> tuple[Track, Record, Iterator[Call]]:
        options = self._options_of(fn)
        depend = Dependencies(self._connection)
        ended: DependencyEnded | None = None
        try:
            function: PickledFunction | None = self._functions.pickled(fn, depend)
        except DependencyEnded as raised:
            function, ended = None, raised
        except BaseException:
            depend.release()
            raise
        record = self._new_record("python")
        track = self._open_job(options, "python", name or options.name or function_name(fn), record, "array")
        by_value = (options.workload or _DEFAULT_WORKLOAD).for_wire("python").code_by_value
        prepare = partial(_prepare, self._connection, function, ended, by_value)
        calls = _released_after(map(prepare, arguments), depend)
        return track, record, calls

    def _feed_array(
        self,
        track: Track,
        record: Record,
        calls: Iterator[Call],
        iterables: Sequence[Iterable[Any]],
        *,
        cancel_running: bool,
    ) -> Job:
        assert track.spec is not None
        job = Job(self._connection, track, record, track.spec.name, cancel_running=cancel_running)
        feeder = Feeder(self._connection, track, record)
        sizes = [len(each) for each in iterables if isinstance(each, Sequence)]
        if len(sizes) == len(iterables) and min(sizes, default=0) <= BATCH_TASKS_MAX:
            with self._connection.feeding():
                feed(feeder, calls)
            if record.feed_error is not None:
                job.cancel()
                raise record.feed_error
            return job
        entered = self._connection.feeding()
        entered.__enter__()
        threading.Thread(target=_feed_in_thread, args=(entered, feeder, calls), name="herder-feed", daemon=True).start()
        return job


class Client(View):
    """A connection with a cluster, as a `concurrent.futures.Executor`.

    Args:
        address: "tls://host:7711" or "host:port", or several of them with commas between (coordinators that stand by
            for each other); None: what the profile says.
        profile: its name, or a `Profile`; None: `$HERDER_PROFILE`, else the active one.
        reconnect_timeout: seconds for which a lost connection is waited for before futures end with `Unreachable`;
            None: for ever.
        disconnect_grace: seconds for which its jobs go on when this process vanishes without a word; then those that
            are not detached are cancelled. None: as the coordinator is configured (60).
        connect_timeout: seconds for which the first connection may take.
        options: defaults of everything that is submitted.

    Raises:
        ConfigError: no profile, or no address in it.
        Unreachable: nobody answers there.
        Unauthorized, ProtocolMismatch: somebody does, and will not have us.
        TypeError: an option that does not exist.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        profile: str | Profile | None = None,
        reconnect_timeout: float | None = None,
        disconnect_grace: float | None = None,
        connect_timeout: float = CONNECT_TIMEOUT_S,
        **options: Any,
    ) -> None:
        _check_client_keywords(options)
        base = Options().with_given(options)
        if disconnect_grace is not None and not 0 <= disconnect_grace <= DISCONNECT_GRACE_S_MAX:
            raise ValueError(f"disconnect_grace must be 0 to {DISCONNECT_GRACE_S_MAX:g} s, not {disconnect_grace!r}")
        connection = Connection(_endpoint(address, profile), reconnect_timeout, disconnect_grace)
        connection.start(connect_timeout)
        super().__init__(connection, base, {}, None)
        weakref.finalize(self, connection.retire).atexit = False

    def __repr__(self) -> str:
        return f"<herder.Client of {self._connection.endpoint.label}>"

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As Executor. `wait` covers every future that is not of a detached job, the killing of cancelled tasks
        included."""
        self._stop(cancel_futures=cancel_futures)
        self._connection.refuse_new()
        if cancel_futures:
            self._connection.cancel_all(running=False)
        if wait:
            self._connection.wait_settled()
            self._connection.end(None)
        else:
            self._connection.retire()

    @property
    def is_usable(self) -> bool:
        """Whether it takes submissions: not shut down, its connection not given up, not in a forked child."""
        return not self._has_ended and self._connection.is_usable

    def abort(self) -> None:
        """End at once: whatever has not ended is cancelled, running tasks too."""
        self._stop(cancel_futures=False)
        self._connection.end(None)

    def _interrupt(self) -> None:
        self._connection.end(None)

    # --- looking ------------------------------------------------------------------------------------------------------

    def job(self, id: str) -> Job:  # noqa: A002 - the public name
        """A job of this cluster, also of another client or an earlier session.

        Raises:
            JobNotFound: there is none of this id, or it has been forgotten.
        """
        self._check_open()
        job = JobId(id)
        answer = self._connection.ask(lambda number: Query(number, "job", job))
        if not answer.jobs:
            raise JobNotFound(f"there is no job {id!r}, or it has been forgotten: `herder jobs` lists them")
        found = answer.jobs[0]
        here = self._connection.sink_of(job)
        if here is not None:
            track, sink = here
            for each in (sink, *(sink.others if isinstance(sink, Shared) else ())):
                if isinstance(each, Record) and each.is_held:  # followed here already: what came is shown by both
                    return Job(self._connection, track, each, found.name, cancel_running=True)
        record = Record("command" if found.workload_kind == "command" else "python")
        track = self._connection.observe_job(job, record)
        record.submitted_count = record.total = max(found.tasks, track.submitted_count)
        return Job(self._connection, track, record, found.name, cancel_running=True)

    def jobs(self) -> tuple[JobInfo, ...]:
        """The cluster's jobs, newest last."""
        self._check_open()
        return self._connection.ask(lambda number: Query(number, "jobs")).jobs or ()

    def nodes(self) -> tuple[NodeInfo, ...]:
        """The cluster's nodes."""
        self._check_open()
        return self._connection.ask(lambda number: Query(number, "nodes")).nodes or ()

    def workloads(self) -> tuple[WorkloadInfo, ...]:
        """Workloads: how they start, on each node, and why."""
        self._check_open()
        return self._connection.ask(lambda number: Query(number, "workloads")).workloads or ()

    def status(self) -> StatusInfo:
        """The cluster as a whole."""
        self._check_open()
        status = self._connection.ask(lambda number: Query(number, "status")).status
        assert status is not None
        return status

    def drain(self, node: str, *, on: bool = True) -> None:
        """Empty a node: what runs there finishes, nothing new starts. `on=False` uses it again.

        Raises:
            HerderError: there is no such node, or this client may not.
        """
        self._check_open()
        self._connection.ask(lambda number: DrainNode(number, NodeName(node), on))

    def list_keys(self) -> tuple[KeyInfo, ...]:
        """The certificates that were revoked, and those with which somebody is connected.

        Raises:
            Unauthorized: this client is no admin.
        """
        self._check_open()
        return self._connection.ask(ListKeys).keys or ()

    def revoke_keys(self, *keys: Key) -> tuple[KeyInfo, ...]:
        """Have these certificates turned away from now on, and who is connected with them turned out. When it returns
        that is durable.

        Raises:
            Unauthorized: this client is no admin.
            ConfigError: they cannot be revoked; none of them was.
        """
        self._check_open()
        return self._connection.ask(lambda number: RevokeKeys(number, keys)).keys or ()


# --- feeding ---------------------------------------------------------------------------------------------------------


def _prepare(
    connection: Connection,
    function: PickledFunction | None,
    ended: DependencyEnded | None,
    code_by_value: bool,
    args: tuple[Any, ...],
) -> Call:
    if ended is not None or function is None:
        assert ended is not None
        return Call.of_ended(ended)
    return prepare_arguments(connection, function, args, {}, code_by_value=code_by_value)


def _released_after(calls: Iterator[Call], depend: Dependencies) -> Generator[Call]:
    """What the function itself claimed is held until its last task is acknowledged with the others."""
    try:
        for call in calls:
            if depend.claims:
                call.claims.extend(depend.claims)
                depend.claims = []
            yield call
    finally:
        depend.release()


def _feed_one(feeder: Feeder, calls: Iterator[Call], view: weakref.ref[View]) -> None:
    """Submit the next call of a `map` with a `buffersize`, if there is one and the executor still takes it."""
    executor = view()
    if feeder.is_finished or executor is None:
        if not feeder.is_finished:
            feeder.finish(None)
        return
    for call in itertools.islice(calls, 1):
        executor._check_open()
        feeder.add(call)
        feeder.flush()
        return
    feeder.finish(None)


def _feed_in_thread(entered: Any, feeder: Feeder, calls: Iterator[Call]) -> None:
    try:
        feed(feeder, calls)
    finally:
        entered.__exit__(None, None, None)


def _close_lanes(connection: Connection, lanes: dict[tuple[Options, Kind], _Lane]) -> None:
    for lane in list(lanes.values()):
        connection.close_job(lane.track)


# --- arguments -------------------------------------------------------------------------------------------------------


def _endpoint(address: str | None, profile: str | Profile | None) -> Endpoint:
    found = profile if isinstance(profile, Profile) else load_profile(profile)
    texts = tuple(text.strip() for text in address.split(",")) if address is not None else found.addresses
    if not texts:
        raise ConfigError(
            f"the profile {found.name!r} has no address of a coordinator: start one with `herder up`, or pass "
            "herder.Client('host:port')"
        )
    addresses = tuple(parse_address(text, DEFAULT_PORT) for text in texts)
    label = f"profile {found.name!r}, {', '.join(texts)}"
    return Endpoint(addresses, found.identity, found.cluster, label)


def _check_client_keywords(options: Mapping[str, Any]) -> None:
    known = (*OPTION_NAMES, "profile", "reconnect_timeout", "disconnect_grace", "connect_timeout")
    for name in options:
        if name not in OPTION_NAMES:
            raise TypeError(unknown_keyword("option", name, known))
    check_options(options)


def _command_spec(
    argv: Sequence[str | os.PathLike[str]] | str,
    *,
    stdin: bytes | Path | None,
    check: bool,
    cwd: str | os.PathLike[str] | None,
    env: Mapping[str, str] | None,
) -> CommandSpec:
    shell = argv if isinstance(argv, str) else None
    words = () if isinstance(argv, str) else tuple(os.fspath(word) for word in argv)
    if not (shell and shell.strip()) and not words:
        raise ValueError("a command must not be empty: pass a list to exec, or a text for /bin/sh -c")
    for word in (*words, shell or ""):
        if not isinstance(word, str):
            raise TypeError(f"a command is a list of texts, or a text for /bin/sh -c; it holds {word!r}")
        if "\0" in word:
            raise ValueError("a command must not contain a NUL character")
    if stdin is not None and not isinstance(stdin, bytes | bytearray | memoryview | os.PathLike):
        raise TypeError(f"stdin must be bytes or a Path on the node, not {stdin!r}")
    return CommandSpec(
        argv=words,
        shell=shell,
        stdin=b"" if stdin is None or isinstance(stdin, os.PathLike) else bytes(stdin),
        stdin_path=os.fspath(stdin) if isinstance(stdin, os.PathLike) else None,
        check=check,
        cwd=None if cwd is None else os.fspath(cwd),
        env=dict(env or {}),
    )
