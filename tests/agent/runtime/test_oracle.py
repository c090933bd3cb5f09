"""The deadlock oracle against real processes: hangs of every kind, and waits that only look like one."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from herder_agent.core.events import ChildHung, Event, OracleDenied
from herder_agent.core.watch import FIRST_LOOK_S, PROOF_S
from herder_agent.launch.child import Child
from herder_agent.runtime.oracle import Watchdog, look, see_template

pytestmark = pytest.mark.slow

#: Every process below waits this long for what then comes: several times as long as a proof takes.
WAIT_S = 1.6

#: Processes that can never go on.
HANGS = {
    "own lock": "lock = threading.Lock(); lock.acquire(); ready(); lock.acquire()",
    "event nobody sets": "ready(); threading.Event().wait()",
    "abba": """
        a, b, met = threading.Lock(), threading.Lock(), threading.Barrier(2)
        def other():
            with b:
                met.wait()
                a.acquire()
        threading.Thread(target=other, daemon=True).start()
        with a:
            met.wait()
            ready()
            b.acquire()
    """,
    "joins a thread that waits": """
        thread = threading.Thread(target=threading.Event().wait)
        thread.start()
        ready()
        threading.Event().wait()
    """,
    "lock of a thread that vanished at the fork": """
        lock = threading.Lock()
        def hold():
            with lock:
                time.sleep(60)
        threading.Thread(target=hold, daemon=True).start()
        while not lock.locked():
            time.sleep(0.001)
        if os.fork():
            os.wait()
        else:
            ready()
            lock.acquire()
    """,
    "native mutex of a thread that vanished at the fork": """
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        def hold():
            libc.pthread_mutex_lock(mutex)
            held.set()
            time.sleep(60)
        held = threading.Event()
        threading.Thread(target=hold, daemon=True).start()
        held.wait()
        if os.fork():
            os.wait()
        else:
            ready()
            libc.pthread_mutex_lock(mutex)
    """,
    "pool whose threads vanished at the fork": """
        pool = concurrent.futures.ThreadPoolExecutor(1)
        pool.submit(int).result()
        if os.fork():
            os.wait()
        else:
            ready()
            pool.submit(int).result()
    """,
}

#: Processes that look like it and go on after WAIT_S. Each ends by itself, with status 0.
WAITS = {
    "sleep": "ready(); time.sleep(WAIT)",
    "timer": """
        lock = threading.Lock(); lock.acquire()
        threading.Timer(WAIT, lock.release).start()
        ready(); lock.acquire()
    """,
    "event with a time-out": "ready(); threading.Event().wait(WAIT)",
    "thread that reads": """
        child, lock = subprocess.Popen(["sh", "-c", f"sleep {WAIT}; echo x"], stdout=subprocess.PIPE), threading.Lock()
        lock.acquire()
        def read():
            child.stdout.read(); lock.release()
        threading.Thread(target=read).start()
        ready(); lock.acquire(); child.wait()
    """,
    "subprocess": "ready(); subprocess.run(['sleep', str(WAIT)], check=True)",
    "computes in a thread": """
        import numpy
        lock = threading.Lock(); lock.acquire()
        def compute():
            end, a = time.monotonic() + WAIT, numpy.ones((400, 400))
            while time.monotonic() < end:
                a @ a
            lock.release()
        threading.Thread(target=compute).start()
        ready(); lock.acquire()
    """,
    "thread pool": """
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            future = pool.submit(time.sleep, WAIT)
            ready(); future.result()
    """,
    "process pool": """
        with multiprocessing.get_context("fork").Pool(2) as pool:
            ready(); pool.map(time.sleep, [WAIT] * 2)
    """,
    "semaphore of two processes": """
        context = multiprocessing.get_context("fork")
        semaphore = context.Semaphore(0)
        def give():
            time.sleep(WAIT); semaphore.release()
        child = context.Process(target=give); child.start()
        ready(); semaphore.acquire(); child.join()
    """,
    "semaphore in shared memory": """
        import mmap
        libc, memory = ctypes.CDLL(None), mmap.mmap(-1, 4096)
        semaphore = ctypes.byref((ctypes.c_char * 64).from_buffer(memory))
        libc.sem_init(semaphore, 1, 0)
        if os.fork() == 0:
            time.sleep(WAIT); libc.sem_post(semaphore); os._exit(0)
        ready(); libc.sem_wait(semaphore); os.wait()
    """,
    "own signal handler": """
        lock = threading.Lock(); lock.acquire()
        signal.signal(signal.SIGALRM, lambda *_: lock.release())
        signal.setitimer(signal.ITIMER_REAL, WAIT)
        ready(); lock.acquire()
    """,
    "inherited signal handler": """
        lock = threading.Lock(); lock.acquire()
        signal.signal(signal.SIGALRM, lambda *_: lock.release())
        if os.fork():
            sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
        signal.setitimer(signal.ITIMER_REAL, WAIT)
        ready(); lock.acquire()
    """,
    "signal pause": """
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, WAIT)
        ready(); signal.pause()
    """,
    "signal wait in a thread": """
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        lock = threading.Lock(); lock.acquire()
        def wait():
            signal.sigwait([signal.SIGUSR1]); lock.release()
        threading.Thread(target=wait).start()
        subprocess.Popen(["sh", "-c", f"sleep {WAIT}; kill -USR1 {os.getpid()}"])
        ready(); lock.acquire(); os.wait()
    """,
    "asyncio": """
        async def main():
            ready(); await asyncio.to_thread(time.sleep, WAIT)
        asyncio.run(main())
    """,
    "locks handed to and fro": """
        a, b, end = threading.Lock(), threading.Lock(), time.monotonic() + WAIT
        a.acquire()
        def other():
            while time.monotonic() < end:
                a.acquire(); b.release()
        b.acquire()
        threading.Thread(target=other, daemon=True).start()
        ready()
        while time.monotonic() < end:
            a.release(); b.acquire()
    """,
    "locks handed to and fro slowly": """
        a, b, end = threading.Lock(), threading.Lock(), time.monotonic() + WAIT
        a.acquire(); b.acquire()
        def other():
            while time.monotonic() < end:
                time.sleep(0.03); a.release(); b.acquire()
            a.release()
        threading.Thread(target=other, daemon=True).start()
        ready()
        while time.monotonic() < end:
            a.acquire(); time.sleep(0.03); b.release()
    """,
}
_HEAD = f"""
import asyncio, concurrent.futures, ctypes, multiprocessing, os, signal, subprocess, sys, threading, time
WAIT = {WAIT_S}
def ready():
    os.write(1, b"%d\\n" % os.getpid())
"""


@dataclass
class Result:
    hung: str = ""
    after_s: float = 0.0
    status: int | None = None
    others: list[Event] = field(default_factory=list)


def watched(name: str, code: str) -> Result:
    """Run the code in a process of its own under a watchdog, until it ends or is found to hang; then kill it."""
    result = Result()

    async def watch(process: subprocess.Popen[bytes]) -> None:
        loop = asyncio.get_running_loop()
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        ended, began_s = asyncio.Event(), loop.time()

        def tell(event: Event) -> None:
            if isinstance(event, ChildHung):
                result.hung, result.after_s = event.how, loop.time() - began_s
                ended.set()
            else:
                result.others.append(event)

        pidfd = os.pidfd_open(process.pid)
        loop.add_reader(pidfd, ended.set)
        watchdog = Watchdog(loop, lambda _number: True, tell)
        watchdog.add(Child(1, pid, "fork", 0))
        try:
            await asyncio.wait_for(ended.wait(), 30.0)
        finally:
            watchdog.close()
            loop.remove_reader(pidfd)
            os.close(pidfd)

    process = subprocess.Popen(
        [sys.executable, "-c", _HEAD + textwrap.dedent(code)], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        asyncio.run(watch(process))
    finally:
        if result.hung:
            os.killpg(process.pid, 9)
        result.status = process.wait(60)
        assert process.stdout is not None
        process.stdout.close()
    return result


@pytest.mark.parametrize("name", HANGS)
def test_what_can_never_go_on_is_proved_in_a_third_of_a_second(name: str) -> None:
    result = watched(name, HANGS[name])
    assert result.hung == "deadlock"
    # The first look at the earliest; then the proof. What a busy machine adds is not the watchdog's.
    assert FIRST_LOOK_S + PROOF_S - 0.01 <= result.after_s < 3.0
    assert result.others == []


@pytest.mark.parametrize("name", WAITS)
def test_what_goes_on_by_itself_is_left_alone(name: str) -> None:
    result = watched(name, WAITS[name])
    assert (result.hung, result.status, result.others) == ("", 0, [])


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_a_kernel_that_denies_the_look_is_reported_once_and_proves_nothing(
    sleeper: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Event] = []
    real_open = open

    def refuse(path: str, *args: object, **keywords: object) -> object:
        if str(path).endswith("/syscall"):
            raise PermissionError(13, "Permission denied")
        return real_open(path, *args, **keywords)  # type: ignore[call-overload]

    monkeypatch.setattr("builtins.open", refuse)

    async def run() -> None:
        watchdog = Watchdog(asyncio.get_running_loop(), lambda _number: True, told.append)
        watchdog.add(Child(1, sleeper.pid, "fork", 0))
        await asyncio.sleep(0.8)
        watchdog.close()

    asyncio.run(run())
    assert told == [OracleDenied("/proc/PID/syscall is not readable here (Permission denied)")]


def test_a_child_that_is_not_busy_any_more_is_forgotten(sleeper: subprocess.Popen[bytes]) -> None:
    async def run() -> None:
        watchdog = Watchdog(asyncio.get_running_loop(), lambda _number: False, lambda _event: None)
        watchdog.add(Child(1, sleeper.pid, "fork", 0))
        await asyncio.sleep(2 * FIRST_LOOK_S)
        assert watchdog._watched == {}
        assert watchdog._timer is None

    asyncio.run(run())


def test_looking_at_many_children_stays_within_its_share_of_a_core(sleeper: subprocess.Popen[bytes]) -> None:
    async def run() -> float:
        watchdog = Watchdog(asyncio.get_running_loop(), lambda _number: True, lambda _event: None)
        for number in range(400):
            watchdog.add(Child(number, sleeper.pid, "fork", 0))
        await asyncio.sleep(2 * FIRST_LOOK_S)
        before_s = time.thread_time()
        await asyncio.sleep(6.0)
        watchdog.close()
        return (time.thread_time() - before_s) / 6.0

    assert asyncio.run(run()) < 0.02


def test_a_process_that_is_gone_shows_nothing() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert look(process.pid, is_thorough=True) is None
    assert see_template(1, process.pid) is None


def test_a_template_is_seen_with_its_threads_and_memory() -> None:
    seen = see_template(7, os.getpid())
    assert seen is not None
    assert (seen.template, seen.threads) == (7, len(os.listdir("/proc/self/task")))
    assert seen.shared_bytes > 1 << 20
    assert seen.private_bytes > 1 << 20
