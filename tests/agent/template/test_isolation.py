"""Nothing of one task is seen by another: in forked children of one task, in reused ones, and in fresh interpreters.

Each case changes something of its process, and shows it. The same table is run under every start method.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import pytest

from agent.template import driver

# Nobody but this process can import a test module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

Case = tuple[Callable[[], Any], Callable[[], Any]]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _set_locale() -> None:
    import locale

    locale.setlocale(locale.LC_ALL, "C.UTF-8" if locale.setlocale(locale.LC_ALL) == "C" else "C")


def _locale() -> str:
    import locale

    return locale.setlocale(locale.LC_ALL)


def _mutate_decimal() -> None:
    import decimal

    decimal.getcontext().prec = 3


def _decimal() -> int:
    import decimal

    return decimal.getcontext().prec


def _log() -> None:
    import logging

    logging.basicConfig(level=logging.DEBUG)
    logging.disable(logging.INFO)


def _logging() -> tuple[int, int, int]:
    import logging

    return len(logging.root.handlers), logging.root.level, logging.root.manager.disable


def _set_loop() -> None:
    import asyncio

    class Policy(asyncio.DefaultEventLoopPolicy):
        pass

    asyncio.run(asyncio.sleep(0))
    asyncio.set_event_loop_policy(Policy())


def _loop() -> str:
    import asyncio

    policy = asyncio.get_event_loop_policy()
    return f"{type(policy).__name__} {getattr(vars(policy)['_local'], '_set_called', None)}"


def _set_context() -> None:
    import contextvars

    found = [each for each in contextvars.copy_context() if each.name == "herder-test"]
    (found[0] if found else contextvars.ContextVar("herder-test")).set(5)


def _context() -> list[str]:
    import contextvars

    return [each.name for each in contextvars.copy_context() if each.name == "herder-test"]


def _set_timezone() -> None:
    import time

    os.environ["TZ"] = "XYZ-5"
    time.tzset()


def _timezone() -> int:
    import time

    return time.localtime(0).tm_hour


def _set_tempdir() -> None:
    import tempfile

    tempfile.tempdir = "/nowhere"


def _tempdir() -> str:
    import tempfile

    return tempfile.gettempdir()


def _set_timeout() -> None:
    import socket

    socket.setdefaulttimeout(3)


def _timeout() -> float | None:
    import socket

    return socket.getdefaulttimeout()


def _redirect() -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


def _standard() -> list[bool]:
    return [os.fstat(fd).st_rdev != os.stat("/dev/null").st_rdev for fd in (1, 2)]


def _warn() -> str:
    """What a warning at one place writes: at most once a task."""
    import io

    heard = io.StringIO()
    before, sys.stderr = sys.stderr, heard
    try:
        warnings.warn_explicit("watch out", UserWarning, "somewhere.py", 1, registry=sys.__dict__.setdefault("_w", {}))
    finally:
        sys.stderr = before
    return heard.getvalue()


def _lists() -> tuple[int, ...]:
    return len(sys.path), len(sys.argv), len(sys.meta_path), len(sys.path_hooks), len(warnings.filters)


def _lengthen_lists() -> None:
    sys.path.insert(0, "/nowhere")
    sys.argv.append("word")
    sys.meta_path.append(object())  # type: ignore[arg-type]
    sys.path_hooks.append(lambda path: object())  # type: ignore[arg-type,return-value]
    warnings.simplefilter("error")


def _replace_streams() -> None:
    import io

    sys.stdout, sys.stderr, sys.stdin = io.StringIO(), io.StringIO(), io.StringIO()
    sys.argv, sys.path = ["other"], []
    sys.excepthook = sys.unraisablehook = sys.displayhook = print


def _streams() -> tuple[bool, ...]:
    hooks = [hook is print for hook in (sys.excepthook, sys.unraisablehook, sys.displayhook)]
    own = [type(each).__name__ == "TextIOWrapper" for each in (sys.stdin, sys.stdout, sys.stderr)]
    return (*own, *hooks, sys.argv == ["other"], sys.path == [])


def _trace() -> None:
    sys.settrace(lambda *_: None)
    sys.setprofile(lambda *_: None)


def _change_interpreter() -> None:
    sys.setrecursionlimit(333)
    sys.setswitchinterval(0.5)
    sys.set_int_max_str_digits(700)
    gc.disable()
    gc.set_threshold(5, 6, 7)
    gc.set_debug(gc.DEBUG_STATS)


def _interpreter() -> tuple[Any, ...]:
    limits = sys.getrecursionlimit(), sys.getswitchinterval(), sys.get_int_max_str_digits()
    return *limits, gc.isenabled(), gc.get_threshold(), gc.get_debug()


def _handle_signals() -> None:
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGRTMIN + 3):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    os.close(read)


def _handlers() -> list[bool]:
    numbers = (signal.SIGINT, signal.SIGUSR1, signal.SIGRTMIN + 3, signal.SIGPIPE)
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    return [signal.getsignal(number) in (signal.SIG_DFL, signal.SIG_IGN) for number in numbers[:3]] + [
        signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN,
        wakeup == -1,
    ]


def _set_timers() -> None:
    for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
        signal.setitimer(timer, 100)


def _timers() -> list[bool]:
    return [signal.getitimer(timer)[0] > 0 for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)]


CASES: dict[str, Case] = {
    "environment": (lambda: os.environ.update(LEFT="behind", PATH=""), lambda: (os.getenv("LEFT"), os.getenv("PATH"))),
    "timezone": (_set_timezone, _timezone),
    "folder": (lambda: os.chdir("/proc"), os.getcwd),
    "umask": (lambda: os.umask(0o777) and None, _umask),
    "signal handlers": (_handle_signals, _handlers),
    "signal mask": (
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}),
        lambda: sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    ),
    "timers": (_set_timers, _timers),
    "alarm": (lambda: signal.alarm(100), lambda: signal.getitimer(signal.ITIMER_REAL)[0] > 0),
    "soft limit": (
        lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (50, resource.getrlimit(resource.RLIMIT_NOFILE)[1])),
        lambda: resource.getrlimit(resource.RLIMIT_NOFILE),
    ),
    "affinity": (lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}), lambda: os.sched_getaffinity(0)),
    "descriptors 0 to 2": (_redirect, _standard),
    "lists of sys": (_lengthen_lists, _lists),
    "sys.stdout and hooks": (_replace_streams, _streams),
    "trace and profile": (_trace, lambda: (sys.gettrace() is None, sys.getprofile() is None)),
    "interpreter": (_change_interpreter, _interpreter),
    "warnings seen": (_warn, _warn),
    "locale": (_set_locale, _locale),
    "decimal": (_mutate_decimal, _decimal),
    "logging": (_log, _logging),
    "asyncio": (_set_loop, _loop),
    "context variables": (_set_context, _context),
    "tempfile": (_set_tempdir, _tempdir),
    "socket timeout": (_set_timeout, _timeout),
}


def _both(case: Case) -> Any:
    change, look = case
    change()
    return look()


@pytest.fixture(scope="module")
def once() -> Iterator[driver.Template]:
    with driver.ready(preload=["decimal", "asyncio"]) as running:
        yield running


@pytest.fixture(scope="module")
def often() -> Iterator[driver.Template]:
    with driver.ready(preload=["decimal", "asyncio"], max_tasks_per_child=0) as running:
        yield running


@pytest.fixture(scope="module")
def fresh() -> Iterator[driver.Child]:
    """A fresh interpreter which is used again."""
    with driver.ready(spawner=True) as running:
        child = running.fresh()
        workload = {"preload": [], "max_tasks_per_child": 0}
        child.task_socket.send({"t": "open", "workload": workload, "cloudpickle_path": driver.CLOUDPICKLE_PATH})
        assert child.task_socket.receive()[0]["t"] == "idle"
        yield child


def _needs(name: str) -> None:
    if name == "affinity" and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU cannot be narrowed")


@pytest.mark.parametrize("name", CASES)
def test_forked_children_do_not_see_each_others(once: driver.Template, name: str) -> None:
    _needs(name)
    _, look = CASES[name]
    before = once.fork().run(look)
    assert once.fork().run(_both, CASES[name]) != before
    assert once.fork().run(look) == before
    once.drop_children()


@pytest.mark.parametrize("name", CASES)
def test_a_reused_child_is_as_it_was(often: driver.Template, name: str) -> None:
    _needs(name)
    _check_reused(often.fork(), name)
    often.drop_children()


@pytest.mark.parametrize("name", CASES)
def test_a_reused_fresh_interpreter_is_as_it_was(fresh: driver.Child, name: str) -> None:
    _needs(name)
    _check_reused(fresh, name)


def _check_reused(child: driver.Child, name: str) -> None:
    _, look = CASES[name]
    before = child.run(look)
    assert child.run(_both, CASES[name]) != before
    assert child.run(look) == before
    assert child.run(os.getpid) == child.pid


# --- what cannot be put back -----------------------------------------------------------------------------------------


def _leave_thread() -> None:
    threading.Thread(target=threading.Event().wait, args=(0.3,)).start()


def _leave_process() -> None:
    import subprocess

    subprocess.Popen(["sleep", "100"])


def _leave_descriptors() -> None:
    for _ in range(100):
        os.dup(0)


def _change_user() -> None:
    os.setgid(os.getgid())


def _close_output() -> None:
    sys.stdout.close()


DRIFTS: dict[str, Callable[[], None]] = {
    "thread": _leave_thread,
    "process": _leave_process,
    "user": _change_user,
    "closed output": _close_output,
}


@pytest.mark.parametrize("name", DRIFTS)
def test_a_child_that_cannot_be_put_right_ends_with_its_answer(often: driver.Template, name: str) -> None:
    child = often.fork()
    child.send(DRIFTS[name])
    head, _ = child.answer()
    assert (head["t"], head.get("last")) == ("result", True)
    assert child.exited()["status"] == 0
    often.drop_children()


def test_an_exception_is_no_reason_to_end_but_can_come_with_one(often: driver.Template) -> None:
    def fail(leaves: bool) -> None:
        if leaves:
            _leave_process()
        raise ValueError

    child = often.fork()
    child.send(fail, False)
    assert "last" not in child.answer()[0]
    child.send(fail, True)
    head, error = child.answer()
    assert isinstance(error, ValueError)
    assert head["last"] is True
    often.drop_children()


def test_lowered_hard_limit_is_raised_again_or_ends_the_child(often: driver.Template) -> None:
    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    child = often.fork()
    child.send(lower)
    if child.answer()[0].get("last"):
        assert child.exited()["status"] == 0
    else:
        assert child.run(lambda: resource.getrlimit(resource.RLIMIT_NOFILE))[1] > 64
    often.drop_children()


def test_descriptors_that_tasks_leave_open_end_a_child_in_the_end(often: driver.Template) -> None:
    child = often.fork()
    child.run(_leave_descriptors)
    for _ in range(40):
        child.send(int)
        if child.answer()[0].get("last"):
            break
    else:
        pytest.fail("it goes on")
    assert child.exited()["status"] == 0
    often.drop_children()


def test_threads_and_processes_that_end_are_no_reason_to_end(often: driver.Template) -> None:
    def work() -> int:
        import subprocess
        from concurrent.futures import ThreadPoolExecutor

        subprocess.run(["true"], check=True)
        subprocess.Popen(["true"])  # nobody waits for it
        pool = ThreadPoolExecutor(2)
        threading.Thread(target=threading.Event().wait, args=(100,), daemon=True).start()
        return sum(pool.map(int, "12"))

    child = often.fork()
    assert [child.run(work) for _ in range(3)] == [3, 3, 3]
    assert child.run(os.getpid) == child.pid
    often.drop_children()


def test_threads_variables_hold_for_every_task_of_a_child(often: driver.Template) -> None:
    child = often.fork()
    assert [child.run(os.getenv, "OMP_NUM_THREADS", threads=3) for _ in range(2)] == ["3", "3"]
    often.drop_children()


@pytest.mark.parametrize("is_there", [True, False])
def test_tasks_run_in_the_clients_folder_where_there_is_one(tmp_path: Any, is_there: bool) -> None:
    folder = tmp_path / "clients"
    if is_there:
        folder.mkdir()
    with driver.ready(paths=[str(tmp_path), str(folder)], max_tasks_per_child=0) as running:
        child = running.fork()
        assert child.run(os.getcwd) == (str(folder) if is_there else os.getcwd())
        if is_there:
            folder.rmdir()
            child.run(os.chdir, "/proc")
            assert child.run(os.getcwd) == "/"
            assert running.fork().run(os.getcwd) == "/"


def test_working_dir_goes_before_the_clients_folder(tmp_path: Any) -> None:
    with driver.ready(paths=[str(tmp_path)], working_dir="/proc") as running:
        assert running.fork().run(os.getcwd) == "/proc"


# --- output and locks ------------------------------------------------------------------------------------------------


def _write_by_c() -> None:
    ctypes.CDLL(None).printf(b"mine\n")


def test_what_setup_left_in_buffers_comes_out_once(tmp_path: Any) -> None:
    def setup() -> None:
        sys.stdout.write("python's\n")
        ctypes.CDLL(None).printf(b"C's\n")

    log = tmp_path / "log"
    with driver.ready(setup, log=log) as running:
        for _ in range(2):
            child = running.fork()
            child.run(_write_by_c)
            assert child.output() == ("mine\n", "")
    assert sorted(log.read_text().splitlines()) == ["C's", "python's"]


def test_lock_of_logging_that_a_thread_of_the_template_holds_is_free_in_a_child() -> None:
    def setup() -> None:
        import logging

        handler = logging.StreamHandler()
        logging.root.addHandler(handler)
        holds = threading.Event()

        def hold() -> None:
            handler.acquire()
            holds.set()
            threading.Event().wait()

        threading.Thread(target=hold, daemon=True, name="holder").start()
        holds.wait()

    def log() -> None:
        import logging

        logging.root.warning("heard")

    with driver.ready(setup, allow_threads=["holder"], start="fork") as running:
        child = running.fork()
        child.run(log)
        assert child.output()[1] == "heard\n"


# --- names and numbers -----------------------------------------------------------------------------------------------


def _draw_names() -> list[object]:
    import secrets
    import tempfile
    import uuid

    names = tempfile._get_candidate_names()  # type: ignore[attr-defined]
    return [
        *(os.urandom(8), secrets.token_hex(), uuid.uuid4(), uuid.uuid1(), next(names), random.random()),
        random.SystemRandom().random(),
    ]


@pytest.mark.parametrize("tasks_max", [1, 0])
def test_names_and_numbers_are_new_in_every_task(tasks_max: int) -> None:
    with driver.ready(preload=["tempfile", "uuid", "secrets"], max_tasks_per_child=tasks_max) as running:
        children = [running.fork() for _ in range(2)]
        drawn = [child.run(_draw_names) for child in (children if tasks_max == 1 else children * 2)]
    assert all(len(set(each)) == len(drawn) for each in zip(*drawn, strict=True))
