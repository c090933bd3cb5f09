"""Links with agents: messages → events, and orders → messages. Decides nothing about tasks or nodes.

One rule is kept here because it needs the disk: an `AttemptEnd` whose result is a blob becomes an event only when
that blob is durable here. Agents upload a result before they report it, so a missing one is rare (it was dropped as
an orphan, or this life's disk lost it): then it is asked for, and an agent that does not have it any more has lost
the result."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from herder_coordinator.core import views
from herder_coordinator.core.events import (
    AgentConnected,
    AgentDisconnected,
    AgentHeard,
    AgentSynced,
    AttemptsEnded,
    AttemptsStarted,
    SlotsChanged,
    WorkloadsReported,
)
from herder_coordinator.server.blobs import BlobStore
from herder_coordinator.server.coalesce import halve
from herder_coordinator.server.loop import CoreLoop
from herder_coordinator.server.relays import Relays
from herder_coordinator.server.transfers import Transfers
from herder_shared.errors import HerderError, PayloadTooLarge, Unreachable
from herder_shared.ids import BlobId, NodeName
from herder_shared.states import Cause, Outcome
from herder_shared.wire import messages as m
from herder_shared.wire.stream import Link

log = logging.getLogger(__name__)

#: Expositions that one agent may be asked for at once.
PULLS_MAX = 16


@dataclass(slots=True, eq=False)
class _AgentLink:
    link: Link
    node: NodeName
    #: Ends whose result has not arrived yet.
    held: dict[BlobId, list[m.AttemptEnd]] = field(default_factory=dict)
    pulls: dict[int, asyncio.Future[m.Metrics]] = field(default_factory=dict)


class Agents:
    """All live links with agents."""

    def __init__(self, core: CoreLoop, store: BlobStore, transfers: Transfers, relays: Relays) -> None:
        self._core = core
        self._store = store
        self._transfers = transfers
        self._relays = relays
        #: By session; at a time there may be an old and a new one of the same node.
        self._links: dict[int, _AgentLink] = {}
        self._by_node: dict[NodeName, _AgentLink] = {}
        self._unflushed: dict[Link, None] = {}
        self._last_pull = 0
        self._gone = asyncio.Event()

    # --- what links report -------------------------------------------------------------------------------------------

    def opened(self, link: Link) -> None:
        """An agent said hello and was welcomed."""
        facts = link.hello.node
        assert facts is not None, "the session checks that an agent's hello has facts"
        agent = _AgentLink(link, facts.node)
        self._links[link.session] = agent
        self._gone.clear()
        self._by_node[facts.node] = agent
        log.info("agent %s connected (session %d, %d cores)", facts.node, link.session, facts.cores)
        self._core.raise_event(AgentConnected(facts, link.hello.incarnation, link.session, link.peer.serial))

    def closed(self, link: Link, error: HerderError | None) -> None:
        """The link is gone."""
        agent = self._links.pop(link.session, None)
        if agent is None:
            return
        if self._by_node.get(agent.node) is agent:
            del self._by_node[agent.node]
        if not self._links:
            self._gone.set()
        for pull in agent.pulls.values():
            if not pull.done():
                pull.set_exception(Unreachable(f"agent {agent.node} is gone"))
        self._relays.agent_closed(link, error)
        log.info("agent %s disconnected (session %d): %s", agent.node, link.session, error or "closed")
        self._core.raise_event(AgentDisconnected(agent.node, link.session))

    def received(self, link: Link, messages: list[m.Message]) -> None:
        """What the agent sent, in order."""
        agent = self._links.get(link.session)
        if agent is None:
            return
        for message in messages:
            self._receive(agent, message)

    def _receive(self, agent: _AgentLink, message: m.Message) -> None:
        node, session = agent.node, agent.link.session
        match message:
            case m.Heartbeat():
                waiting = views.work_waiting(self._core.state, node)
                agent.link.send(m.HeartbeatAck(message.n, work_waiting=waiting))
                self._core.raise_event(AgentHeard(node, session, message.report))
            case m.AttemptsEnded():
                ends, _ = self._split(agent, message.ends)
                if ends:
                    self._core.raise_event(AttemptsEnded(node, session, ends))
            case m.AttemptsStarted():
                self._core.raise_event(AttemptsStarted(node, session, message.attempts))
            case m.Sync():
                # An end whose result is still on its way counts as running: the agent has the attempt.
                ends, missing = self._split(agent, message.ended)
                late = tuple(m.RunningAttempt(end.attempt, end.job, end.index, started=True) for end in missing)
                self._core.raise_event(AgentSynced(node, session, message.running + late, ends, message.more))
            case m.SlotsChanged():
                self._core.raise_event(SlotsChanged(node, session, message.lent, message.reclaimed))
            case m.TaskClientSaid():
                self._relays.said(agent.link, message)
            case m.TaskClientOpened():
                self._relays.opened(agent.link, node, message)
            case m.TaskClientClosed():
                self._relays.closed(agent.link, message.attempt)
            case m.WorkloadsReported():
                self._core.raise_event(WorkloadsReported(node, session, message.reports))
            case m.Metrics():
                pull = agent.pulls.pop(message.id, None)
                if pull is not None and not pull.done():
                    pull.set_result(message)
            case m.PutBlob():
                self._transfers.put(agent.link, message)
            case m.BlobStored():
                self._transfers.confirmed(agent.link, message)
            case m.WantBlob():
                self._transfers.want(agent.link, message)
            case m.NoBlob():
                self._result_is_lost(agent, message.id)
            case _:
                raise AssertionError(f"the session let a {type(message).__name__} of an agent through")

    # --- results that are blobs --------------------------------------------------------------------------------------

    def _split(
        self, agent: _AgentLink, ends: tuple[m.AttemptEnd, ...]
    ) -> tuple[tuple[m.AttemptEnd, ...], tuple[m.AttemptEnd, ...]]:
        """Those whose results are here, and those whose results are not; the latter are asked for and held."""
        missing = tuple(end for end in ends if (blob := _result_blob(end)) is not None and blob not in self._store)
        for end in missing:
            blob = _result_blob(end)
            assert blob is not None
            if blob not in agent.held and not self._transfers.is_arriving(agent.link, blob):
                agent.link.send(m.WantBlob(blob))
            agent.held.setdefault(blob, []).append(end)
        self._name([blob for end in ends if (blob := _result_blob(end)) is not None])
        return (tuple(end for end in ends if end not in missing), missing) if missing else (ends, ())

    def _name(self, blobs: Sequence[BlobId]) -> None:
        """An event names them, and has been raised or is about to be."""
        if blobs:
            self._core.ask(lambda _state, _now_s: self._store.name(blobs))

    def blob_arrived(self, blob: BlobId) -> None:
        """A blob has become durable: report the ends that waited for it."""
        for agent in list(self._links.values()):
            ends = agent.held.pop(blob, None)
            if ends:
                self._core.raise_event(AttemptsEnded(agent.node, agent.link.session, tuple(ends)))
                self._name([blob])

    def _result_is_lost(self, agent: _AgentLink, blob: BlobId) -> None:
        ends = agent.held.pop(blob, None)
        if not ends:
            return
        log.error("agent %s has lost blob %s, the result of %d attempts", agent.node, blob, len(ends))
        text = f"the result (blob {blob}) was lost: neither the coordinator nor node {agent.node} has it"
        failure = m.Failure(Cause.DATA_LOST, text)
        lost = tuple(msgspec.structs.replace(e, outcome=Outcome.LOST, result=None, failure=failure) for e in ends)
        self._core.raise_event(AttemptsEnded(agent.node, agent.link.session, lost))

    # --- what the coordinator sends ----------------------------------------------------------------------------------

    def send(self, node: NodeName, session: int, message: m.Message) -> None:
        """Send to that session of that node with the next `flush`; nothing happens when it is over."""
        agent = self._links.get(session)
        if agent is None or agent.node != node:
            return
        if type(message) is m.AckAttempts:  # the agent may only forget something
            agent.link.flush_later()
        else:
            self._unflushed[agent.link] = None
        try:
            agent.link.put(message)
        except PayloadTooLarge as error:
            halves = halve(message)
            if halves is not None:
                for half in halves:
                    self.send(node, session, half)
            else:
                self._refuse_start(agent, message, error)

    def flush(self) -> None:
        """What was sent leaves now, in one write for each link."""
        while self._unflushed:
            self._unflushed.popitem()[0].flush()

    def _refuse_start(self, agent: _AgentLink, message: m.Message, error: PayloadTooLarge) -> None:
        """One attempt whose arguments, with the values it depends on, do not fit into a frame: it can never start."""
        if not isinstance(message, m.StartAttempts):
            raise error
        text = f"the arguments and the values of the dependencies together are too large: {error}"
        failure = m.Failure(Cause.PAYLOAD_TOO_LARGE, text)
        ends = tuple(m.AttemptEnd(a.attempt, a.job, a.index, Outcome.FAILED, failure=failure) for a in message.attempts)
        self._core.raise_event(AttemptsEnded(agent.node, agent.link.session, ends))

    def drop(self, node: NodeName, session: int, reason: str) -> None:
        """End that session."""
        agent = self._links.get(session)
        if agent is not None and agent.node == node:
            log.warning("agent %s: session %d is ended: %s", node, session, reason)
            agent.link.close(reason)

    def stop_all(self, reason: str) -> int:
        """Tell every agent to end, leaving nothing behind. How many there are."""
        for agent in self._links.values():
            agent.link.send(m.Stop(reason))
        return len(self._links)

    async def wait_gone(self) -> None:
        """Until no agent has a link."""
        if self._links:
            await self._gone.wait()

    def is_connected(self, node: NodeName) -> bool:
        """Whether there is a link with this node's agent."""
        return node in self._by_node

    def __len__(self) -> int:
        return len(self._links)

    async def pull_metrics(self, node: NodeName, *, openmetrics: bool, timeout_s: float) -> m.Metrics:
        """Ask an agent for its exposition.

        Raises:
            Unreachable: it is not connected, or does not answer in time.
        """
        agent = self._by_node.get(node)
        if agent is None:
            raise Unreachable(f"agent {node} is not connected")
        if len(agent.pulls) >= PULLS_MAX:
            raise Unreachable(f"agent {node} is already being asked {PULLS_MAX} times")
        self._last_pull += 1
        number = self._last_pull
        answer: asyncio.Future[m.Metrics] = asyncio.get_running_loop().create_future()
        agent.pulls[number] = answer
        agent.link.send(m.PullMetrics(number, openmetrics))
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError as error:
            raise Unreachable(f"agent {node} did not answer within {timeout_s:g} s") from error
        finally:
            agent.pulls.pop(number, None)


def _result_blob(end: m.AttemptEnd) -> BlobId | None:
    return end.result.blob if end.result is not None else None
