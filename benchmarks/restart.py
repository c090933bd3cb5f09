"""`restart.py`: how long from the start of a killed coordinator with much in its journal until it dispatches again?

The journal is written by the shipped core and journal in a process that then ends without closing anything: one job of
`--queued` tasks that wait and `--running` that run on one node. Then the real program is started, that node's agent
(the wire's own dialler; no tasks run) comes back with all that ran and with more cores, and the time from the exec to
the first order to start an attempt is taken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from herder_coordinator.core import effects, events
from herder_coordinator.core.records import Record
from herder_coordinator.core.snapshot import snapshot
from herder_coordinator.core.state import new_state
from herder_coordinator.core.step import finish_replay, step
from herder_coordinator.journal.sqlite import open_journal
from herder_shared import tls
from herder_shared.errors import HerderError
from herder_shared.ids import AttemptId, ClusterId, Incarnation, JobId, NodeName, WorkloadKey, blob_id
from herder_shared.limits import BATCH_TASKS_MAX, GIB, PROTOCOL_VERSION
from herder_shared.wire import messages as m
from herder_shared.wire.stream import Dialler, Link

CLUSTER = ClusterId("b" * 32)
NODE = NodeName("n1")
AGENT, CLIENT = Incarnation("a" * 16), Incarnation("c" * 16)
JOB = JobId("0123456789abcdef")
FUNCTION = m.Function(blob_id(b"code"), b"code")
ARGS_BYTES = 100
MUST_S = 5.0
WAIT_S = 120.0


# --- before ----------------------------------------------------------------------------------------------------------


def facts(cores: int) -> m.NodeFacts:
    return m.NodeFacts(NODE, cores, 1024 * GIB)


def write_history(state_dir: Path, queued: int, running: int) -> None:
    """A life of the core, journalled turn by turn; it ends as by kill -9."""
    journal = open_journal(state_dir, CLUSTER)
    state = new_state(CLUSTER, journal.epoch)
    finish_replay(state, 1.0)
    journal.begin(snapshot(state))
    attempts: list[m.RunningAttempt] = []

    def turn(event: events.Event) -> None:
        records: list[Record] = []
        for effect in step(state, event, 2.0):
            if isinstance(effect, effects.Persist):
                records.append(effect.record)
            elif isinstance(effect, effects.SendToAgent) and isinstance(effect.message, m.StartAttempts):
                for start in effect.message.attempts:
                    attempts.append(m.RunningAttempt(start.attempt, start.job, start.index, started=True))
        journal.append(records, lambda _: None)

    build(turn, queued, running)
    assert len(attempts) == running, f"{len(attempts)} attempts were dispatched"
    durable = threading.Event()
    journal.append([], lambda _: durable.set())
    durable.wait()
    inventory = [(list(one.attempt), one.index) for one in attempts]
    (state_dir.parent / "attempts.json").write_text(json.dumps(inventory))
    os._exit(0)


def build(turn: Callable[[events.Event], None], queued: int, running: int) -> None:
    """The node first: so the first tasks run on it, and the rest waits."""
    spec = m.JobSpec(JOB, "many", m.WorkloadSpec(WorkloadKey("feedfeedfeedfeed")), kind="array", detached=True)
    turn(events.ClientConnected(CLIENT, 1, "ann"))
    turn(events.JobOpened(CLIENT, spec))
    turn(events.AgentConnected(facts(running), AGENT, 2))
    turn(events.AgentSynced(NODE, 2, (), ()))
    count = queued + running
    for first in range(0, count, BATCH_TASKS_MAX):
        items = tuple(
            m.TaskItem(m.Payload(number.to_bytes(8, "big") * (ARGS_BYTES // 8)))
            for number in range(first, min(count, first + BATCH_TASKS_MAX))
        )
        turn(events.TasksSubmitted(CLIENT, JOB, first, FUNCTION, items, ""))


# --- after -----------------------------------------------------------------------------------------------------------


class Returning:
    """The agent that comes back: tells what it has, and hears the first order."""

    def __init__(self, running: tuple[m.RunningAttempt, ...]) -> None:
        self._running = running
        self.welcomed_s = 0.0
        self.ordered_s = 0.0
        self.ordered = asyncio.Event()

    def opened(self, link: Link) -> None:
        self.welcomed_s = time.monotonic()
        link.send(m.Sync(self._running))

    def received(self, _link: Link, messages: list[m.Message]) -> None:
        for message in messages:
            if isinstance(message, m.StartAttempts) and not self.ordered.is_set():
                self.ordered_s = time.monotonic()
                self.ordered.set()

    def closed(self, link: Link, error: HerderError | None) -> None:
        del link
        if error is not None:
            print(f"the link ended: {error}", file=sys.stderr)


async def start_again(folder: Path, running: int) -> tuple[float, float]:
    """Seconds from the exec to the welcome, and to the first order."""
    inventory = json.loads((folder / "attempts.json").read_text())
    had = tuple(m.RunningAttempt(AttemptId(*attempt), JOB, index, started=True) for attempt, index in inventory)
    agent = Returning(had)
    listen = "127.0.0.1:0"
    read, write = os.pipe()
    arguments = ["--identity", str(folder / "coordinator"), "--state-dir", str(folder / "state"), "--listen", listen]
    arguments += ["--http-listen", listen, "--hello-fd", str(write), "--log-level", "warning"]
    started_s = time.monotonic()
    command = [sys.executable, "-m", "herder_coordinator", *arguments]
    with subprocess.Popen(command, pass_fds=(write,)) as process:  # noqa: ASYNC220  nothing else goes on here
        os.close(write)
        try:
            with os.fdopen(read) as pipe:
                hello = json.loads(await asyncio.to_thread(pipe.readline))
            host, _, port = hello["address"].rpartition(":")
            dialler = Dialler(
                addresses=[(host, int(port))],
                context=tls.client_context(folder / "agent"),
                server_name=tls.server_name(CLUSTER),
                hello=lambda: m.Hello(PROTOCOL_VERSION, CLUSTER, AGENT, node=facts(running + 100)),
                observer=agent,
            )
            async with asyncio.TaskGroup() as group:
                group.create_task(dialler.run())
                async with asyncio.timeout(WAIT_S):
                    await agent.ordered.wait()
                await dialler.close()
        finally:
            process.kill()
    return agent.welcomed_s - started_s, agent.ordered_s - started_s


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--queued", type=int, default=100_000)
    parser.add_argument("--running", type=int, default=1_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.write is not None:
        write_history(asked.write, asked.queued, asked.running)
    orders: list[float] = []
    for _ in range(asked.runs):
        with tempfile.TemporaryDirectory(prefix="herder-restart-") as name:
            folder = Path(name)
            (folder / "state").mkdir(mode=0o700)
            tls.create_authority(folder / "authority", CLUSTER)
            tls.issue(folder / "authority", folder / "coordinator", "coordinator", "coordinator")
            tls.issue(folder / "authority", folder / "agent", "agent", NODE)
            counts = ["--queued", str(asked.queued), "--running", str(asked.running)]
            subprocess.run([sys.executable, __file__, "--write", str(folder / "state"), *counts], check=True)
            welcome_s, order_s = asyncio.run(start_again(folder, asked.running))
            orders.append(order_s)
            print(f"ready and welcomed after {welcome_s:.2f} s, first order after {order_s:.2f} s")
    median_s = statistics.median(orders)
    verdict = "must" if median_s <= MUST_S else "below"
    what = f"{asked.queued} queued, {asked.running} running"
    print(f"{what}: {median_s:.2f} s to the first dispatch ({verdict}: {MUST_S:g} s)")
    return 0 if median_s <= MUST_S else 1


if __name__ == "__main__":
    sys.exit(main())
