"""The real core in a simulated shell: sessions, a journal that takes its time, crashes, stalls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Protocol

from herder_coordinator.core import effects, events
from herder_coordinator.core.records import Record
from herder_coordinator.core.snapshot import snapshot
from herder_coordinator.core.state import State, check_invariants, new_state
from herder_coordinator.core.step import finish_replay, replay_record, step
from herder_coordinator.core.views import is_blob_needed
from herder_shared.ids import BlobId, ClusterId, Incarnation, NodeName
from herder_shared.wire.messages import Message, NodeFacts, StartAttempts, TasksEnded
from sim.digest import digest
from sim.disk import Disk
from sim.history import History, Violation
from sim.world import Wire, World

CLUSTER = ClusterId("c" * 32)


class Peer(Protocol):
    def receive(self, wire: Wire, message: Message) -> None: ...
    def closed(self, wire: Wire) -> None: ...


class Coordinator:
    def __init__(self, world: World, history: History, sync_s: Callable[[], float]) -> None:
        self.world = world
        self.history = history
        self.disk = Disk()
        #: The blob store: it survives crashes.
        self.blobs: set[BlobId] = set()
        self.is_up = False
        self.stalled_until_s = 0.0
        self.life = 0
        self._sync_s = sync_s
        self._sessions = 0
        self._agents: dict[NodeName, tuple[int, Wire, Peer]] = {}
        self._clients: dict[Incarnation, tuple[int, Wire, Peer]] = {}
        self._inbox: list[Callable[[], None]] = []
        self._held: list[tuple[int, list[effects.Effect]]] = []
        self._written = 0
        self._synced = 0
        self._is_syncing = False
        self.state: State = new_state(CLUSTER, 0)
        self.start()

    # --- lives -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """A new life: epoch, replay, snapshot, as the program does it."""
        self.life += 1
        epoch = self.disk.epoch + 1
        self.state = new_state(CLUSTER, epoch)
        for record in self.disk.read():
            replay_record(self.state, record)
        finish_replay(self.state, self.world.now_s)
        records = snapshot(self.state)
        self._check_replay(records)
        self.disk.replace(epoch, records)
        self.is_up = True
        self._dropping: Counter[BlobId] = Counter()
        self._held, self._written, self._synced, self._is_syncing = [], 0, 0, False
        self._tick(self.life)

    def _check_replay(self, records: list[Record]) -> None:
        again = new_state(CLUSTER, self.state.epoch)
        for record in records:
            replay_record(again, record)
        finish_replay(again, self.world.now_s)
        if digest(again) != digest(self.state):
            raise Violation(f"a snapshot gives another state:\n{digest(self.state)}\n{digest(again)}")

    def check_journal(self) -> None:
        """What is written so far would give the state that there is."""
        again = new_state(CLUSTER, self.state.epoch)
        for record in self.disk.read_all():
            replay_record(again, record)
        finish_replay(again, self.world.now_s)
        if digest(again) != digest(self.state):
            raise Violation(f"the journal gives another state:\n{digest(self.state)}\n{digest(again)}")

    def crash(self, down_s: float) -> None:
        if not self.is_up:
            return
        self.history.crashes += 1
        self.check_journal()
        self.is_up = False
        self.disk.crash(self.world.random.randint(0, len(self.disk.unsynced)))
        self._inbox.clear()
        self.stalled_until_s = 0.0
        connections = [*self._agents.values(), *self._clients.values()]
        self._agents.clear()
        self._clients.clear()
        for _, wire, peer in connections:
            self._cut(wire, [partial(peer.closed, wire)])
        self.world.after(down_s, self.start)

    def _cut(self, wire: Wire, tell: list[Callable[[], None]]) -> None:
        wire.cut(tell)
        wire.late = False

    def stall(self, seconds: float) -> None:
        self.stalled_until_s = self.world.now_s + seconds
        self.world.after(seconds, self._drain)

    # --- connections -------------------------------------------------------------------------------------------------

    def agent_connects(self, wire: Wire, peer: Peer, facts: NodeFacts, incarnation: Incarnation) -> int:
        """Returns the session, which travels in the welcome. 0: nobody answers."""
        if not self.is_up or self._is_stalled():
            return 0
        self._sessions += 1
        session = self._sessions
        self._agents[facts.node] = (session, wire, peer)
        self.handle(events.AgentConnected(facts, incarnation, session))
        return session

    def client_connects(self, wire: Wire, peer: Peer, incarnation: Incarnation, owner: str) -> int:
        if not self.is_up or self._is_stalled():
            return 0
        self._sessions += 1
        self._clients[incarnation] = (self._sessions, wire, peer)
        self.handle(events.ClientConnected(incarnation, self._sessions, owner))
        return self._sessions

    def post(self, wire: Wire, life: int, event: events.Event) -> None:
        """A message on its way to this life; one that has ended gets nothing."""
        wire.send(0, lambda: self.receive(life, event))

    def receive(self, life: int, event: events.Event) -> None:
        if self.is_up and life == self.life:
            self.handle(event)

    def post_client(self, wire: Wire, life: int, incarnation: Incarnation, event: events.Event) -> None:
        """As the shell does it: what comes from a client's older connection is dropped."""

        def deliver() -> None:
            entry = self._clients.get(incarnation)
            if entry is not None and entry[1] is wire:
                self.receive(life, event)

        wire.send(0, deliver)

    # --- steps -------------------------------------------------------------------------------------------------------

    def _is_stalled(self) -> bool:
        return self.world.now_s < self.stalled_until_s

    def _drain(self) -> None:
        if not self._is_stalled():
            inbox, self._inbox = self._inbox, []
            for what in inbox:
                what()

    def _tick(self, life: int) -> None:
        if self.is_up and life == self.life:
            if not self._is_stalled():
                self.handle(events.Ticked())
            self.world.after(0.5, lambda: self._tick(life))

    def handle(self, event: events.Event) -> None:
        if not self.is_up:
            return
        if self._is_stalled():
            self._inbox.append(lambda: self.handle(event))
            return
        self.history.steps += 1
        self.blobs |= blobs_of(event)
        now: list[effects.Effect] = []
        durable: list[effects.Effect] = []
        records = []
        for effect in step(self.state, event, self.world.now_s):
            if isinstance(effect, effects.Persist):
                records.append(effect.record)
            elif getattr(effect, "after", "now") == "durable":
                durable.append(effect)
                if isinstance(effect, effects.DropBlobs):
                    self._dropping.update(effect.blobs)
            else:
                now.append(effect)
        if records or self.history.steps % 8 == 0:
            check_invariants(self.state)
        self.disk.write(records)
        self._written += len(records)
        self._carry_out(now)
        if durable:
            if self._synced == self._written:
                self._carry_out(durable)
            else:
                self._held.append((self._written, durable))
        self._sync()

    def _sync(self) -> None:
        if self._is_syncing or not self.disk.unsynced:
            return
        self._is_syncing = True
        life, count = self.life, len(self.disk.unsynced)
        self.world.after(self._sync_s(), lambda: self._sync_done(life, count))

    def _sync_done(self, life: int, count: int) -> None:
        if not self.is_up or life != self.life:
            return
        if self._is_stalled():
            self._inbox.append(lambda: self._sync_done(life, count))
            return
        self.disk.sync(count)
        self._synced += count
        self._is_syncing = False
        while self._held and self._held[0][0] <= self._synced:
            self._carry_out(self._held.pop(0)[1])
        self._sync()

    def _carry_out(self, todo: list[effects.Effect]) -> None:
        for effect in todo:
            match effect:
                case effects.SendToAgent():
                    self._check_start(effect.message)
                    entry = self._agents.get(effect.node)
                    if entry is not None and entry[0] == effect.session:
                        self._send(entry, effect.message)
                case effects.SendToClient():
                    self._check_ends(effect.message)
                    entry = self._clients.get(effect.client)
                    if entry is not None:
                        self._send(entry, effect.message)
                case effects.DropAgent():
                    entry = self._agents.get(effect.node)
                    if entry is not None and entry[0] == effect.session:
                        del self._agents[effect.node]
                        _, wire, peer = entry
                        wire.cut([partial(peer.closed, wire)])
                case effects.DropBlobs():
                    self._dropping.subtract(effect.blobs)
                    unused = {blob for blob in effect.blobs if not self._dropping[blob]}
                    self.blobs -= {blob for blob in unused if not is_blob_needed(self.state, blob)}
                case _:
                    pass

    def _check_start(self, message: Message) -> None:
        for start in message.attempts if isinstance(message, StartAttempts) else ():
            for payload in (start.args, *(value for _, _, value in start.deps)):
                if payload.blob is not None and payload.blob not in self.blobs:
                    raise Violation(f"{start.job}.{start.index} was started, and its blob {payload.blob} is gone")

    def _check_ends(self, message: Message) -> None:
        for end in message.ends if isinstance(message, TasksEnded) else ():
            if end.result is not None and end.result.blob is not None and end.result.blob not in self.blobs:
                raise Violation(f"the result {end.result.blob} was announced and is gone")

    def _send(self, entry: tuple[int, Wire, Peer], message: Message) -> None:
        _, wire, peer = entry
        wire.send(1, lambda: peer.receive(wire, message))

    def answer_heartbeat(self, wire: Wire, peer: Peer, message: Message) -> None:
        if self.is_up and not self._is_stalled():
            wire.send(1, lambda: peer.receive(wire, message))


def blobs_of(event: events.Event) -> set[BlobId]:
    """Blobs that were stored before the event was raised."""
    match event:
        case events.TasksSubmitted():
            return {item.args.blob for item in event.tasks if item.args.blob is not None}
        case events.AttemptsEnded() | events.AgentSynced():
            ends = event.ends if isinstance(event, events.AttemptsEnded) else event.ended
            return {end.result.blob for end in ends if end.result is not None and end.result.blob is not None}
        case _:
            return set()
