"""A client of `chaos.py`, in a process of its own: submits a mixed load until it is told to stop, and writes down all.

What it did stands in `client-NAME.jsonl`: `submit` before the submission, `end` for each end that it is told of (from
the future's callback, so that a second one would show), `accepted` when tasks of a detached job are certainly durable,
`done` when it has waited for everything. It may be killed at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import cloudpickle

import herder
from herder_coordinator.core.clients import DETACHED_KEPT_MAX

cloudpickle.register_pickle_by_value(sys.modules[__name__])

#: Tasks that one client has under way.
IN_FLIGHT_MAX = 40
#: For all ends, after the faults are over.
PATIENCE_S = 180.0


def note(ran: str, key: str) -> str:
    """Say that an attempt begins. Appending a short line is atomic."""
    attempt = os.environ["HERDER_ATTEMPT"].rpartition("/")[2]
    fd = os.open(ran, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{key} {attempt}\n".encode())
    os.close(fd)
    return attempt


def work(ran: str, key: str, seconds: float, *values: Sequence[str], size: int = 0) -> tuple[str, str, bytes]:
    """One task: what it got from others must be what they are named for."""
    attempt = note(ran, key)
    for value in values:
        if not value[0].startswith(key.rpartition("-")[0]):
            raise AssertionError(f"{key} was given the value of {value[0]}")
    time.sleep(seconds)
    return key, attempt, b"x" * size


def fail(ran: str, key: str) -> None:
    """A task that fails each time."""
    note(ran, key)
    raise ValueError(key)


class ChaosClient:
    """Submits, and is told."""

    def __init__(self, client: herder.Client, folder: Path, name: str, seed: int) -> None:
        self._client = client
        self._again = client.options(max_crashes=50, retries=2)
        self._once = client.options(idempotent=False)
        self._ran = str(folder / "ran")
        self._random = random.Random(seed)
        self._name = name
        self._count = 0
        self._room = threading.Semaphore(IN_FLIGHT_MAX)
        #: Futures whose ends have not been told, and their jobs: who drops these is not told.
        self._open: dict[str, object] = {}
        self._all_told = threading.Condition()
        self._file = os.open(folder / f"client-{name}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, **word: Any) -> None:
        """One line."""
        os.write(self._file, (json.dumps(word) + "\n").encode())

    def run(self, stop: Path) -> bool:
        """Submit until `stop` is there; then wait. Whether all ends came."""
        while not stop.exists():
            self._random.choices(
                [
                    self._one,
                    self._at_most_once,
                    self._array,
                    self._diamond,
                    self._command,
                    self._cancelled,
                    self._failing,
                ],
                [35, 15, 15, 10, 10, 10, 5],
            )[0]()
            time.sleep(self._random.expovariate(1 / 0.03))
        with self._all_told:
            is_over = self._all_told.wait_for(lambda: not self._open, PATIENCE_S)
        if not is_over:
            print("still open:", sorted(self._open), file=sys.stderr)
        self.write(t="done")
        return is_over

    def run_detached(self, stop: Path) -> None:
        """Submit detached jobs, and say when they are accepted. Their ends are for another to see."""
        view = self._client.options(detached=True, max_crashes=50, retries=2)
        while not stop.exists():
            self._count += 1
            prefix = f"{self._name}-d{self._count}-"
            keys = [f"{prefix}{n}" for n in range(self._random.randint(3, 12))]
            for key in keys:
                self.write(t="submit", key=key)
            job = view.array(work, [self._ran] * len(keys), keys, [self._random.expovariate(5)] * len(keys))
            next(iter(job.as_completed(PATIENCE_S)))  # one has ended: the message that brought all is durable
            self.write(t="accepted", prefix=prefix, job=job.id)
            time.sleep(self._random.expovariate(1.0))
        self.write(t="done")

    # --- the load ----------------------------------------------------------------------------------------------------

    def _key(self, once: bool = False) -> str:
        self._room.acquire()
        self._count += 1
        key = f"{self._name}-{self._count}"
        self.write(t="submit", key=key, once=once)
        with self._all_told:
            self._open[key] = None
        return key

    def _watch(
        self, key: str, future: herder.Future[Any], attempt_of: Callable[[Any], str], job: herder.Job | None = None
    ) -> None:
        with self._all_told:
            self._open[key] = (future, job)
        future.add_done_callback(lambda done: self._ended(key, future.task_id, done, attempt_of))

    def _ended(self, key: str, task: str, future: Any, attempt_of: Callable[[Any], str]) -> None:
        attempt = ""
        try:
            attempt = attempt_of(future.result(0))
            outcome = "succeeded"
        except CancelledError:
            outcome = "cancelled"
        except Exception as error:  # noqa: BLE001  whatever it is belongs in the record
            outcome = _OUTCOMES.get(type(error).__name__, "failed")
        self.write(t="end", key=key, outcome=outcome, attempt=attempt, task=task)
        with self._all_told:
            self._open.pop(key, None)
            self._all_told.notify_all()
        self._room.release()

    def _one(self) -> herder.Future[Any]:
        key = self._key()
        size = 200_000 if self._random.random() < 0.05 else 0
        future = self._again.submit(work, self._ran, key, min(2.0, self._random.expovariate(6)), size=size)
        self._watch(key, future, _attempt_of_value)
        return future

    def _at_most_once(self) -> None:
        key = self._key(once=True)
        self._watch(key, self._once.submit(work, self._ran, key, self._random.expovariate(8)), _attempt_of_value)

    def _array(self) -> herder.Job:
        once = self._random.random() < 0.4
        keys = [self._key(once) for _ in range(self._random.randint(3, 15))]
        seconds = self._random.choice([0.0, 0.02, 0.1, 0.4])
        view = self._once if once else self._again
        job = view.array(work, [self._ran] * len(keys), keys, [seconds] * len(keys))
        for index, key in enumerate(keys):
            self._watch(key, job.future(index), _attempt_of_value, job)
        return job

    def _diamond(self) -> None:
        first = self._key()
        base = self._again.submit(work, self._ran, first, 0.05)
        self._watch(first, base, _attempt_of_value)
        sides = []
        for _ in range(2):
            key = self._key()
            sides.append(self._again.submit(work, self._ran, key, 0.02, base))
            self._watch(key, sides[-1], _attempt_of_value)
        last = self._key()
        self._watch(last, self._again.submit(work, self._ran, last, 0.0, *sides), _attempt_of_value)

    def _command(self) -> None:
        key = self._key()
        script = 'echo "$KEY ${HERDER_ATTEMPT##*/}" >> "$RAN"; sleep 0.05; echo "${HERDER_ATTEMPT##*/}"'
        future = self._again.command(script, env={"KEY": key, "RAN": self._ran})
        self._watch(key, future, lambda done: str(done.stdout.decode().strip()))

    def _cancelled(self) -> None:
        if self._random.random() < 0.5:
            job = self._array()
            time.sleep(self._random.random() * 0.1)
            job.cancel()
        else:
            future = self._one()
            time.sleep(self._random.random() * 0.1)
            future.cancel()

    def _failing(self) -> None:
        key = self._key()
        future = self._client.options(retries=1, max_crashes=50).submit(fail, self._ran, key)
        self._watch(key, future, _attempt_of_value)


_OUTCOMES = {
    "TaskCrashed": "crashed",
    "TaskPoisoned": "crashed",
    "NodeLost": "lost",
    "DataLost": "lost",
    "CommandFailed": "failed",
    "TaskTimeout": "timed_out",
    "TaskOutOfMemory": "out_of_memory",
}


def _attempt_of_value(value: tuple[str, str, bytes]) -> str:
    return value[1]


def adopt(client: herder.Client, folder: Path) -> int:
    """Attach to each accepted detached job, from another process than the one that submitted it, and write down how its
    tasks ended. How many tasks there were."""
    words = [
        word
        for path in sorted(folder.glob("client-*.jsonl"))
        for word in map(json.loads, path.read_text().splitlines())
        if word["t"] == "accepted"
    ]
    count = 0
    with (folder / "client-~adopted.jsonl").open("a") as file:
        for word in words:
            try:
                job = client.job(word["job"])
            except herder.JobNotFound:
                if len(words) <= DETACHED_KEPT_MAX:
                    raise
                file.write(json.dumps({"key": word["prefix"], "t": "forgotten", "prefix": word["prefix"]}) + "\n")
                continue
            if not job.wait(PATIENCE_S):
                continue  # the checker sees that the ends are missing
            for index in range(len(job)):
                end = _end_of(job.future(index))
                if end["outcome"] == "JobNotFound" and len(words) > DETACHED_KEPT_MAX:
                    end = {"t": "forgotten", "prefix": word["prefix"]}
                file.write(json.dumps({"key": f"{word['prefix']}{index}", **end}) + "\n")
                count += 1
    return count


def _end_of(future: herder.Future[Any]) -> dict[str, str]:
    end = {"t": "end", "outcome": "succeeded", "attempt": "", "task": future.task_id}
    if future.cancelled():
        return {**end, "outcome": "cancelled"}
    error = future.exception(0)
    if error is not None:
        name = type(error).__name__
        return {**end, "outcome": name if name == "JobNotFound" else _OUTCOMES.get(name, "failed")}
    return {**end, "attempt": future.result(0)[1]}


def main() -> int:
    """Run until the file `stop` is in the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("seed", type=int)
    parser.add_argument("--detached", action="store_true")
    parser.add_argument("--adopt", action="store_true")
    given = parser.parse_args()
    # Killed children soon forbid forking where `auto` decides: every other client insists on it.
    workload = herder.Workload("chaos-fork", start="fork") if given.seed % 2 else herder.Workload("chaos-auto")
    client = herder.Client(connect_timeout=PATIENCE_S, workload=workload)
    if given.adopt:
        print(adopt(client, given.folder))
        client.abort()
        return 0
    chaos = ChaosClient(client, given.folder, given.name, given.seed)
    stop = given.folder / "stop"
    is_over = True
    if given.detached:
        chaos.run_detached(stop)
    else:
        is_over = chaos.run(stop)
    client.abort()
    return 0 if is_over else 1


if __name__ == "__main__":
    sys.exit(main())
