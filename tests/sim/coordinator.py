"""The shipped coordinator without sockets, TLS, HTTP and metrics: its core, loop, links, transfers and replay, over the
lives that crashes give it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from herder_coordinator.core.effects import Observe
from herder_coordinator.core.records import Record
from herder_coordinator.core.replay import settle_loose
from herder_coordinator.core.room import Room
from herder_coordinator.core.snapshot import snapshot
from herder_coordinator.core.state import State, check_invariants, new_state
from herder_coordinator.core.step import finish_replay, replay_record
from herder_coordinator.journal.interface import JournalError
from herder_coordinator.server.blobs import BlobStore, IncomingBlob
from herder_coordinator.server.server import SWEEP_S, Server
from herder_shared.config import CoordinatorConfig
from herder_shared.ids import BlobId, ClusterId, blob_id
from herder_shared.limits import BLOB_CHUNK_BYTES
from herder_shared.wire import stream
from herder_shared.wire.connection import Connection
from herder_shared.wire.messages import WorkloadReport
from herder_shared.wire.session import Peer
from herder_shared.wire.stream import Acceptor
from sim.digest import digest
from sim.history import History, Violation
from sim.journal import SimJournal, Storage
from sim.network import Network
from sim.world import Program, World, new_program
from support.shelf import MemoryShelf

if TYPE_CHECKING:
    from sim.run import Faults

CLUSTER = ClusterId("c" * 32)
IDENTITY = Peer("coordinator", "coordinator", CLUSTER, "1")
#: One step in so many is followed by a look at all invariants, where the seed has that at all.
CHECK_EVERY = 4


class _Disk:
    """Where a store's threads work: it does what they would at once."""

    def __init__(self, contents: dict[BlobId, bytes]) -> None:
        self.contents = contents

    def submit(self, _unlink: Callable[..., object], paths: Iterable[Path]) -> None:
        for path in paths:
            self.contents.pop(cast("BlobId", path), None)


class _Incoming(IncomingBlob):
    """A blob that is written to the simulated disk."""

    def __init__(self, blob: BlobId, contents: dict[BlobId, bytes]) -> None:
        self._name = blob
        self._contents = contents
        self._bytes = b""

    def write(self, data: bytes) -> None:
        self._bytes += bytes(data)

    def finish(self) -> None:
        assert blob_id(self._bytes) == self._name, "a blob came together wrongly"
        self._contents[self._name] = self._bytes

    def abandon(self) -> None:
        pass


class SimBlobs(BlobStore):
    """The shipped store's account of a simulated disk."""

    def __init__(self, contents: dict[BlobId, bytes]) -> None:
        self._contents = contents
        self._sizes = {}
        self._orphans = {}
        self._review_s = 0.0
        self._threads = _Disk(contents)  # type: ignore[assignment]

    def open(self, named: Iterable[BlobId], now_s: float) -> None:
        self._sizes = {blob: len(content) for blob, content in self._contents.items()}
        wanted = set(named)
        self._review_s = now_s + 600.0
        self._orphans = {blob: now_s + 600.0 for blob in self._sizes if blob not in wanted}

    def read(self, blob: BlobId, offset: int) -> asyncio.Future[bytes]:
        return self.run(lambda: self._read(blob, offset))

    def _read(self, blob: BlobId, offset: int) -> bytes:
        if blob not in self._contents:
            raise FileNotFoundError(blob)
        return self._contents[blob][offset : offset + BLOB_CHUNK_BYTES]

    def incoming(self, blob: BlobId, tag: str) -> IncomingBlob:
        return _Incoming(blob, self._contents)

    def close(self) -> None:
        pass

    def _path(self, blob: BlobId) -> Path:
        return cast("Path", blob)


class _NoMetrics:
    def workload_reported(self, _node: str, _report: WorkloadReport) -> None: ...


class Life(Server):
    """One life of the shipped server. What differs: no HTTP, no metrics, a simulated disk, and no clean end."""

    def __init__(self, coordinator: Coordinator, program: Program) -> None:
        faults = coordinator.faults
        config = CoordinatorConfig(
            identity=Path(),
            state_dir=Path(),
            lease_s=faults.lease_s,
            heartbeat_s=faults.heartbeat_s,
            disconnect_grace_s=faults.disconnect_grace_s,
        )
        self.coordinator = coordinator
        self.program = program
        self._steps = 0
        self._prepare(config, coordinator.open_journal, CLUSTER, SimBlobs(coordinator.blobs), _room(coordinator.world))
        self.metrics = cast("Any", _NoMetrics())

    def begin(self) -> None:
        """Start, in the shipped order."""
        loop = self.program
        journal, state, effects = self._replay(loop.time())
        self.coordinator.check_replayed(state, loop.time())
        self._assemble(journal, state, effects)
        acceptor = self._acceptor = Acceptor(
            context=cast("Any", None), cluster=CLUSTER, welcome=self._welcome, observer=self
        )
        _run_now(acceptor.listen("", 0))
        self.coordinator.network.listen(loop, lambda: _accepted(acceptor), IDENTITY)
        loop.call_later(SWEEP_S, self._sweep_blobs)

    def _sweep_blobs(self) -> None:
        self._sweep()
        self.program.call_later(SWEEP_S, self._sweep_blobs)

    def _failed(self, error: Exception) -> None:
        """Fail-stop: the program ends, and is started again."""
        self._failure = error
        self.coordinator.failed(self, error)

    def observe(self, observation: Observe) -> None:
        pass

    def observe_decision(self, seconds: float) -> None:
        self._steps += 1
        self.coordinator.history.events += 1
        if self.coordinator.faults.is_checked and not self._steps % CHECK_EVERY:
            check_invariants(self.state)

    def observe_commit(self, seconds: float) -> None:
        pass

    @property
    def state(self) -> State:
        assert self._core is not None
        return self._core.state


def _room(world: World) -> Room:
    """Every other history has no memory for what waits."""
    if world.seed % 2:
        return Room()
    return Room(MemoryShelf(), queued_bytes_max=0, ends_bytes_max=0, block_ends=2, job_ends_bytes=0)


def _accepted(acceptor: Acceptor) -> Connection:
    return stream._Accepted(acceptor)


def _run_now(work: Coroutine[Any, Any, object]) -> None:
    """Run a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration:
        return
    raise AssertionError("it waits")


class Coordinator:
    """The coordinator's machine: its disk, and one life after another."""

    def __init__(self, world: World, network: Network, history: History, faults: Faults) -> None:
        self.world = world
        self.network = network
        self.history = history
        self.faults = faults
        self.storage = Storage()
        self.blobs: dict[BlobId, bytes] = {}
        self.life: Life | None = None
        #: Lives that another one has taken over from, and that do not know it yet.
        self.zombies: list[Life] = []
        self.program = new_program(world, "coordinator")
        self.start()
        if faults.busy_s:
            self._be_busy()

    @property
    def is_up(self) -> bool:
        return self.life is not None

    def open_journal(self, _folder: Path, cluster: ClusterId) -> SimJournal:
        random, faults = self.world.random, self.faults
        return SimJournal(
            self.storage, self.program, cluster, lambda: random.random() * 2 * faults.sync_s, faults.disk_errors
        )

    def start(self) -> None:
        """A new life."""
        random, faults = self.world.random, self.faults
        self.history.lives += 1
        self.program = new_program(self.world, "coordinator", lambda: random.random() * faults.sync_s)
        self.life = life = Life(self, self.program)
        self.program.enter(life.begin)

    def check_replayed(self, state: State, now_s: float) -> None:
        """Nothing that was acknowledged is missing, and the snapshot that was just written says the same as the
        journal did."""
        self.history.check_replay(state)
        if self.faults.is_checked:
            self._compare(state, now_s, "the snapshot")

    def check_journal(self) -> None:
        """The journal says each thing once, and all of it together says what the state is."""
        if self.life is None or self.program.is_stopped:
            return
        core: Any = self.life._core
        records = self.storage.records()
        self.history.check_records(records, core.state.epoch)
        if not core._lazy:
            self._compare(core.state, self.program.time(), "the journal")
            self._compare(core.state, self.program.time(), "a compacted journal", self._compacted(core.state.epoch))

    def _compacted(self, epoch: int) -> list[Record]:
        """As if the first half had been compacted while the rest was written. A row is a turn."""
        rows = len(self.storage.rows) + len(self.storage.unsynced)
        state = new_state(CLUSTER, epoch)
        for record in self.storage.records(upto=rows // 2):
            replay_record(state, record)
        settle_loose(state)
        return [*snapshot(state, goes_on=True), *self.storage.records(first=rows // 2)]

    def _compare(self, state: State, now_s: float, what: str, records: list[Record] | None = None) -> None:
        again = new_state(CLUSTER, state.epoch)
        for record in self.storage.records() if records is None else records:
            replay_record(again, record)
        finish_replay(again, now_s)
        if digest(again) != digest(state):
            raise Violation(f"{what} gives another state:\n{digest(state)}\n{digest(again)}")

    # --- what goes wrong ---------------------------------------------------------------------------------------------

    def crash(self, down_s: float) -> None:
        """SIGKILL, or the power goes: any part of what was not synced is on the disk."""
        if self.life is None:
            return
        if self.faults.is_checked:
            self.check_journal()
        self._die()
        self.world.after(down_s, self.start)

    def take_over(self, seconds: float) -> None:
        """Another program takes the journal over, as on a database that all can reach; this one, which was stopped or
        cut off from it, goes on until it notices."""
        if self.life is not None:
            self.zombies.append(self.life)
            self.program.halt(seconds)
            self.life = None
            self.storage.crash(self.world, tears=False)
            self.start()

    def end_zombies(self) -> None:
        """Whoever has not noticed by now is found and stopped."""
        for life in self.zombies:
            life.program.kill()
            self.network.program_died(life.program, tells=True)
        self.zombies.clear()

    def failed(self, life: Life, error: Exception) -> None:
        """It stopped itself."""
        if not isinstance(error, JournalError):
            raise error
        self.world.at(0.0, self._fail_stop, life)

    def _fail_stop(self, life: Life) -> None:
        if life in self.zombies:
            self.zombies.remove(life)
            life.program.kill()
            self.network.program_died(life.program, tells=True)
        elif self.life is life:
            self._die()
            self.world.after(0.5, self.start)

    def _die(self) -> None:
        self.life = None
        self.program.kill()
        self.network.program_died(self.program, tells=True)
        self.storage.crash(self.world)
        self._lose_blobs()

    def _lose_blobs(self) -> None:
        if self.blobs and self.world.chance(self.faults.blob_losses):
            self.history.lost_blobs = True
            del self.blobs[self.world.random.choice(sorted(self.blobs))]

    def fill_disk(self, seconds: float) -> None:
        """Nothing can be written for a while."""
        self.storage.full_until_s = max(self.storage.full_until_s, self.world.now_s + seconds)

    def _be_busy(self) -> None:
        """It has so much to do that it takes in what has come only now and then, all of it at once."""
        world, busy_s = self.world, self.faults.busy_s
        if busy_s:
            if self.life is not None:
                self.program.halt(world.random.random() * busy_s)
            world.after(world.random.random() * 2 * busy_s, self._be_busy)

    def stall(self, seconds: float) -> None:
        """SIGSTOP."""
        if self.life is not None:
            self.program.halt(seconds)
