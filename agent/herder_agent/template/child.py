"""The life of a child: from `fork` (or a fresh interpreter's start) to `_exit`, one task or many.

Order of a forked child (each step before what relies on it): own session · dies with the template · reaps its own
orphans · its standard streams and the task socket, every other descriptor closed · what multiprocessing and random
streams need after a fork · the steps that the template left out · a no-op task, which brings in the pages that a task
will need · tasks. Signal handlers, mask, wake-up descriptor, exit handlers and stdin were put right in the template
(`seal`), once for all.
"""

from __future__ import annotations

import atexit
import os
import pickle
import sys
import time

from . import failures, preload, system, task, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import NoReturn

#: Descriptor of the task socket in a forked child; 0 to 2 are the standard streams.
TASK_SOCKET = 3
#: Threads which a task left running get this long to end, as at the end of a program.
EXIT_LIMIT_S = 5.0
#: Status of a child whose own code, not the task's, went wrong.
STATUS_INTERNAL = 70


class Kept:
    """A descriptor of the template that children need too. Plain files are opened anew, so that no offset is shared."""

    __slots__ = ("fd", "flags", "offset", "reopen")

    def __init__(self, fd: int, flags: int, offset: int, reopen: bool) -> None:
        self.fd = fd
        self.flags = flags
        self.offset = offset
        self.reopen = reopen


class Plan:
    """What children of a template have in common; made before the first fork."""

    def __init__(
        self, *, seen: ModuleType, python: str, tasks_max: int, rest: list[str], steps: preload.Preload
    ) -> None:
        self.seen = seen
        self.python = python
        #: Tasks per child; 0 is without limit.
        self.tasks_max = tasks_max
        #: Steps to take in each child, since they make the template unsafe to fork.
        self.rest = rest
        self.steps = steps
        self.kept: list[Kept] = []
        self.controller = preload.thread_controller()
        #: Made here, so that the child need not.
        self.warm_up = pickle.dumps((_no_op, (), {}), 5)
        self.buffer = bytearray(wire.BUFFER_BYTES)


def _no_op() -> None:
    return None


def run_forked(plan: Plan, parent: int, sockets: tuple[int, int, int]) -> NoReturn:
    """Become a child: `sockets` are its task socket and the write ends of its stdout and stderr pipes."""
    status = STATUS_INTERNAL
    try:
        os.setsid()
        system.die_with(parent)
        system.become_subreaper()
        _take_descriptors(plan.kept, sockets)
        _after_fork()
        runner = task.Runner(plan.seen, plan.python, plan.controller)
        channel = wire.Channel(TASK_SOCKET, plan.buffer)
        _replay(plan, runner)
        _warm_up(plan)
        status = serve(channel, runner, plan.tasks_max)
    except BaseException:  # noqa: BLE001 - the top of a process: nothing of it may run on into the template's code
        sys.stderr.write(failures.traceback_text(sys.exc_info()[1] or RuntimeError("unknown")))
    finally:
        leave(status)
    raise AssertionError("not reached")


def run_fresh(fd: int) -> NoReturn:
    """The life of a fresh interpreter's child, whose task socket is `fd`."""
    status = STATUS_INTERNAL
    try:
        if sys.stdout is not None:
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.set_inheritable(fd, False)
        channel = wire.Channel(fd)
        frame = channel.receive()
        if frame is None:
            os._exit(0)
        opening, setup = frame[0], bytes(frame[1])
        seen = load_seen()
        steps = preload.Preload(opening, setup, seen)
        try:
            for name in steps.names:
                steps.take(name)
        except preload.Broken as broken:
            task.flush_all()
            channel.send({"t": "failed", **broken.head})
            os._exit(0)
        runner = task.Runner(seen, preload.python_tag(), preload.thread_controller())
        channel.send({"t": "idle", "python": runner.python})
        workload = opening.get("workload") or {}
        status = serve(channel, runner, int(workload.get("max_tasks_per_child", 1)))
    except BaseException:  # noqa: BLE001 - the top of a process
        sys.stderr.write(failures.traceback_text(sys.exc_info()[1] or RuntimeError("unknown")))
    finally:
        leave(status)
    raise AssertionError("not reached")


def serve(channel: wire.Channel, runner: task.Runner, tasks_max: int) -> int:
    """Run tasks until there are no more to run here. Returns the status to leave with."""
    done = 0
    if tasks_max != 1:
        runner.remember()
    while True:
        try:
            frame = channel.receive()
        except wire.BrokenFrame as error:
            sys.stderr.write(f"herder: the agent sent what is no frame: {error}\n")
            return STATUS_INTERNAL
        if frame is None or frame[0].get("t") == "stop":
            return 0
        head, body = frame
        if head.get("t") != "task":
            continue
        try:
            runner.run(channel, head, body)
        except task.Exit as ended:
            return ended.status
        except (BrokenPipeError, ConnectionResetError):
            return 0
        done += 1
        if done == tasks_max:
            return 0
        runner.restore()


def leave(status: int) -> NoReturn:
    """End as a program does, but without the finalisation that touches every page.

    Waited for or run are the task's threads, its exit handlers and its output.
    """
    try:
        _join_threads()
        _end_multiprocessing()
        atexit._run_exitfuncs()
        task.flush_all()
    except BaseException as error:  # noqa: BLE001 - the last words of a process
        sys.stderr.write(f"herder: while the task's process ended: {failures.traceback_text(error)}")
    finally:
        os._exit(status)


def load_seen() -> ModuleType:
    """Load `seen.py` as the importable module `_herder_task`."""
    from importlib.machinery import ModuleSpec, SourceFileLoader

    path = f"{__file__.rpartition('/')[0]}/seen.py"
    loader = SourceFileLoader("_herder_task", path)
    spec = ModuleSpec("_herder_task", loader, origin=path)
    spec.has_location = True
    module = type(sys)("_herder_task")
    module.__spec__ = spec
    module.__file__ = path
    sys.modules["_herder_task"] = module
    loader.exec_module(module)
    return module


def _take_descriptors(kept: list[Kept], sockets: tuple[int, int, int]) -> None:
    """Put the child's own descriptors at 1, 2 and 3, and close all others but those which children need."""
    channel, out, err = sockets
    # Neither of these is below 3: the template holds 0 to 3 itself, so no dup2 hits a source.
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.dup2(channel, TASK_SOCKET, inheritable=False)
    low = TASK_SOCKET + 1
    for each in kept:
        os.closerange(low, each.fd)
        low = each.fd + 1
        if each.reopen:
            _reopen(each)
    os.closerange(low, _DESCRIPTORS_END)


def _reopen(kept: Kept) -> None:
    try:
        fd = os.open(f"/proc/self/fd/{kept.fd}", kept.flags)
    except OSError:
        # Deleted since, or not readable again: better none than a shared offset.
        os.close(kept.fd)
        return
    os.lseek(fd, kept.offset, os.SEEK_SET)
    os.dup2(fd, kept.fd, inheritable=False)
    os.close(fd)


def _after_fork() -> None:
    import gc

    gc.enable()
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        sys.modules["multiprocessing.process"]._children.clear()
        util._run_after_forkers()
    if "numpy.random" in sys.modules or "torch" in sys.modules:
        task.reseed(int.from_bytes(os.urandom(8), "little"))


def _replay(plan: Plan, runner: task.Runner) -> None:
    try:
        for name in plan.rest:
            plan.steps.take(name)
    except preload.Broken as broken:
        runner.setup_error = broken.head


def _warm_up(plan: Plan) -> None:
    """Do what a task does, with nothing: the pages are then this child's own before a task waits for them."""
    function, args, kwargs = pickle.loads(plan.warm_up)
    usage = task.Usage()
    pickle.dumps(function(*args, **kwargs), 5)
    usage.stop()
    usage.text()


def _join_threads() -> None:
    threading = sys.modules.get("threading")
    if threading is None or threading.active_count() == 1:
        return
    deadline = time.monotonic() + EXIT_LIMIT_S
    here = threading.current_thread()
    for thread in threading.enumerate():
        if thread is not here and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))


def _end_multiprocessing() -> None:
    """Daemonic processes which the task started end with it, as at the end of a program."""
    process = sys.modules.get("multiprocessing.process")
    if process is None:
        return
    for child in list(process._children):
        if child.daemon:
            child.terminate()


_DESCRIPTORS_END = 1 << 20
