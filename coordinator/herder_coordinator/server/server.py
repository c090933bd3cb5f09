"""The coordinator as a whole: puts the parts together, starts them in order, and ends them in order.

Start: HTTP (not ready yet) → journal opened and replayed in a thread → blobs → core loop → agents and clients may
connect. The new epoch is durable before anybody can connect. End: nobody may connect → what is queued becomes durable
and leaves → links are closed → journal closed. After a failure nothing is released any more: links are closed, and
that is all."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from herder_coordinator.core import views
from herder_coordinator.core.effects import Effect, Observe
from herder_coordinator.core.room import Room
from herder_coordinator.core.snapshot import snapshot
from herder_coordinator.core.state import Periods, Policy, State, new_state
from herder_coordinator.core.step import finish_replay, replay_record
from herder_coordinator.journal.interface import Journal, JournalError, StandbyEnded
from herder_coordinator.journal.shelf import FileShelf
from herder_coordinator.server import http, metrics
from herder_coordinator.server.agents import Agents
from herder_coordinator.server.blobs import BlobStore
from herder_coordinator.server.clients import Clients
from herder_coordinator.server.loop import SYNC_HANGS_S, SYNC_PAUSES_S, SYNC_SLOW_S, CoreLoop
from herder_coordinator.server.relays import Relays
from herder_coordinator.server.transfers import Transfers
from herder_shared import tls
from herder_shared.config import HTTP_PORT, PORT, CoordinatorConfig, parse_address
from herder_shared.errors import HerderError
from herder_shared.ids import BlobId, ClusterId, Incarnation, NodeName
from herder_shared.wire.messages import Hello, Message, Refused, StatusInfo, Welcome, WorkloadsReported
from herder_shared.wire.session import Peer
from herder_shared.wire.stream import Acceptor, Link

log = logging.getLogger(__name__)

#: At the end: for what is queued to become durable, and for agents that were told to stop to be gone.
DRAIN_S = 5.0
STOP_AGENTS_S = 10.0
#: Between two looks at orphaned blobs.
SWEEP_S = 30.0

OpenJournal = Callable[[Path, ClusterId], Journal]


class Server:
    """One life of the coordinator. `run` starts it, waits until it is told to end, and ends it."""

    def __init__(self, config: CoordinatorConfig, open_journal: OpenJournal) -> None:
        store = BlobStore(config.blob_dir or config.state_dir / "blobs")
        self._shelf = FileShelf(config.state_dir)
        self._prepare(config, open_journal, tls.cluster_of(config.identity), store, Room(self._shelf))
        self.metrics = metrics.Metrics(self._metrics_sources())
        self.http = http.HttpServer(self._http_sources())

    def _prepare(
        self, config: CoordinatorConfig, open_journal: OpenJournal, cluster: ClusterId, store: BlobStore, room: Room
    ) -> None:
        """All but what shows us to the outside."""
        self._config = config
        self._open_journal = open_journal
        self.cluster = cluster
        self.version = own_version()
        self._ended = asyncio.Event()
        self._failure: Exception | None = None
        self._journal: Journal | None = None
        self._core: CoreLoop | None = None
        self._agents: Agents | None = None
        self._clients: Clients | None = None
        self._stops_agents = False
        self._sessions = 0
        self._store = store
        self._room = room
        #: Set with `_ended`, for the thread that opens the journal.
        self._ended_early = threading.Event()
        #: Why we wait for the journal; "" when we do not.
        self._standby = ""
        self._transfers = Transfers(self._store, self._blob_arrived)
        self._acceptor: Acceptor | None = None
        self.address = ""
        self.epoch = 0

    # --- life --------------------------------------------------------------------------------------------------------

    async def run(self, ready: Callable[[Server], None]) -> None:
        """Serve until `end` is called; `ready` is called when agents and clients may connect.

        Raises:
            ConfigError: the identity or an address cannot be used.
            JournalError: the journal cannot be opened, or failed later. Nothing was acknowledged after that.
            Exception: a bug of ours, after which nothing was acknowledged either.
        """
        try:
            await self._start()
            ready(self)
            await self._serve()
        except StandbyEnded:
            log.info("ended while standing by")
        finally:
            await self._stop()
        if self._failure is not None:
            raise self._failure

    def end(self, reason: str) -> None:
        """Begin to end. Idempotent."""
        if not self._ended.is_set():
            log.info("ending: %s", reason)
        self._ended.set()
        self._ended_early.set()

    def stand_by(self, reason: str, seconds: float) -> bool:
        """In the thread that opens the journal: somebody else has it. Wait; False when told to end."""
        if not self._standby:
            log.warning("standing by: the journal is held by another coordinator (%s)", reason)
        self._standby = reason
        return not self._ended_early.wait(seconds)

    async def _start(self) -> None:
        config = self._config
        context = tls.server_context(config.identity)
        await self.http.listen(*parse_address(config.http_listen, HTTP_PORT))
        loop = asyncio.get_running_loop()
        journal = await asyncio.to_thread(self._open)
        start_s = loop.time()  # whoever stood by for days begins now
        journal, state, effects = await asyncio.to_thread(self._replay, start_s, journal)
        log.info("life %d of cluster %s: replayed in %.3f s", journal.epoch, self.cluster, loop.time() - start_s)
        self._assemble(journal, state, effects)
        self._acceptor = Acceptor(
            context=context, cluster=self.cluster, welcome=self._welcome, observer=self, why_not=self._why_not
        )
        host, port = await self._acceptor.listen(*parse_address(config.listen, PORT))
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        log.info("agents and clients at %s, HTTP at http://%s/", self.address, self.http.address)

    def _assemble(self, journal: Journal, state: State, effects: list[Effect]) -> None:
        """Put everything around a state that has been replayed, and let it live."""
        self._journal, self.epoch = journal, journal.epoch
        self._store.open(state.blobs, asyncio.get_running_loop().time())
        core = self._core = CoreLoop(state, journal, self, self._failed)
        self._clients = Clients(core, self._store, self._transfers, self._status)
        relays = Relays(self._clients, self._transfers, self._welcome)
        self._agents = Agents(core, self._store, self._transfers, relays)
        self._clients.shut_down = self._shut_down
        self._clients.who_is_connected = self._who_is_connected
        self._clients.why_no_submissions = self._why_no_submissions
        core.start(effects)

    def _open(self) -> Journal:
        """In a thread. It may have to stand by for a long time."""
        journal = self._open_journal(self._config.state_dir, self.cluster)
        if self._standby:
            log.warning("taking over in epoch %d from %s", journal.epoch, self._standby)
            self._standby = ""
        return journal

    def _replay(self, now_s: float, journal: Journal | None = None) -> tuple[Journal, State, list[Effect]]:
        """In a thread. The state has no other owner yet."""
        journal = journal or self._open()
        try:
            config = self._config
            periods = Periods(
                lease_s=config.lease_s,
                reconnect_grace_s=config.reconnect_grace_s,
                disconnect_grace_s=config.disconnect_grace_s,
            )
            policy = Policy(weights=config.shares, half_life_s=config.share_half_life_s)
            state = new_state(self.cluster, journal.epoch, periods, policy, self._room)
            for record in journal.replay():
                replay_record(state, record)
            effects = finish_replay(state, now_s)
            journal.begin(snapshot(state))
        except BaseException:
            journal.close()
            raise
        return journal, state, effects

    async def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                async with asyncio.timeout(SWEEP_S):
                    await self._ended.wait()
            except TimeoutError:
                self._sweep()

    def _sweep(self) -> None:
        core = self._core
        if core is not None:
            state = core.state
            self._store.sweep(lambda blob: views.is_blob_needed(state, blob), core.now_s())

    async def _stop(self) -> None:
        if self._core is not None and self._failure is None:
            if self._stops_agents:
                await self._stop_agents()
            if not await self._core.wait_durable(DRAIN_S) and self._failure is None:
                log.error("not everything became durable within %g s; it was not acknowledged", DRAIN_S)
        if self._acceptor is not None:
            await self._acceptor.close()
        if self._core is not None:
            self._core.stop()
        await self.http.close()
        self._store.close()
        self._shelf.close()
        if self._journal is not None:
            await asyncio.to_thread(self._close_journal, self._journal)

    def _close_journal(self, journal: Journal) -> None:
        try:
            journal.close()
        except JournalError as error:
            if self._failure is None:
                self._failure = error

    async def _stop_agents(self) -> None:
        agents = self._agents
        if agents is None or not agents.stop_all("herder down"):
            return
        try:
            async with asyncio.timeout(STOP_AGENTS_S):
                await agents.wait_gone()
        except TimeoutError:
            log.warning("%d agents did not end within %g s", len(agents), STOP_AGENTS_S)

    def _shut_down(self) -> None:
        self._stops_agents = True
        self.end("asked to by an admin")

    def _failed(self, error: Exception) -> None:
        """Fail-stop: tell nobody anything any more."""
        self._failure = error
        log.error("nothing is acknowledged any more: %s", error, exc_info=not isinstance(error, JournalError) and error)
        self.end(f"failed: {error}")

    # --- links -------------------------------------------------------------------------------------------------------

    def _why_not(self, peer: Peer) -> str:
        return views.why_not(self._core.state, peer.serial) if self._core is not None else ""

    def _who_is_connected(self) -> Counter[Peer]:
        return self._acceptor.peers() if self._acceptor is not None else Counter()

    def _welcome(self, hello: Hello, peer: Peer) -> Welcome | Refused:
        if self._core is None or self._ended.is_set():
            return Refused("Unreachable", "the coordinator is ending: try again")
        why = self._why_not(peer)
        if why:  # since its handshake
            return Refused("Unauthorized", why)
        self._sessions += 1
        node = hello.node.node if hello.node is not None else None
        return Welcome(
            cluster=self.cluster,
            epoch=self.epoch,
            session=self._sessions,
            version=self.version,
            heartbeat_s=self._config.heartbeat_s,
            lease_s=self._config.lease_s,
            draining=node is not None and views.is_draining(self._core.state, node),
        )

    def _side(self, link: Link) -> Agents | Clients:
        side = self._agents if link.peer.role == "agent" else self._clients
        assert side is not None, "nobody is welcomed before both exist"
        return side

    def opened(self, link: Link) -> None:
        """A peer was welcomed."""
        self._side(link).opened(link)

    def received(self, link: Link, messages: list[Message]) -> None:
        """A peer sent something."""
        if self._failure is not None:
            return
        self._side(link).received(link, messages)
        if link.hello.node is not None:
            for message in messages:
                if type(message) is WorkloadsReported:
                    for report in message.reports:
                        self.metrics.workload_reported(link.hello.node.node, report)

    def closed(self, link: Link, error: HerderError | None) -> None:
        """A link is gone."""
        self._transfers.closed(link)
        self._side(link).closed(link, error)

    def _blob_arrived(self, blob: BlobId) -> None:
        assert self._agents is not None
        assert self._clients is not None
        self._agents.blob_arrived(blob)
        self._clients.blob_arrived()

    # --- where the core's effects go ---------------------------------------------------------------------------------

    def send_to_client(self, client: Incarnation, message: Message) -> None:
        """Outlets."""
        assert self._clients is not None
        self._clients.send(client, message)

    def send_to_agent(self, node: NodeName, session: int, message: Message) -> None:
        """Outlets."""
        assert self._agents is not None
        self._agents.send(node, session, message)

    def flush(self) -> None:
        """Outlets."""
        assert self._agents is not None
        assert self._clients is not None
        self._agents.flush()
        self._clients.flush()

    def drop_agent(self, node: NodeName, session: int, reason: str) -> None:
        """Outlets."""
        assert self._agents is not None
        self._agents.drop(node, session, reason)

    def turn_out(self, serials: Sequence[str]) -> None:
        """Outlets."""
        assert self._core is not None
        assert self._acceptor is not None
        for serial in serials:
            key = self._core.state.revoked[serial]
            who = f"{key.role or 'somebody'} {key.name!r}"
            why = views.why_not(self._core.state, serial)
            out = self._acceptor.turn_out(lambda peer, serial=serial: peer.serial == serial, why)  # type: ignore[misc]
            log.warning("the certificate %s of %s is revoked; connections closed: %d", serial, who, out.total())

    def drop_blobs(self, blobs: Sequence[BlobId]) -> None:
        """Outlets. Another task may have come with the same bytes since this was decided."""
        assert self._core is not None
        state = self._core.state
        self._store.drop([blob for blob in blobs if not views.is_blob_needed(state, blob)])

    def observe(self, observation: Observe) -> None:
        """Outlets."""
        self.metrics.observe(observation)
        if observation.kind.startswith("node_") or observation.kind == "stalled":
            labels = " ".join(f"{name}={value}" for name, value in observation.labels)
            level = logging.INFO if observation.kind == "node_up" else logging.WARNING
            log.log(level, "%s %s (%g)", observation.kind, labels, observation.value)

    def observe_decision(self, seconds: float) -> None:
        """Outlets."""
        self.metrics.decided(seconds)

    def observe_commit(self, seconds: float) -> None:
        """Outlets."""
        self.metrics.committed(seconds)

    # --- what HTTP and metrics read ----------------------------------------------------------------------------------

    def _state(self) -> State | None:
        return self._core.state if self._core is not None else None

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def _status(self, state: State) -> StatusInfo:
        return views.status(state, version=self.version, http=self.http.address)

    def _why_not_ready(self) -> str:
        if self._standby:
            return self._trouble()
        if self._core is None:
            return "the journal is being replayed"
        if self._failure is not None:
            return f"failed: {self._failure}"
        if self._ended.is_set():
            return "ending"
        return self._trouble() if self._core.sync_age_s() > SYNC_HANGS_S else ""

    def _trouble(self) -> str:
        """What is wrong while we live."""
        if self._standby:
            return f"standing by: the journal is held by another coordinator ({self._standby})"
        if self._core is None or self._journal is None:
            return ""
        shortage = self._journal.shortage
        if shortage:
            return f"{shortage}: new submissions are refused until there is room"
        age_s = self._core.sync_age_s()
        if age_s > SYNC_SLOW_S:
            return f"the journal's disk has not answered for {age_s:.1f} s: nothing is acknowledged until it does"
        return ""

    def _why_no_submissions(self) -> str:
        """Why new submissions must wait outside: what is let in stays in memory until it is on disk."""
        if self._core is None or self._journal is None:
            return ""
        age_s = self._core.sync_age_s()
        if age_s > SYNC_PAUSES_S:
            return f"the journal's disk has not answered for {age_s:.0f} s"
        return self._journal.shortage

    def _metrics_sources(self) -> metrics.Sources:
        return metrics.Sources(
            state=self._state,
            now_s=self._now_s,
            version=self.version,
            blob_bytes=lambda: (self._transfers.in_bytes, self._transfers.out_bytes),
            stored_blob_bytes=self._store.total_bytes,
            shelf_bytes=lambda: self._shelf.size_bytes,
            journal_bytes=lambda: self._journal.size_bytes if self._journal is not None else 0,
            refused=lambda: dict(self._acceptor.refusals) if self._acceptor is not None else {},
        )

    def _http_sources(self) -> http.Sources:
        return http.Sources(
            state=self._state,
            now_s=self._now_s,
            status=self._status,
            why_not_ready=self._why_not_ready,
            trouble=self._trouble,
            agents=lambda: self._agents,
            metrics=self.metrics,
        )


@cache
def own_version() -> str:
    """Herder's version, as installed."""
    try:
        return version("herder")
    except PackageNotFoundError:
        return "unknown"
