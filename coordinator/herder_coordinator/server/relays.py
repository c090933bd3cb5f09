"""Running tasks as clients: their agents' messages → links of clients. Decides nothing.

An agent vouches for the attempt, and the core takes the owner from the attempt's task; the client itself is not asked
who it is. For everything else such a link is one as any client's: it only has no socket of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from herder_coordinator.server.clients import Clients
from herder_coordinator.server.transfers import Transfers
from herder_shared import limits
from herder_shared.errors import HerderError, ProtocolMismatch, RemoteProtocolError, Unreachable
from herder_shared.ids import AttemptId, NodeName
from herder_shared.wire import messages as m
from herder_shared.wire.relay import Relayed, read_from_client
from herder_shared.wire.session import Peer, refusal
from herder_shared.wire.stream import Link

log = logging.getLogger(__name__)

#: Tasks' clients of one agent at a time: those that wait, and as many again that are about to.
RELAYS_MAX = 2 * limits.LENT_MAX

Welcome = Callable[[m.Hello, Peer], m.Welcome | m.Refused]


@dataclass(slots=True, eq=False)
class _Relay:
    end: Relayed
    link: Link


class Relays:
    """All tasks' clients, by the link of their agent and their attempt."""

    def __init__(self, clients: Clients, transfers: Transfers, welcome: Welcome) -> None:
        self._clients = clients
        self._transfers = transfers
        self._welcome = welcome
        self._relays: dict[Link, dict[AttemptId, _Relay]] = {}

    def opened(self, agent: Link, node: NodeName, message: m.TaskClientOpened) -> None:
        """A task of this agent's has made itself a client, or the agent is back with it."""
        relays = self._relays.setdefault(agent, {})
        self._close(agent, message.attempt, None)  # it begins anew
        if message.protocol != limits.PROTOCOL_VERSION:
            text = (
                f"the task's interpreter has Herder {message.version}, which speaks protocol {message.protocol}; the "
                f"coordinator speaks {limits.PROTOCOL_VERSION}: install the same version there"
            )
            _drop(agent, message.attempt, ProtocolMismatch(text))
            return
        if len(relays) >= RELAYS_MAX:
            text = f"more than {RELAYS_MAX} tasks of node {node} are clients at a time"
            _drop(agent, message.attempt, HerderError(text))
            return
        peer = Peer("client", f"task {message.attempt} on {node}", agent.peer.cluster, agent.peer.serial)
        hello = m.Hello(
            message.protocol, agent.peer.cluster, message.incarnation, message.version, python=message.python
        )
        welcome = self._welcome(hello, peer)
        if isinstance(welcome, m.Refused):
            agent.send(m.DropTaskClient(message.attempt, welcome.error, welcome.message))
            return
        attempt = message.attempt

        def over(reason: str, refused: m.Refused | None) -> None:
            # Who is ended without a word may come again.
            word = refused or refusal(Unreachable(reason or "the coordinator ended the link"))
            agent.send(m.DropTaskClient(attempt, word.error, word.message))
            self._close(agent, attempt, None)

        end = Relayed(
            carry=lambda body: agent.put(m.TellTaskClient(attempt, body)),
            flushed=agent.flush,
            over=over,
            waiting_bytes=lambda: agent.buffered_bytes,
        )
        relay = relays[attempt] = _Relay(end, end.link(peer, hello, welcome))
        self._clients.opened(relay.link, node, attempt)

    def said(self, agent: Link, message: m.TaskClientSaid) -> None:
        """It says something."""
        relay = self._relays.get(agent, {}).get(message.attempt)
        if relay is None:
            return  # it was dropped, and has not heard of that yet
        try:
            told = read_from_client(message.body)
        except HerderError as error:
            log.warning("%s is dropped: %s", relay.link.peer.name, error)
            relay.link.refuse(refusal(error if not isinstance(error, Unreachable) else RemoteProtocolError(str(error))))
            return
        self._clients.received(relay.link, [told])

    def closed(self, agent: Link, attempt: AttemptId) -> None:
        """Its task is over, or has closed it."""
        relay = self._relays.get(agent, {}).get(attempt)
        if relay is not None:
            self._clients.received(relay.link, [m.Goodbye()])
            self._close(agent, attempt, None)

    def agent_closed(self, agent: Link, error: HerderError | None) -> None:
        """The agent is gone; its tasks may go on, and be back with it."""
        for attempt in list(self._relays.get(agent, ())):
            self._close(agent, attempt, error)
        self._relays.pop(agent, None)

    def _close(self, agent: Link, attempt: AttemptId, error: HerderError | None) -> None:
        relay = self._relays.get(agent, {}).pop(attempt, None)
        if relay is not None:
            relay.end.lose()
            self._transfers.closed(relay.link)
            self._clients.closed(relay.link, error)

    def __len__(self) -> int:
        return sum(len(relays) for relays in self._relays.values())


def _drop(agent: Link, attempt: AttemptId, error: HerderError) -> None:
    word = refusal(error)
    agent.send(m.DropTaskClient(attempt, word.error, word.message))
