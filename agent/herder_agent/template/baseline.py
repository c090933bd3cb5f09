"""What one task must not leave to the next in a child that is used again.

After each task what it changed is put back. Where that cannot be done (a thread still runs, a limit was lowered for
good, a process was left) the child has drifted: it says with its answer that it was the last, and ends. All of this is
done thousands of times a second, so what is looked at costs at most one system call, and what is changed rarely, and
only by calls into a few modules of Python's, is looked at when such a call was made.

Not put back is what a reused process is there to keep: imported modules and their variables, caches, open connections.
"""

from __future__ import annotations

import _contextvars
import _locale
import _signal  # type: ignore[import-not-found]
import _thread
import fcntl
import gc
import os
import resource
import select
import signal
import sys
import time
import warnings

from . import generators, streams, system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

#: Non-daemon threads and processes of a task that are about to end get this long to do so, all of a kind together.
LEFT_END_S = 0.05
#: More descriptors than this left open by its tasks, and a child ends. Counted once in so many tasks.
DESCRIPTORS_LEFT_MAX = 64
COUNTED_EVERY_TASKS = 32
#: Calls after which more is looked at than after each task: what they change seldom changes, and looking costs.
_WATCHED = {
    "_signal": ("signal", "siginterrupt", "pthread_sigmask"),
    "signal": ("alarm", "setitimer", "set_wakeup_fd", "siginterrupt"),
    "sys": ("settrace", "setprofile", "setrecursionlimit", "setswitchinterval", "set_int_max_str_digits"),
    "gc": ("enable", "disable", "set_threshold", "set_debug"),
    "_locale": ("setlocale",),
    "locale": ("_setlocale",),
    "resource": ("setrlimit", "prlimit"),
    "os": ("nice", "setpriority", "sched_setscheduler", "sched_setparam"),
}
#: Calls that cannot be undone.
_FINAL = {
    *("setuid", "seteuid", "setreuid", "setresuid", "setgid", "setegid", "setregid", "setresgid", "setgroups"),
    *("initgroups", "chroot", "unshare", "setns"),
}
#: The C functions under `signal`'s, which make an enum of each answer.
_get_handler = _signal.getsignal
_get_mask = _signal.pthread_sigmask
_SIGNALS = [number for number in range(1, _signal.NSIG) if number in signal.valid_signals() - {9, 19}]
_LIMITS = sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")})
#: Where the state of `random`'s module-wide generator lies, after its object's head: an index, which each draw changes,
#: then words, which a new seed changes; and how much of it is looked at.
_RANDOM_OFFSET, _RANDOM_BYTES = object.__basicsize__, 64


def call(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call in a copy of the context: variables that the function sets (decimal's and numpy's settings too) end."""
    return _contextvars.copy_context().run(function, *args, **kwargs)


class Baseline:
    """The state of a process which one task must not leave to the next."""

    def __init__(self, found: generators.Generators) -> None:
        self._found = found
        self._marks: set[str] = set()
        for module, names in (*_WATCHED.items(), ("os", _FINAL)):
            _watch(module, names, self._marks.add)
        self._streams = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (0, 1, 2)]
        self._children_fd = system.open_or_none(f"/proc/self/task/{os.getpid()}/children", os.O_RDONLY)
        self._children = self._read_children()
        self._threads = _thread._count()
        self._tasks = 0
        self._folder = _folder()
        self._umask = os.umask(0o022)
        os.umask(self._umask)
        self._mask = _get_mask(signal.SIG_BLOCK, ())
        self._handlers = list(map(_get_handler, _SIGNALS))
        self._interpreter = _Interpreter()
        self._libraries = _Libraries()
        self._modules_random = _RandomModules()
        self.adopt()
        self._descriptors = len(os.listdir("/proc/self/fd"))

    def adopt(self) -> None:
        """Environment, CPUs, limits and priority are from now on as they are now."""
        self._environment = dict(os.environ._data)  # type: ignore[attr-defined]
        self._cpus = os.sched_getaffinity(0)
        self._limits = list(map(resource.getrlimit, _LIMITS))
        self._priority = os.getpriority(os.PRIO_PROCESS, 0)
        self._scheduler = os.sched_getscheduler(0)
        self._marks.clear()

    def drift(self) -> str:
        """Why this process cannot be used again; "" where it can."""
        if self._marks:
            reason = self._limits_changed()
            if reason:
                return reason
        if _thread._count() > self._threads:
            left = self._threads_left()
            if left:
                return f"thread {left!r} was left running"
        if self._interpreter.has_lost_streams():
            return "its stdout or stderr was closed"
        if self._read_children() != self._children and self._has_children_left():
            return "a process was left running"
        self._tasks += 1
        if self._tasks % COUNTED_EVERY_TASKS == 0:
            left_open = len(os.listdir("/proc/self/fd")) - self._descriptors
            if left_open > DESCRIPTORS_LEFT_MAX:
                return f"{left_open} descriptors were left open"
        return ""

    def restore(self) -> None:
        """Put back what a task may have changed. Raises OSError or ValueError where that is not possible."""
        for fd, kept in enumerate(self._streams):
            os.dup2(kept, fd)
        if self._marks:
            self._restore_signals()
            self._interpreter.restore_settings()
        if os.environ._data != self._environment:  # type: ignore[attr-defined]
            self._restore_environment()
        os.umask(self._umask)
        if os.sched_getaffinity(0) != self._cpus:
            os.sched_setaffinity(0, self._cpus)
        self._interpreter.restore()
        self._libraries.restore()
        self._modules_random.restore()
        if len(self._found):
            self._found.settle()
            self._found.part()
        self._restore_folder()
        self._marks.clear()

    def _restore_folder(self) -> None:
        try:
            if os.getcwd() == self._folder:
                return
        except FileNotFoundError:
            pass
        try:
            os.chdir(self._folder)
        except OSError:
            # It has been removed, which is nothing that this process could put right.
            os.chdir("/")
            self._folder = "/"

    def _restore_signals(self) -> None:
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in zip(_SIGNALS, self._handlers, strict=True):
            if _get_handler(number) is not handler and handler is not None:
                signal.signal(number, handler)

    def _restore_environment(self) -> None:
        now = dict(os.environ._data)  # type: ignore[attr-defined]
        for name in now.keys() - self._environment.keys():
            del os.environb[name]
        for name, value in self._environment.items():
            if now.get(name) != value:
                os.environb[name] = value
        if now.get(b"TZ") != self._environment.get(b"TZ"):
            time.tzset()

    def _limits_changed(self) -> str:
        """Put back limits and priority. Returns what cannot be."""
        final = self._marks.intersection(_FINAL)
        if final:
            return f"it called {', '.join(sorted(final))}"
        try:
            for number, limit in zip(_LIMITS, self._limits, strict=True):
                if resource.getrlimit(number) != limit:
                    resource.setrlimit(number, limit)
            if os.getpriority(os.PRIO_PROCESS, 0) != self._priority:
                os.setpriority(os.PRIO_PROCESS, 0, self._priority)
            if os.sched_getscheduler(0) != self._scheduler:
                os.sched_setscheduler(0, self._scheduler, os.sched_param(0))
        except (OSError, ValueError) as error:
            return f"a limit or its priority was changed for good: {error}"
        return ""

    def _threads_left(self) -> str:
        """The name of a non-daemon thread that the task left."""
        threading = sys.modules.get("threading")
        if threading is None:
            return ""
        deadline = time.monotonic() + LEFT_END_S
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join(max(0.0, deadline - time.monotonic()))
                if thread.is_alive():
                    return str(thread.name)
        return ""

    def _read_children(self) -> bytes:
        return b"" if self._children_fd is None else os.pread(self._children_fd, 4096, 0)

    def _has_children_left(self) -> bool:
        """Whether a process that the task started, and that is no helper of multiprocessing's, still runs."""
        tracker = sys.modules.get("multiprocessing.resource_tracker")
        helper = getattr(getattr(tracker, "_resource_tracker", None), "_pid", None)
        known = {int(word) for word in self._children.split()}
        deadline = time.monotonic() + LEFT_END_S
        left = [pid for pid in map(int, self._read_children().split()) if pid not in known and pid != helper]
        return any(_runs_after(pid, deadline) for pid in left)


class _Interpreter:
    """The interpreter's own settings."""

    def __init__(self) -> None:
        self._out, self._err = sys.stdout, sys.stderr
        self._lists = (sys.argv, sys.path, sys.meta_path, sys.path_hooks, warnings.filters)
        self._contents = tuple(list(each) for each in self._lists)
        self._names = self._look()
        self._settings = [get() for get, _ in _SETTINGS]

    def has_lost_streams(self) -> bool:
        return bool(getattr(self._out, "closed", False) or getattr(self._err, "closed", False))

    def restore(self) -> None:
        if self._look() != self._names:
            self._put()
        if self._lists != self._contents:
            for own, content in zip(self._lists, self._contents, strict=True):
                own[:] = content  # type: ignore[index]
        # A warning that is shown once is shown once to each task.
        warnings._filters_mutated()  # type: ignore[attr-defined]

    def restore_settings(self) -> None:
        for (get, put), value in zip(_SETTINGS, self._settings, strict=True):
            if get() != value:
                put(value)

    @staticmethod
    def _look() -> tuple[object, ...]:
        return (
            sys.stdin,
            sys.stdout,
            sys.stderr,
            sys.argv,
            sys.path,
            sys.meta_path,
            sys.path_hooks,
            sys.excepthook,
            sys.unraisablehook,
            sys.displayhook,
            warnings.filters,
            warnings.showwarning,
        )

    def _put(self) -> None:
        (sys.stdin, sys.stdout, sys.stderr, sys.argv, sys.path, sys.meta_path, sys.path_hooks) = self._names[:7]  # type: ignore[assignment]
        (sys.excepthook, sys.unraisablehook, sys.displayhook) = self._names[7:10]  # type: ignore[assignment]
        (warnings.filters, warnings.showwarning) = self._names[10:]  # type: ignore[assignment]


_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (sys.gettrace, sys.settrace),
    (sys.getprofile, sys.setprofile),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (sys.getswitchinterval, sys.setswitchinterval),
    (sys.get_int_max_str_digits, sys.set_int_max_str_digits),
    (gc.isenabled, lambda is_on: gc.enable() if is_on else gc.disable()),
    (gc.get_threshold, lambda thresholds: gc.set_threshold(*thresholds)),
    (gc.get_debug, gc.set_debug),
    (lambda: _locale.setlocale(_locale.LC_ALL), lambda name: _locale.setlocale(_locale.LC_ALL, name)),
)


class _Libraries:
    """Settings which modules of the standard library keep for the whole process; where they are loaded."""

    def __init__(self) -> None:
        logging = sys.modules.get("logging")
        self._logging: tuple[Any, ...] = ([], 30, 0)
        if logging is not None:
            self._logging = (list(logging.root.handlers), logging.root.level, logging.root.manager.disable)
        decimal = sys.modules.get("decimal")
        self._decimal = None if decimal is None else decimal.getcontext().copy()
        tempfile = sys.modules.get("tempfile")
        self._tempdir = None if tempfile is None else tempfile.tempdir
        socket = sys.modules.get("_socket")
        self._timeout = None if socket is None else socket.getdefaulttimeout()
        events = sys.modules.get("asyncio.events")
        self._policy = None if events is None else events._event_loop_policy
        local = getattr(self._policy, "_local", None)
        self._loop = (getattr(local, "_loop", None), getattr(local, "_set_called", False))

    def restore(self) -> None:
        modules = sys.modules
        if "logging" in modules:
            self._restore_logging(modules["logging"])
        if self._decimal is not None:
            modules["decimal"].setcontext(self._decimal.copy())
        if "tempfile" in modules:
            modules["tempfile"].tempdir = self._tempdir  # type: ignore[attr-defined]
        if "_socket" in modules:
            modules["_socket"].setdefaulttimeout(self._timeout)
        if "asyncio.events" in modules:
            self._restore_asyncio(modules["asyncio.events"])

    def _restore_logging(self, logging: Any) -> None:
        root = logging.root
        handlers, level, disabled = self._logging
        if root.handlers != handlers:
            root.handlers[:] = handlers
        if root.level != level:
            root.setLevel(level)
        if root.manager.disable != disabled:
            root.manager.disable = disabled
            root.manager._clear_cache()

    def _restore_asyncio(self, events: Any) -> None:
        events._set_running_loop(None)
        events._event_loop_policy = self._policy
        local = getattr(self._policy, "_local", None)
        if local is not None:
            local._loop, local._set_called = self._loop


class _RandomModules:
    """The module-wide random streams. A task that drew from one, or seeded it, is the last to know its state."""

    def __init__(self) -> None:
        self._words: list[memoryview] = []
        self._seen: list[bytes] = []
        self._look()

    def restore(self) -> None:
        if len(sys.modules) != self._modules and _random_modules() != self._loaded:
            self._look()
        elif self._is_known and [words.tobytes() for words in self._words] == self._seen:
            return
        streams.seed_anew()
        self._seen = [words.tobytes() for words in self._words]

    def _look(self) -> None:
        """Find where the states lie; torch's, or one that is not where it is thought to be, is always seeded anew."""
        self._modules, self._loaded = len(sys.modules), _random_modules()
        random, numpy, torch = self._loaded
        places = [_random_place()] if random else []
        if numpy:
            places.append(_twister_place(sys.modules["numpy.random"]))
        self._is_known = not torch and 0 not in places
        self._words = [system.memory_at(place, _RANDOM_BYTES) for place in places] if self._is_known else []
        self._seen = [words.tobytes() for words in self._words]


def _random_modules() -> tuple[bool, bool, bool]:
    return "random" in sys.modules, "numpy.random" in sys.modules, "torch" in sys.modules


def _folder() -> str:
    """The current folder; the root where that has been removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        os.chdir("/")
        return "/"


def _random_place() -> int:
    generator = sys.modules["random"]._inst
    address = id(generator) + _RANDOM_OFFSET
    *words, index = generator.getstate()[1]
    expected = b"".join(word.to_bytes(4, sys.byteorder) for word in (index, *words[: _RANDOM_BYTES // 4 - 1]))
    return address if system.read_memory(address, _RANDOM_BYTES) == expected else 0


def _twister_place(numpy: Any) -> int:
    """Of numpy's generator the last words of its state, and then the position, which each draw changes."""
    address = streams.twister_address(numpy)
    return address and address + streams.TWISTER_BYTES + 4 - _RANDOM_BYTES


def _watch(module_name: str, names: Iterable[str], mark: Callable[[str], object]) -> None:
    """Have calls of these functions marked."""
    module = sys.modules.get(module_name)
    for name in names:
        function = getattr(module, name, None)
        if function is not None:
            setattr(module, name, _marked(module_name, name, function, mark))


def _marked(module: str, name: str, function: Any, mark: Callable[[str], object]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        mark(name)
        return function(*args, **kwargs)

    call.__module__, call.__name__, call.__qualname__, call.__doc__ = module, name, name, function.__doc__
    return call


def _runs_after(pid: int, deadline: float) -> bool:
    """Whether a child of this process still runs at this time; one that ends before is reaped."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))
        return os.waitpid(pid, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return False
    finally:
        os.close(pidfd)
