"""A network for the shipped wire: TCP connections which are slow, break, fall silent or are cut off one way or both.

What TCP promises is kept while a connection lives: bytes arrive in order, once. What it does not promise is what the
protocol must bear, and happens: everything under way is lost when a connection breaks, or arrives late, when there are
newer ones; one end learns of it long before the other, or never; a host can be heard and not reached. TLS, which is not
tried here, is left out: `Plain` stands in its place and says who is at the other end.

`doubling` goes further than TCP: each message is delivered twice, but for those which a connection counts (the
greeting, chunks of blobs).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from struct import Struct
from typing import Any, cast

from herder_shared.errors import HerderError
from herder_shared.wire import stream
from herder_shared.wire.connection import Connection, LinkObserver
from herder_shared.wire.messages import Heartbeat, Hello
from herder_shared.wire.session import Peer, is_worth_another_try
from sim.world import Program, World

_LENGTH = Struct(">I")
#: What a connection counts, or a session allows once.
_SINGLE = (b"Hello", b"Welcome", b"Refused", b"PutBlob", b"Goodbye")


class Plain:
    """In TLS's place. `ssl_object` is the peer at the other end."""

    doubles = False

    def __init__(self, _context: object, **_kind: object) -> None:
        self.is_secured = False
        self.has_outgoing = False
        self.ssl_object: Any = None

    def handshake(self, _data: bytes = b"") -> bool:
        self.is_secured = True
        return True

    def receive(self, data: bytes = b"") -> tuple[bytes, bool]:
        return data, False

    def send(self, data: bytes) -> bytes:
        return _doubled(data) if self.doubles else data

    def outgoing(self) -> bytes:
        return b""

    def end(self) -> bytes:
        return b""


def _doubled(data: bytes) -> bytes:
    """Every frame twice, but for what is counted."""
    pieces = []
    start = 0
    while start < len(data):
        stop = start + 4 + _LENGTH.unpack_from(data, start)[0]
        frame = data[start:stop]
        pieces.append(frame)
        if not any(name in frame[4:24] for name in _SINGLE):
            pieces.append(frame)
        start = stop
    return b"".join(pieces)


@contextmanager
def plain_wire() -> Iterator[None]:
    """The shipped wire without TLS."""
    wire: Any = stream
    pipe, peer_of = wire.SecurePipe, wire.peer_of
    wire.SecurePipe, wire.peer_of = Plain, lambda peer: peer
    try:
        yield
    finally:
        wire.SecurePipe, wire.peer_of = pipe, peer_of


class End(asyncio.Transport):
    """One end of a connection, as the program that owns it sees it."""

    def __init__(self, cable: Cable, program: Program, *, is_dialler: bool) -> None:
        super().__init__()
        self.cable = cable
        self.program = program
        self.is_dialler = is_dialler
        self.protocol: Connection | None = None
        self.other: End = self
        #: Closed by its program, or its program knows that the other end is gone.
        self.is_over = False
        self._is_paused = False
        self._unread: list[bytes] = []
        self._free_s = 0.0

    # What the shipped connection calls.

    def write(self, data: Any) -> None:
        if not self.is_over:
            self.cable.carry(self, self.other.arrived, data)

    def write_eof(self) -> None:
        if not self.is_over:
            self.cable.carry(self, self.other.ended, False)

    def abort(self) -> None:
        self.close()

    def close(self) -> None:
        if not self.is_over:
            self.is_over = True
            self.program.call_soon(self._lost, None)
            self.cable.carry(self, self.other.ended, True)

    def is_closing(self) -> bool:
        return self.is_over

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None:
        self._is_paused = True

    def resume_reading(self) -> None:
        self._is_paused = False
        unread, self._unread = self._unread, []
        for data in unread:
            self.program.call_soon(self._receive, data)

    # What the network does.

    def arrived(self, data: bytes) -> None:
        if self.is_over:
            return
        if self._is_paused:
            self._unread.append(data)
        else:
            self.program.call_soon(self._receive, data)

    def ended(self, is_reset: bool) -> None:
        """The other end says nothing more; with a reset it does not listen either."""
        if not self.is_over:
            self.program.call_soon(self._hear_end, is_reset)

    def reset(self) -> None:
        """The kernel says that the connection is broken."""
        if not self.is_over:
            self.is_over = True
            self.program.call_soon(self._lost, ConnectionResetError("reset by the network"))

    def _receive(self, data: bytes) -> None:
        if not self.is_over and self.protocol is not None:
            self.protocol.data_received(data)

    def _hear_end(self, is_reset: bool) -> None:
        if self.is_over or self.protocol is None:
            return
        if not is_reset:
            self.protocol.eof_received()
            self.close()
        else:
            self.is_over = True
            self._lost(ConnectionResetError("reset by peer"))

    def _lost(self, error: Exception | None) -> None:
        if self.protocol is not None:
            self.protocol.connection_lost(error)


@dataclass(eq=False)
class Cable:
    """One connection. `host` is the dialler's, by which partitions know it."""

    network: Network
    host: str
    #: Nothing passes any more, and nobody has been told.
    is_silent: bool = False
    is_broken: bool = False
    #: Nothing that is under way arrives before.
    late_s: float = 0.0
    ends: list[End] = field(default_factory=list)

    def carry(self, end: End, deliver: Callable[..., None], what: Any) -> None:
        """Bring something to the other end, behind all that went before."""
        network = self.network
        if self.is_silent or self.is_broken:
            return
        world = network.world
        if network.ambush is not None and end.is_dialler and type(what) is not bool and b"Sync" in what[4:12]:
            world.at(0.0, network.ambush, self)
        due_s = world.now_s + world.random.random() * network.delay_s
        end._free_s = due_s = max(due_s, end._free_s + 1e-6)
        world.at(due_s, self._arrive, end, deliver, what)

    def _arrive(self, end: End, deliver: Callable[..., None], what: Any) -> None:
        if self.is_silent or (self.is_broken and not self.network.is_late):
            return
        if self.late_s > self.network.world.now_s:
            self.network.world.at(self.late_s, self._arrive, end, deliver, what)
            return
        blocked = self.network.blocked.get((self.host, end.is_dialler))
        if blocked is not None:
            blocked.append((self, end, deliver, what))
            return
        deliver(what)

    def break_off(self, late_s: float = 0.0) -> None:
        """Both ends learn of it, each in its own time; what is under way is lost, or late."""
        self.is_broken = True
        self.hold_up()
        self.late_s = max(self.late_s, late_s)
        world = self.network.world
        for end in self.ends:
            wait_s = world.random.random() * 0.2
            world.at(wait_s + (world.now_s if end.is_dialler else max(world.now_s, self.late_s)), end.reset)

    def hold_up(self) -> None:
        """Its last words, and that they are the last, stay for a while in buffers on their way."""
        if self.network.tail_s:
            self.late_s = self.network.world.now_s + self.network.world.random.random() * self.network.tail_s


class Network:
    """Connections between coordinators and who dials them."""

    def __init__(
        self,
        world: World,
        delay_s: float,
        *,
        doubles: bool,
        is_late: bool,
        tail_s: float = 0.0,
        flaps: float = 0.0,
        disturbed: set[str],
    ) -> None:
        self.world = world
        self.delay_s = delay_s
        #: For up to so long the last words of a connection may be late.
        self.tail_s = tail_s
        #: How many connections break as soon as something has been said.
        self.flaps = flaps
        #: Hosts of which a connection broke by that.
        self.disturbed = disturbed
        self.doubles = doubles
        #: What was under way when a connection broke still arrives.
        self.is_late = is_late
        #: Told of each connection on which an agent has just sent its inventory.
        self.ambush: Callable[[Cable], None] | None = None
        self.cables: list[Cable] = []
        #: What waits for the end of a partition, by dialler's host and whether the dialler sent it.
        self.blocked: dict[tuple[str, bool], list[tuple[Cable, End, Callable[..., None], Any]]] = {}
        self._listeners: list[tuple[Program, Callable[[], Connection], Peer]] = []

    def listen(self, program: Program, factory: Callable[[], Connection], identity: Peer) -> None:
        """From now on diallers reach this program too: they try several addresses."""
        self._listeners = [each for each in self._listeners if not each[0].is_dead]
        self._listeners.append((program, factory, identity))

    def dial(
        self,
        program: Program,
        host: str,
        identity: Peer,
        factory: Callable[[], Connection],
        *,
        refused: Callable[[], None],
        timed_out: Callable[[], None],
    ) -> None:
        """Connect: the protocols at both ends are told; or nobody listens, or nothing arrives there."""
        if (host, True) in self.blocked or (host, False) in self.blocked:
            program.call_later(5.0, timed_out)
            return
        self.world.after(
            self.world.random.random() * self.delay_s, self._meet, program, host, identity, factory, refused
        )

    def _meet(
        self,
        program: Program,
        host: str,
        identity: Peer,
        factory: Callable[[], Connection],
        refused: Callable[[], None],
    ) -> None:
        listeners = [each for each in self._listeners if not each[0].is_dead]
        if not listeners:
            program.call_soon(refused)
            return
        listener, accept, coordinator = listeners[0] if len(listeners) == 1 else self.world.random.choice(listeners)
        cable = Cable(self, host)
        near, far = End(cable, program, is_dialler=True), End(cable, listener, is_dialler=False)
        near.other, far.other = far, near
        cable.ends = [near, far]
        self.cables = [each for each in self.cables if not (each.is_broken or each.ends[0].is_over)]
        self.cables.append(cable)
        if self.flaps and self.world.chance(self.flaps):
            self.disturbed.add(host)
            self.world.after(self.world.random.random() * (4 * self.delay_s + 0.1), cable.break_off)
        listener.call_soon(self._made, far, accept, identity, None)
        program.call_soon(self._made, near, factory, coordinator, refused)

    def _made(
        self, end: End, factory: Callable[[], Connection], peer: Peer, refused: Callable[[], None] | None
    ) -> None:
        if end.is_over:  # the other end is gone again before this program has looked
            if refused is not None:
                refused()
            return
        protocol = factory()
        pipe: Any = protocol._pipe
        pipe.ssl_object, pipe.doubles = peer, self.doubles
        end.protocol = protocol
        protocol.connection_made(end)

    # --- what goes wrong ---------------------------------------------------------------------------------------------

    def of(self, host: str) -> list[Cable]:
        """The connections of a host which can carry something."""
        return [cable for cable in self.cables if cable.host == host and not (cable.is_silent or cable.is_broken)]

    def program_died(self, program: Program, *, tells: bool) -> None:
        """Its kernel closes its connections; or there was no time for that."""
        for cable in self.cables:
            for end in cable.ends:
                if end.program is program:
                    if tells and not end.is_over:
                        end.is_over = True
                        cable.hold_up()
                        cable.carry(end, end.other.ended, True)
                    elif not tells:
                        cable.is_silent = True

    def cut_off(self, host: str, *, to: bool, back: bool) -> None:
        """A partition: the host is not heard (`to`), does not hear (`back`), or both. TCP keeps what was sent."""
        for is_dialler, is_cut in ((True, to), (False, back)):
            if is_cut:
                self.blocked.setdefault((host, is_dialler), [])

    def heal(self, host: str) -> None:
        """What waited arrives, in order."""
        for is_dialler in (True, False):
            for cable, _, deliver, what in self.blocked.pop((host, is_dialler), []):
                if not cable.is_silent:
                    deliver(what)

    def mend(self) -> None:
        """Peace: partitions end, and connections that are silent are noticed to be."""
        self.tail_s = self.flaps = 0.0
        self.ambush = None
        for host, _ in list(self.blocked):
            self.heal(host)
        for cable in self.cables:
            if cable.is_silent:
                cable.break_off()


class SimDialler(stream.Dialler):
    """The shipped dialler, but for who waits between two tries: the wire below it, with its greeting, heartbeats and
    silence, is the shipped one."""

    def __init__(
        self,
        network: Network,
        program: Program,
        host: str,
        identity: Peer,
        *,
        hello: Callable[[], Hello],
        observer: LinkObserver,
        heartbeat: Callable[[int], Heartbeat] = Heartbeat,
        refused: Callable[[HerderError], None],
    ) -> None:
        super().__init__(
            addresses=[("coordinator", 1)],
            context=cast("Any", None),
            server_name="",
            hello=hello,
            observer=observer,
            heartbeat=heartbeat,
        )
        self._network = network
        self._program = program
        self._host = host
        self._identity = identity
        self._refused = refused
        self._backoff_s = self._backoff_s_min
        self.is_closed = False

    def start(self) -> None:
        """Dial, and again whenever the link is gone."""
        if not self.is_closed:
            self._network.dial(
                self._program,
                self._host,
                self._identity,
                self._connected,
                refused=self._try_again,
                timed_out=self._try_again,
            )

    def end(self) -> None:
        """Say what waits, and dial no more."""
        self.is_closed = True
        if self._connection is not None:
            self._connection.close()

    def _connected(self) -> Connection:
        connection = self._connection = stream._Dialled(self, "coordinator:1")
        connection.gone.add_done_callback(lambda _gone: self._gone(connection))
        return connection

    def _gone(self, connection: Connection) -> None:
        self._connection = None
        error = connection.error
        if connection.link is not None:
            self._backoff_s = self._backoff_s_min
        if error is not None and not is_worth_another_try(error):
            self._refused(error)
        else:
            self._try_again()

    def _try_again(self) -> None:
        self._program.call_later(self._network.world.random.random() * self._backoff_s, self.start)
        self._backoff_s = min(self._backoff_s * 2, self._backoff_s_max)
