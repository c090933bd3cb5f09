"""Runs one task in a child: unpickle, `started`, call, pickle, `result` or `error`; then put the process back as it
was.

A reusable child does this thousands of times a second, a forked one once with every page still to be copied: so there
is one receive, two sends, and no system call that the task did not ask for.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import pickle
import resource
import sys
import time

from . import cures, failures, generators, streams, system, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

    from . import baseline

#: Larger results are refused (`BLOB_BYTES_MAX`), before a second copy of them is made.
RESULT_BYTES_MAX = 16 * 1024**3
#: Results up to this travel in their frame, larger ones in a sealed memfd.
INLINE_BYTES_MAX = 64 * 1024
#: A task that took less cannot have touched memory worth a look.
UNSAMPLED_S = 0.002
#: Functions kept unpickled by a reusable child.
FUNCTIONS_MAX = 64
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "POLARS_MAX_THREADS",
)


class Exit(BaseException):
    """The task ended its process (`sys.exit`), or is a copy of it made by `os.fork`: leave with this status."""

    def __init__(self, status: int) -> None:
        self.status = status


class Runner:
    """What a child keeps from task to task."""

    def __init__(self, seen: ModuleType, python: str, controller: Any = None) -> None:
        self.seen = seen
        self.python = python
        #: A threadpoolctl controller made in the template, where threadpoolctl is installed: sets native pools'
        #: threads.
        self.controller = controller
        self.setup_error: dict[str, Any] | None = None
        self._functions: dict[str, Any] = {}
        #: What the environment says, where all of its variables agree.
        said = {os.environ.get(name) for name in THREAD_VARIABLES}
        self._threads = int(text) if len(said) == 1 and (text := said.pop() or "").isdecimal() else 0
        self._cpus: list[int] | None = None
        self._limits: dict[str, Any] = {}
        self._baseline: baseline.Baseline | None = None
        #: How a child that is used again calls a function; None is as any.
        self._call: Callable[..., Any] | None = None
        #: Why this process cannot be used again.
        self.unfit = ""
        self._below: resource.struct_rusage | None = None
        self._discarding = False
        self._latecomers = streams.Latecomers()
        #: Those that setup and preloaded modules made.
        self.generators = generators.NONE
        self._pipes: tuple[int, ...] | None = None
        #: Private memory of the template, which its children begin with; and whether a task is to say what it has more.
        self.anon_bytes = 0
        self._tells_peak = False

    @property
    def is_ordinary(self) -> bool:
        """Whether a task can begin here without anything being put right first."""
        return not self.unfit and self.setup_error is None and self._latecomers.seed is None

    @property
    def threads(self) -> int:
        """How many threads numerical libraries have here; 0 = not known."""
        return self._threads

    def is_set_up_for(self, threads: int, python: str) -> bool:
        """Whether numerical libraries have so many threads, and code pickled by value under this Python runs here."""
        return threads == self._threads and (not python or python == self.python)

    def be_young(self) -> None:
        """Nobody hears of this process before its task is over."""
        self._tells_peak = True

    def run(self, channel: wire.Channel, head: dict[str, Any], body: memoryview) -> None:
        """Run the task of this frame and answer it. Raises Exit, or OSError when the agent is gone."""
        pid = os.getpid()
        retry_on: Any = None
        used = _NOTHING_USED
        try:
            parts = self._parts(channel, head, body)
            retry_on = parts.get("retry_on")
            self._prepare(head)
            function, (args, kwargs) = self._unpickle(head, parts)
            parts.clear()
            if not head.get("quiet"):
                channel.send_packed(_STARTED)
            usage = Usage(self._below)
            try:
                value = function(*args, **kwargs) if self._call is None else self._call(function, *args, **kwargs)
            finally:
                used = usage.stop()
                self._below = usage.below
                self.judge(used)
                if os.getpid() != pid:
                    raise Exit(0)
            del function, args, kwargs
            answer = self.pickle(value)
        except BaseException as raised:  # noqa: BLE001 - whatever the user's code raised is the task's outcome
            self.answer_failure(channel, raised, retry_on, used)
            return
        self.answer(channel, answer, used)

    def answer(self, channel: wire.Channel, content: bytes, used: dict[str, float]) -> None:
        """Send a task's value."""
        # Before the answer: who has answered has tidied up.
        self.seen.leave(True)
        flush_all()
        self._send_result(channel, content, used)

    def answer_failure(
        self, channel: wire.Channel, raised: BaseException, retry_on: Any, used: dict[str, float] | None = None
    ) -> None:
        """Answer a task that gave no value. Raises Exit where it ended its process."""
        used = used or _NOTHING_USED
        self.seen.leave()
        if isinstance(raised, Exit):
            raise raised
        if isinstance(raised, SystemExit):
            raise Exit(_exit_status(raised)) from None
        flush_all()
        if not isinstance(raised, failures.Refusal):
            self._send_exception(channel, raised, retry_on, used)
            return
        head = {"t": "error", "cause": raised.cause, "type": "", "message": str(raised), "traceback": ""}
        cause = raised.__cause__
        if cause is not None:
            head["type"], head["traceback"] = failures.type_name(cause), failures.traceback_text(cause)
        channel.send({**head, "retryable": raised.cause == "start_failed", "pickled": -1, **used})

    def rehearse(self, head: dict[str, Any], body: memoryview) -> None:
        """As `run`, without a word to the agent."""
        parts = self._parts(None, head, body)
        function, (args, kwargs) = self._unpickle(head, parts)
        usage = Usage()
        value = function(*args, **kwargs)
        _result_frame(self.pickle(value), usage.stop())
        self._functions.clear()
        self.seen.leave()
        flush_all()

    def forget(self) -> None:
        """Be as if no task had run."""
        self._functions.clear()
        self._below = None

    def restore(self) -> None:
        """Put back what a task may have left changed (see `baseline`)."""
        if self._baseline is None:
            return
        try:
            self._baseline.restore()
        except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
            self.unfit = f"what the task before changed could not be put back: {error}"
        self._discarding = False

    def judge(self, used: dict[str, float]) -> None:
        """Say with the answer how much memory it has, where nobody else can see that; and if it is the last, since the
        task left what cannot be put back."""
        if self._tells_peak and used["wall"] >= UNSAMPLED_S:
            used["peak"] = max(0, system.anon_bytes() - self.anon_bytes)
        if self._baseline is not None and not self.unfit:
            self.unfit = self._baseline.drift()
        if self.unfit:
            used["last"] = True

    def find_generators(self) -> None:
        """Look for random generators, and give each a stream that no other process has.

        Those that were known are kept: the collector does not show what was frozen in the template.
        """
        self.generators = self.generators.joined(generators.find(self.seen.value()))
        self.generators.part()

    def remember(self) -> None:
        """What `restore` restores is as it is now. Called by children that run more than one task."""
        from . import baseline

        self._baseline = baseline.Baseline(self.generators)
        self._call = baseline.call

    def _parts(self, channel: wire.Channel | None, head: dict[str, Any], body: memoryview) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        offset = 0
        for name, length in head.get("parts", ()):
            parts[name] = body[offset : offset + length]
            offset += length
        names = head.get("fds")
        if names and channel is not None:
            for name, fd in zip(names, channel.take_descriptors(len(names)), strict=True):
                try:
                    parts[name] = memoryview(mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ))
                finally:
                    os.close(fd)
        return parts

    def _prepare(self, head: dict[str, Any]) -> None:
        if self.unfit:
            raise failures.Refusal("start_failed", self.unfit)
        if self.setup_error is not None:
            raise SetupBroke(self.setup_error)
        tag = head.get("python")
        if tag and tag != self.python:
            raise failures.Refusal("version_mismatch", _mismatch(tag, self.python))
        cpus = head.get("cpus")
        if cpus and cpus != self._cpus:
            os.sched_setaffinity(0, cpus)
            self._cpus = cpus
            self._adopt()
        self._set_threads(head.get("threads") or 1)
        for name, value in (head.get("env") or {}).items():
            os.environ[name] = value
        groups = head.get("groups")
        if groups:
            enter_groups(groups)
        limits = head.get("limits")
        if limits and limits != self._limits:
            for name, (soft, hard) in limits.items():
                system.set_limit(name, soft, hard)
            self._limits = limits
            self._adopt()
        if bool(head.get("discard")) != self._discarding:
            self._redirect(bool(head.get("discard")))
        seed = head.get("seed")
        if seed is not None:
            self._seed(streams.task_seed(seed, head.get("index", 0)))
        elif self._latecomers.seed is not None:
            self._seed(None)

    def _seed(self, seed: int | None) -> None:
        """Seed what is loaded and what the task will load. None: the task before had a seed, this one has not."""
        if self._latecomers not in sys.meta_path:
            sys.meta_path.insert(0, self._latecomers)
        self._latecomers.seed = seed
        if seed is None:
            streams.seed_anew()
            self.generators.part()
        else:
            streams.seed_all(seed)
            self.generators.seed(seed)

    def _redirect(self, discard: bool) -> None:
        """Send stdout and stderr to nowhere, or back to the pipes."""
        if self._pipes is None:
            self._pipes = tuple(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (1, 2))
        null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        for fd, pipe in zip((1, 2), self._pipes, strict=True):
            os.dup2(null if discard else pipe, fd)
        os.close(null)
        self._discarding = discard

    def _set_threads(self, threads: int) -> None:
        if threads == self._threads:
            return
        self._threads = threads
        for name in THREAD_VARIABLES:
            os.environ[name] = str(threads)
        cures.tell_polars()
        if self.controller is not None:
            self.controller.limit(limits=threads)
        self._adopt()

    def _adopt(self) -> None:
        """What the agent changed is not put back after the task."""
        if self._baseline is not None:
            self._baseline.adopt()

    def _unpickle(self, head: dict[str, Any], parts: dict[str, Any]) -> tuple[Any, Any]:
        what = "dependency"
        try:
            # Before the function: a future in its closure is a dependency like any other.
            dependencies = {}
            for name in [name for name in parts if name.startswith("dep:")]:
                job, _, index = name[4:].rpartition(":")
                dependencies[job, int(index)] = pickle.loads(parts[name])
            self.seen.enter(head, dependencies)
            what = "function"
            key = head["function"]
            if "function" in parts:
                function = pickle.loads(parts["function"])
                if len(self._functions) >= FUNCTIONS_MAX:
                    del self._functions[next(iter(self._functions))]
                self._functions[key] = function
            elif key in self._functions:
                function = self._functions[key]
            else:
                raise failures.Refusal("start_failed", f"function {key} was neither sent nor is it known to this child")
            what = "arguments"
            return function, pickle.loads(parts["args"])
        except (failures.Refusal, SystemExit):
            raise
        except BaseException as error:
            raise failures.cannot_unpickle(f"the task's {what}", error) from error

    def pickle(self, value: Any) -> bytes:
        """A task's value as bytes. Raises Refusal."""
        try:
            content = pickle.dumps(value, 5)
        except Exception:  # noqa: BLE001 - code by value, or nothing that pickles: cloudpickle tells which
            content = _pickle_by_value(value)
        if len(content) > RESULT_BYTES_MAX:
            raise failures.Refusal("payload_too_large", _too_large(len(content)))
        return content

    def _send_result(self, channel: wire.Channel, content: bytes, used: dict[str, float]) -> None:
        if len(content) <= INLINE_BYTES_MAX and "last" not in used:
            channel.send_packed(_result_frame(content, used))
            return
        if len(content) <= INLINE_BYTES_MAX:
            channel.send({"t": "result", "len": len(content), "blob": False, **used}, content)
            return
        fd = sealed_memfd(content)
        try:
            channel.send({"t": "result", "len": len(content), "blob": True, **used}, b"", [fd])
        finally:
            os.close(fd)

    def _send_exception(
        self, channel: wire.Channel, error: BaseException, retry_on: Any, used: dict[str, float]
    ) -> None:
        if isinstance(error, SetupBroke):
            channel.send({**error.head, "t": "error", "retryable": False, "pickled": -1, **used})
            return
        content = failures.pickle_exception(error)
        head = {
            "t": "error",
            "cause": "exception",
            "type": failures.type_name(error),
            "message": failures.message_of(error),
            "traceback": failures.traceback_text(error),
            "retryable": _is_retryable(error, retry_on),
            "pickled": -1 if content is None else len(content),
            **used,
        }
        channel.send(head, content or b"")


def enter_groups(entrances: list[str]) -> None:
    """Into the groups that hold this task's limits: without them it must not run."""
    try:
        system.enter_groups(entrances)
    except OSError as error:
        raise failures.Refusal("start_failed", f"its control group cannot be entered: {error}") from error


class Rehearsal:
    """A no-op task, run by an idle child before its first: it brings in the pages that a task would wait for."""

    def __init__(self) -> None:
        import cloudpickle

        function, args = cloudpickle.dumps(lambda: None, protocol=5), pickle.dumps(((), {}), 5)
        self._body = function + args
        self.frame = wire.pack(
            {
                "t": "task",
                "attempt": "",
                "job": "",
                "index": 0,
                "function": "rehearsal",
                "parts": [["function", len(function)], ["args", len(args)]],
                "cpus": None,
                "threads": 0,
                "env": {},
                "limits": {},
            },
            self._body,
        )
        self._head = self.frame[wire.HEADER.size : -len(self._body)]

    def run(self, runner: Runner) -> None:
        runner.rehearse(wire.decode_head(self._head), memoryview(self._body))


class SetupBroke(Exception):
    """`setup` (or a preload) was replayed in this child and raised; `head` is what to say of it."""

    def __init__(self, head: dict[str, Any]) -> None:
        super().__init__(head.get("message", ""))
        self.head = head


class Usage:
    """What this process and the children that it has reaped use between now and `stop`.

    `below` is what those children had used before; asked for here where it is not known from the task before.
    """

    __slots__ = ("_own", "_wall", "below")

    def __init__(self, below: resource.struct_rusage | None = None) -> None:
        self._own = resource.getrusage(resource.RUSAGE_SELF)
        self.below = below or resource.getrusage(resource.RUSAGE_CHILDREN)
        self._wall = time.perf_counter()

    @classmethod
    def since(cls, own: resource.struct_rusage, wall: float) -> Usage:
        """Of a process without children of its own, whose use was this at that time."""
        usage = cls.__new__(cls)
        usage._own, usage._wall = own, wall
        usage.below = _NONE_USED
        return usage

    def stop(self) -> dict[str, float]:
        wall = time.perf_counter() - self._wall
        own = resource.getrusage(resource.RUSAGE_SELF)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        before, below = self._own, self.below
        self.below = children
        return {
            "wall": wall,
            "utime": own.ru_utime - before.ru_utime + children.ru_utime - below.ru_utime,
            "stime": own.ru_stime - before.ru_stime + children.ru_stime - below.ru_stime,
            "minflt": own.ru_minflt - before.ru_minflt + children.ru_minflt - below.ru_minflt,
            "majflt": own.ru_majflt - before.ru_majflt + children.ru_majflt - below.ru_majflt,
            "inblock": own.ru_inblock - before.ru_inblock + children.ru_inblock - below.ru_inblock,
            "oublock": own.ru_oublock - before.ru_oublock + children.ru_oublock - below.ru_oublock,
        }


def _result_frame(content: bytes, used: dict[str, float]) -> bytes:
    return wire.pack_result(content, *[used.get(name, 0) for name in wire.ACCOUNT])


def _pickle_by_value(value: Any) -> bytes:
    import cloudpickle

    try:
        content: bytes = cloudpickle.dumps(value, protocol=5)
    except SystemExit:
        raise
    except BaseException as error:
        raise failures.Refusal("not_serializable", failures.not_serializable(value, error)) from error
    return content


def _too_large(size_bytes: int) -> str:
    return (
        f"the result takes {size_bytes / 1024**3:.1f} GiB pickled; at most {RESULT_BYTES_MAX / 1024**3:.0f} GiB are "
        "allowed: write what is that large to a file or a store, and return its name"
    )


def sealed_memfd(content: bytes) -> int:
    """A memory file with this content, which nobody can change any more. The descriptor is the caller's."""
    fd = os.memfd_create("herder-result", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def flush_all() -> None:
    """Python's `sys.stdout` and `sys.stderr`, then C's streams. Output must be in its pipe before an answer is sent."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            # Closed, replaced or set to None by the task: nothing of ours is in it.
            continue
    C_STREAMS.flush()


def _exit_status(ended: SystemExit) -> int:
    """The status with which Python would have left; a text is written to stderr, as there."""
    code = ended.code
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    try:
        print(code, file=sys.stderr)  # noqa: T201 - what the interpreter does with sys.exit("text")
    except (OSError, ValueError):
        pass
    return 1


def _is_retryable(error: BaseException, retry_on: Any) -> bool:
    """Whether `retry_on` names this exception; without a filter, any."""
    if not retry_on:
        return True
    try:
        return isinstance(error, pickle.loads(retry_on))
    except Exception:  # noqa: BLE001 - types that do not exist here cannot be what was raised here
        return False


def _mismatch(client: str, here: str) -> str:
    theirs, ours = client.partition("/"), here.partition("/")
    return (
        f"the task's code was pickled by value under Python {theirs[0]} with cloudpickle {theirs[2]}, but its "
        f"interpreter ({sys.executable}) is Python {ours[0]} with cloudpickle {ours[2]}. Cures: name a matching "
        "interpreter (Workload(python=...)), or put the code in a module that both can import"
    )


_NOTHING_USED = {"wall": 0.0, "utime": 0.0, "stime": 0.0, "minflt": 0, "majflt": 0, "inblock": 0, "oublock": 0}
#: What a process has used that has just begun.
_NONE_USED = resource.struct_rusage((0.0, 0.0, *[0] * 14))
_STARTED = wire.pack({"t": "started"})
C_STREAMS = system.CStreams()
