"""A crowd of agents without tasks, for `full_size.py`: real links with TLS, certificates and sessions of their own.

`full_size_crowd.py FOLDER ADDRESS FIRST COUNT`: agents FIRST to FIRST + COUNT of the authority in FOLDER. Each says on
stdout `n epoch seconds` when the coordinator has taken in what it has after a greeting, by the machine's monotonic
clock. They end with stdin.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from pathlib import Path

from herder_shared import tls
from herder_shared.errors import HerderError
from herder_shared.ids import Incarnation, NodeName
from herder_shared.limits import GIB, PROTOCOL_VERSION
from herder_shared.wire import messages as m
from herder_shared.wire.stream import Dialler, Link


class Agent:
    """One that never has anything."""

    def __init__(self, n: int) -> None:
        self._n = n

    def opened(self, link: Link) -> None:
        link.send(m.Sync())

    def received(self, link: Link, messages: list[m.Message]) -> None:
        for message in messages:
            if isinstance(message, m.SyncOk):
                print(self._n, link.epoch, time.monotonic(), flush=True)

    def closed(self, link: Link, error: HerderError | None) -> None:
        pass


def node(n: int) -> NodeName:
    """What the agents are called."""
    return NodeName(f"n{n:05d}")


async def main(folder: Path, address: str, first: int, count: int) -> None:
    """Until stdin ends."""
    host, _, port = address.rpartition(":")
    diallers = []
    for n in range(first, first + count):
        identity = folder / f"agent-{n}"
        tls.issue(folder / "authority", identity, "agent", node(n))
        hello = m.Hello(
            PROTOCOL_VERSION,
            tls.cluster_of(identity),
            Incarnation(secrets.token_hex(8)),
            node=m.NodeFacts(node(n), 128, 512 * GIB),
        )
        dialler = Dialler(
            addresses=[(host, int(port))],
            context=tls.client_context(identity),
            server_name=tls.server_name(hello.cluster),
            hello=lambda hello=hello: hello,  # type: ignore[misc]
            observer=Agent(n),
        )
        diallers.append(dialler)
    print("ready", flush=True)
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), over.set)
    async with asyncio.TaskGroup() as group:
        for dialler in diallers:
            group.create_task(dialler.run())
        await over.wait()
        for dialler in diallers:
            await dialler.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
