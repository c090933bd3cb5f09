"""`reactions.py`: how long until it shows that something died, and until what was told to end is gone?

Each is measured `--runs` times on a cluster of this machine, with real processes:

dead-task     kill -9 of a task's process, until its client has the error
killed-agent  kill -9 of an agent, until its task's code runs again on another
silent-agent  SIGSTOP of an agent (its connection stays open), until its task's code runs again on another
cancelled     `cancel` of a task that ignores SIGTERM, with a daemon that does too, until the last of them is gone
restarted     kill -9 of the coordinator while tasks run, and a start at once, until a task runs that was queued
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cloudpickle

import herder

cloudpickle.register_pickle_by_value(sys.modules[__name__])

LEASE_S = 5.0
WAIT_S = 60.0
#: What must be reached, in s; cancellation gets the grace of 2 s and half a second.
MUST_S = {"dead-task": 0.1, "killed-agent": 2.0, "silent-agent": LEASE_S + 0.5, "cancelled": 2.5, "restarted": 5.0}


def hold(folder: str, name: str) -> None:
    """Say that an attempt runs; do so until killed, or until the file `gate` is there."""
    part = Path(folder) / f".{name}-{os.getpid()}"
    part.write_text(f"{os.getpid()} {herder.task().node}")
    part.rename(Path(folder) / f"{name}-{os.getpid()}")
    while not (Path(folder) / "gate").exists():
        time.sleep(0.005)


def ignore(folder: str, name: str) -> None:
    """A task and a daemon of its, which both ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        hold(folder, name)
    hold(folder, name)


def seen(folder: Path, name: str) -> dict[int, str]:
    """Processes that said they run as `name`, and where."""
    words = (path.read_text().split() for path in folder.glob(f"{name}-*"))
    return {int(pid): node for pid, node in words}


def wait(condition: Callable[[], bool]) -> float:
    """When it came true."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not within {WAIT_S:g} s")
        time.sleep(0.001)
    return time.monotonic()


def is_gone(pid: int) -> bool:
    """Ended; perhaps not reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@contextlib.contextmanager
def fresh_folder() -> Iterator[Path]:
    """Where tasks say that they run."""
    with tempfile.TemporaryDirectory(prefix="herder-reactions-") as folder:
        yield Path(folder)


def dead_task(cluster: herder.LocalCluster) -> float:
    with fresh_folder() as folder, cluster.client(idempotent=False) as client:
        future = client.submit(hold, str(folder), "a")
        wait(lambda: bool(seen(folder, "a")))
        start_s = time.monotonic()
        os.kill(next(iter(seen(folder, "a"))), signal.SIGKILL)
        future.exception(WAIT_S)
        return time.monotonic() - start_s


def away(cluster: herder.LocalCluster, number: signal.Signals) -> float:
    """Kill or stop the agent of a running task. Both nodes have a template."""
    with fresh_folder() as folder, cluster.client() as client:
        for name in cluster.processes:
            if name != "coordinator":
                client.options(nodes=name).submit(os.getpid).result(WAIT_S)
        future = client.submit(hold, str(folder), "a")
        wait(lambda: bool(seen(folder, "a")))
        node = next(iter(seen(folder, "a").values()))
        start_s = time.monotonic()
        os.kill(cluster.processes[node].pid, number)
        took_s = wait(lambda: len(seen(folder, "a")) == 2) - start_s
        (folder / "gate").touch()
        future.result(WAIT_S)
        if number == signal.SIGSTOP:
            os.kill(cluster.processes[node].pid, signal.SIGCONT)
        else:
            cluster.restart(node)
        wait(lambda: all(node.state == "ready" for node in client.nodes()))
        return took_s


def cancelled(cluster: herder.LocalCluster) -> float:
    with fresh_folder() as folder, cluster.client() as client:
        future = client.submit(ignore, str(folder), "a")
        wait(lambda: len(seen(folder, "a")) == 2)
        pids = list(seen(folder, "a"))
        start_s = time.monotonic()
        future.cancel()
        return wait(lambda: all(map(is_gone, pids))) - start_s


def restarted(cluster: herder.LocalCluster) -> float:
    with fresh_folder() as folder, cluster.client() as client:
        running = [client.submit(hold, str(folder), f"a{n}") for n in range(4)]
        wait(lambda: all(seen(folder, f"a{n}") for n in range(4)))
        queued = client.submit(hold, str(folder), "b")
        client.status()
        start_s = time.monotonic()
        cluster.processes["coordinator"].popen.kill()
        cluster.restart("coordinator")
        (folder / "gate").touch()
        took_s = wait(lambda: bool(seen(folder, "b"))) - start_s
        for future in (*running, queued):
            future.result(WAIT_S)
        return took_s


MEASURES: dict[str, Callable[[herder.LocalCluster], float]] = {
    "dead-task": dead_task,
    "killed-agent": lambda cluster: away(cluster, signal.SIGKILL),
    "silent-agent": lambda cluster: away(cluster, signal.SIGSTOP),
    "cancelled": cancelled,
    "restarted": restarted,
}


def main() -> int:
    """Measure and print; status 1 if a median is beyond what it must be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", default=list(MEASURES), help="some of " + ", ".join(MEASURES))
    parser.add_argument("--runs", type=int, default=10)
    given = parser.parse_args()
    os.environ["HERDER_COORDINATOR_LEASE_S"] = str(LEASE_S)
    is_bad = False
    with herder.LocalCluster(cores=4, agents=2) as cluster:
        with cluster.client() as client:
            client.submit(os.getpid).result(WAIT_S)  # the template is there
        for name in given.names:
            took_s = sorted(MEASURES[name](cluster) for _ in range(given.runs))
            median_s = statistics.median(took_s)
            is_bad = is_bad or median_s > MUST_S[name]
            print(
                f"{name}: median {median_s:.3f} s, least {took_s[0]:.3f}, most {took_s[-1]:.3f} "
                f"({given.runs} runs; must be at most {MUST_S[name]:g} s)",
                flush=True,
            )
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(main())
