"""The life of a child: from `fork` (or a fresh interpreter's start) to `_exit`, one task or many.

Order of a forked child (each step before what relies on it): own session · dies with the template · reaps its own
orphans · its standard streams and the task socket, every other descriptor closed · what multiprocessing and random
streams need after a fork · the steps that the template left out · a no-op task, which brings in the pages that a task
will need · tasks. Signal handlers, mask, wake-up descriptor, exit handlers and stdin were put right in the template
(`seal`), once for all.
"""

from __future__ import annotations

import _socket
import atexit
import os
import sys
import time

from . import failures, generators, hooks, preload, streams, system, task, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any, NoReturn

#: A child's task socket, and the write ends of its stdout and stderr pipes.
if TYPE_CHECKING:
    Ends = tuple[_socket.socket, int, int]
    #: The head of a `run` and its body: the task's own head, as text, and its parts.
    Order = tuple[dict[str, Any], memoryview]

#: Threads which a task left running get this long to end, as at the end of a program.
EXIT_LIMIT_S = 5.0
#: The interpreter specialises code that has run this often, and a little more.
WARM_UP_ROUNDS = 20
#: Above every descriptor that a process may have.
DESCRIPTORS_END = 1 << 20
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
        #: Whether children of this template can run plain tasks (`plain`); settled when it is sealed.
        self.takes_plain = False
        #: Whether the workload wants setup's value immortal.
        self.immortal = True
        #: What `ready` says of the sealing, for the workload's report.
        self.account: dict[str, Any] = {}
        # Made here, so that no child has to: writing a few fields costs it fewer pages than making the objects.
        self.runner = task.Runner(seen, python, preload.thread_controller())
        nowhere, self._unused = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        self.channel = wire.Channel(nowhere)
        nowhere.close()
        self._unused.close()
        seen.reach_agent(self.channel)
        self.rehearsal = task.Rehearsal()
        if tasks_max != 1:
            from . import baseline  # noqa: F401 - loaded here, so that no child has to

        self.runner.generators = generators.find(seen.value())
        self.part_streams = streams.parting(self.runner.generators)


def run_forked(plan: Plan, parent: int, ends: Ends, order: Order | None = None) -> NoReturn:
    """Become a child, with its task socket and the write ends of its stdout and stderr pipes. One that has its only
    task from the start needs no rehearsal."""
    status = STATUS_INTERNAL
    try:
        _become(plan, parent, ends)
        if order is not None:
            run_one(plan, order)
            leave(0)
        _replay(plan)
        plan.rehearsal.run(plan.runner)
        status = serve(plan.channel, plan.runner, plan.tasks_max)
    except BaseException:  # noqa: BLE001 - the top of a process: nothing of it may run on into the template's code
        say_what_broke()
    finally:
        leave(status)
    raise AssertionError("not reached")


def run_one(plan: Plan, order: Order) -> None:
    """The life of a child whose task came with the fork, after `_become`."""
    run, body = order
    head = wire.decode_head(bytes(body[: run["len"]]))
    plan.runner.be_young()
    try:
        plan.runner.run(plan.channel, head, body[run["len"] :])
    except task.Exit as ended:
        leave(ended.status)
    except (BrokenPipeError, ConnectionResetError):
        return


def _become(plan: Plan, parent: int, ends: Ends) -> None:
    hooks.makes_up()()
    os.setsid()
    system.die_with(parent)
    system.become_subreaper()
    _take_descriptors(plan.kept, ends)
    _after_fork(plan)
    plan.channel.socket = ends[0]


def warm_up(plan: Plan) -> None:
    """In the template: do what children will do, often enough that the interpreter's caches are full and its code has
    specialised itself. What it writes now, no child has to."""
    agent, own = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    plan.channel.socket = own
    for _ in range(WARM_UP_ROUNDS):
        plan.rehearsal.run(plan.runner)
        agent.sendall(plan.rehearsal.frame)
        serve(plan.channel, plan.runner, 1)
        agent.recv(wire.BUFFER_BYTES)
    plan.runner.forget()
    own.close()
    agent.close()


def run_fresh(fd: int) -> NoReturn:
    """The life of a fresh interpreter's child, whose task socket is `fd`."""
    status = STATUS_INTERNAL
    try:
        if sys.stdout is not None:
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.set_inheritable(fd, False)
        channel = wire.adopt(fd)
        frame = channel.receive()
        if frame is None:
            os._exit(0)
        opening, setup = frame[0], bytes(frame[1])
        if opening.get("value"):
            (opening["value_fd"],) = channel.take_descriptors(1)
        seen = load_seen()
        steps = preload.Preload(opening, setup, seen)
        if opening.get("value"):
            os.close(opening["value_fd"])
        try:
            for name in steps.names:
                steps.take(name)
        except preload.Broken as broken:
            task.flush_all()
            channel.send({"t": "failed", **broken.head})
            os._exit(0)
        task.C_STREAMS.settle()
        seen.reach_agent(channel)
        runner = task.Runner(seen, preload.python_tag(), preload.thread_controller())
        runner.find_generators()
        channel.send({"t": "idle", "python": runner.python, "setup_from": steps.setup_from, "setup_s": steps.setup_s})
        workload = opening.get("workload") or {}
        status = serve(channel, runner, int(workload.get("max_tasks_per_child", 1)))
    except BaseException:  # noqa: BLE001 - the top of a process
        say_what_broke()
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
        if done == tasks_max or runner.unfit:
            return 0
        runner.restore()


def say_what_broke() -> None:
    """The last words of a process of ours that should not have ended so."""
    sys.stderr.write(failures.traceback_text(sys.exc_info()[1] or RuntimeError("unknown")))


def leave(status: int) -> NoReturn:
    """End as a program does, but without the finalisation that touches every page.

    Waited for or run are the task's threads, its exit handlers and its output.
    """
    try:
        _wind_up()
    except BaseException as error:  # noqa: BLE001 - the last words of a process
        sys.stderr.write(f"herder: while the task's process ended: {failures.traceback_text(error)}")
    finally:
        os._exit(status)


def _wind_up() -> None:
    _join_threads()
    _end_multiprocessing()
    atexit._run_exitfuncs()
    task.flush_all()


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


def _take_descriptors(kept: list[Kept], ends: Ends) -> None:
    """Put the pipes at 1 and 2, and close all that is not the child's own or needed by children."""
    channel, out, err = ends
    # Neither of these is below 3: the template holds 0 to 3 itself, so no dup2 hits a source.
    os.dup2(out, 1)
    os.dup2(err, 2)
    own = channel.fileno()
    low = 3
    for fd in sorted([own, *(each.fd for each in kept)]) if kept else (own,):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, DESCRIPTORS_END)
    for each in kept:
        if each.reopen:
            _reopen(each)


def _reopen(kept: Kept) -> None:
    try:
        fd = os.open(f"/proc/self/fd/{kept.fd}", kept.flags)
    except OSError:
        # Deleted since, or not readable again: better none than a shared offset. Or closed by its library's fork hook.
        os.closerange(kept.fd, kept.fd + 1)
        return
    os.lseek(fd, kept.offset, os.SEEK_SET)
    os.dup2(fd, kept.fd, inheritable=False)
    os.close(fd)


def _after_fork(plan: Plan) -> None:
    import gc

    gc.enable()
    if "multiprocessing.util" in sys.modules:
        forget_processes()
    plan.part_streams()


def forget_processes() -> None:
    """What the template's multiprocessing has started is not this process's."""
    sys.modules["multiprocessing.process"]._children.clear()
    sys.modules["multiprocessing.util"]._run_after_forkers()


def _replay(plan: Plan) -> None:
    try:
        for name in plan.rest:
            plan.steps.take(name)
        if plan.rest:
            plan.runner.find_generators()
    except preload.Broken as broken:
        plan.runner.setup_error = broken.head


def _join_threads() -> None:
    threading = sys.modules.get("threading")
    if threading is None or threading.active_count() == 1:
        return
    _wake_executors()
    deadline = time.monotonic() + EXIT_LIMIT_S
    here = threading.current_thread()
    for thread in threading.enumerate():
        if thread is not here and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))


def _wake_executors() -> None:
    """Executors that nobody shut down end when their queues are empty, as `threading._shutdown` has them do.

    Theirs would wait for the threads without limit.
    """
    of_threads, of_processes = (sys.modules.get(f"concurrent.futures.{kind}") for kind in ("thread", "process"))
    if of_threads is not None:
        with of_threads._global_shutdown_lock:
            vars(of_threads)["_shutdown"] = True
            for queue in list(of_threads._threads_queues.values()):
                queue.put(None)
    if of_processes is not None:
        vars(of_processes)["_global_shutdown"] = True
        for wakeup in list(of_processes._threads_wakeups.values()):
            wakeup.wakeup()


def _end_multiprocessing() -> None:
    """Daemonic processes which the task started end with it, as at the end of a program."""
    process = sys.modules.get("multiprocessing.process")
    if process is None:
        return
    for child in list(process._children):
        if child.daemon:
            child.terminate()
