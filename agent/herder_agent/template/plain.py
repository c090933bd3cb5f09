"""The shortest life of a child: forked with its one task at hand, which needs nothing out of the ordinary.

Theory of operation. What a short task costs is the pages that its process touches first: each is a fault, a copy and
a release, 5 µs and more, and cold Python code touches one every other line. So everything that follows from the task's
head alone is done by the template before the fork (`prepare`), and the child is one flat function over names that were
bound in the template. It is the general way (`child.run_forked`, `task.Runner.run`) cut short: the same steps in the
same order, and what is not plain goes there, be it seen before the fork or only when the task has run.
"""

from __future__ import annotations

import _thread
import atexit
import gc
import os
import pickle
import resource
import sys
import time

from . import child, failures, hooks, system, task, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_ATTEMPT = b"HERDER_ATTEMPT"


def preparation(plan: child.Plan) -> Callable[[child.Order], bool]:
    """In the template: whether a task is a plain one. If so, all is done for it that can be done before the fork.

    The agent says `plain` of a task that asks for nothing but its function, its arguments and its CPUs.
    """
    known, putenv = vars(plan.seen), os.putenv
    #: As `os.environ[...] = ...` would set it, which encodes name and value anew.
    environ = vars(os.environ)["_data"]
    takes_plain, is_set_up_for = plan.takes_plain, plan.runner.is_set_up_for
    usual = plan.runner.threads

    def prepare(order: child.Order) -> bool:
        head, body = order
        if not head["plain"] or not takes_plain:
            return False
        if (head["threads"] != usual or head["python"]) and not is_set_up_for(head["threads"], head["python"]):
            return False
        attempt = head["attempt"].encode()
        putenv(_ATTEMPT, attempt)
        environ[_ATTEMPT] = attempt
        # Left there when the child is forked: the next one's takes its place, and an idle child forgets it.
        known["_task"] = body[: head["len"]]
        return True

    return prepare


def life(plan: child.Plan) -> Callable[[int, child.Ends, child.Order], NoReturn]:
    """What a child does that has a plain task. Made in the template, where all its names are bound."""
    runner, seen, channel, part_streams = plan.runner, plan.seen, plan.channel, plan.part_streams
    make_up, prctl, c_streams, streams, modules = hooks.makes_up(), system.prctl, task.C_STREAMS, sys, sys.modules
    setsid, getpid, getppid, dup2, closerange = os.setsid, os.getpid, os.getppid, os.dup2, os.closerange
    loads, dumps, exit_now, leave, view = pickle.loads, pickle.dumps, os._exit, child.leave, memoryview
    pack_result, head_bytes = wire.RESULT.pack, wire.RESULT_HEAD_BYTES
    stdio_memory, stdio_clean = c_streams.memory, c_streams.clean
    getrusage, clock, enable_gc = resource.getrusage, time.perf_counter, gc.enable
    go_to, count_threads, count_exit_handlers = os.sched_setaffinity, _thread._count, atexit._ncallbacks
    dies_with, reaps = system.PR_SET_PDEATHSIG, system.PR_SET_CHILD_SUBREAPER
    inline_max, unsampled_s, descriptors_end = task.INLINE_BYTES_MAX, task.UNSAMPLED_S, child.DESCRIPTORS_END

    def run(parent: int, ends: child.Ends, order: child.Order) -> NoReturn:
        status = child.STATUS_INTERNAL
        try:
            # As `child._become`.
            cpus = order[0]["cpus"]
            if cpus:
                go_to(0, cpus)
            make_up()
            setsid()
            prctl(dies_with, 9)
            if getppid() != parent:
                exit_now(0)
            prctl(reaps, 1)
            end, out, err = ends
            dup2(out, 1)
            dup2(err, 2)
            own = end.fileno()
            closerange(3, own)
            closerange(own + 1, descriptors_end)
            enable_gc()
            if "multiprocessing.util" in modules:
                child.forget_processes()
            part_streams()
            channel.socket = end
            # As `task.Runner.run`.
            head, body = order
            first, middle, last = head["cuts"]
            pid = getpid()
            usage = None
            value: Any = None
            what = "the task's function"
            try:
                function = loads(body[first:middle])
                what = "the task's arguments"
                args, kwargs = loads(body[middle:last])
                what = ""
                before, began = getrusage(0), clock()
                usage = before, began
                value = function(*args, **kwargs)
                wall = clock() - began
                after, below = getrusage(0), getrusage(-1)
                what = "value"
                content = dumps(value, 5)
                is_plain = (
                    wall < unsampled_s and len(content) <= inline_max and getpid() == pid and type(seen._task) is view
                )
                error = None
            except BaseException as raised:  # noqa: BLE001 - whatever the user's code raised is the task's outcome
                is_plain = False
                error = raised
            if not is_plain:
                status = _answer(runner, channel, pid, what, value, error, usage, body[last:])
                leave(status)
            try:
                streams.stdout.flush()
                streams.stderr.flush()
            except (OSError, ValueError, AttributeError):
                task.flush_all()
            if stdio_memory != stdio_clean:
                c_streams.flush()
            end.sendall(
                pack_result(
                    head_bytes,
                    len(content),
                    1,
                    wall,
                    after[0] - before[0] + below[0],
                    after[1] - before[1] + below[1],
                    after[6] - before[6] + below[6],
                    after[7] - before[7] + below[7],
                    after[9] - before[9] + below[9],
                    after[10] - before[10] + below[10],
                    0,
                )
                + content
            )
            status = 0
            if count_threads() or count_exit_handlers() or "multiprocessing.process" in modules:
                leave(0)
            exit_now(0)
        except (BrokenPipeError, ConnectionResetError):
            status = 0  # the agent is gone
        except BaseException:  # noqa: BLE001 - the top of a process
            child.say_what_broke()
        finally:
            leave(status)
        raise AssertionError("not reached")

    return run


def _answer(  # noqa: PLR0917
    runner: task.Runner,
    channel: wire.Channel,
    pid: int,
    what: str,
    value: Any,
    error: BaseException | None,
    usage: Any,
    retry_on: memoryview,
) -> int:
    """The general way, from where the plain one ends. Returns the status to leave with."""
    used = None
    try:
        if os.getpid() != pid:
            return 0
        if usage is not None:
            used = task.Usage.since(*usage).stop()
            runner.be_young()
            runner.judge(used)
        if error is None or what == "value":
            error = _give(runner, channel, value, used or {})
        elif what and not isinstance(error, SystemExit):
            refused = failures.cannot_unpickle(what, error)
            refused.__cause__ = error
            error = refused
        if error is None:
            return 0
        runner.answer_failure(channel, error, retry_on, used)
    except task.Exit as ended:
        return ended.status
    except (BrokenPipeError, ConnectionResetError):
        return 0
    return 0


def _give(runner: task.Runner, channel: wire.Channel, value: Any, used: dict[str, float]) -> BaseException | None:
    try:
        content = runner.pickle(value)
    except BaseException as error:  # noqa: BLE001 - what pickling raises is the task's outcome
        return error
    runner.answer(channel, content, used)
    return None
