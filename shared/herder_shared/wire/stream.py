"""The asyncio shell over sessions: links between a dialler (agent or client) and an acceptor (coordinator).

Theory of operation. Every connection is one `asyncio.Protocol` on a plain TCP transport; TLS is `SecurePipe`, messages are
`Session`. Everything happens in callbacks: no task, queue or await stands between the socket and the observer, so a message
costs tens of microseconds and there is nothing to leak. What is sent in one turn of the loop leaves in one write. A peer that
does not read is dropped when too much waits for it, and never waited for.

A connection ends in one of three ways. *Broken*: the peer or the network ended it. *Closed*: we said all that we had to say,
then end of stream, and wait a moment for the peer's own end, since closing a socket with unread bytes in it makes the kernel
throw away what we sent last (RFC 1122, 4.2.2.13), which might be the very reason. *Aborted*: the peer does not deserve that.
In each case the observer hears `closed` once, in a turn of the loop of its own, and nothing after it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from herder_shared.errors import ConfigError, HerderError, RemoteProtocolError, Unreachable
from herder_shared.ids import ClusterId
from herder_shared.limits import (
    BACKOFF_S_MAX,
    BACKOFF_S_MIN,
    BATCH_BYTES_MAX,
    HANDSHAKE_TIMEOUT_S,
    HANDSHAKES_MAX,
    LEASE_S,
    SELF_STALL_S,
    SEND_BUFFER_BYTES_MAX,
)
from herder_shared.tls import peer_of
from herder_shared.wire.messages import Heartbeat, Hello, Message, Refused, Welcome
from herder_shared.wire.secure import SecurePipe, explain_accepting, explain_dialling
from herder_shared.wire.session import (
    AcceptorSession,
    DiallerSession,
    Peer,
    Session,
    SessionState,
    Unsettled,
    error_of,
    is_worth_another_try,
    refusal,
)

_log = logging.getLogger("herder.wire")

#: How long a closed connection may wait for the peer's end of stream.
_LINGER_S = 1.0
#: How often an acceptor looks for silent links.
_SWEEP_S = 1.0


class Link:
    """One live connection after hello and welcome."""

    def __init__(self, connection: _Connection, peer: Peer, hello: Hello, welcome: Welcome) -> None:
        self.peer = peer
        self.hello = hello
        self.welcome = welcome
        self._connection = connection

    @property
    def session(self) -> int:
        """Counts the links of one life of the coordinator."""
        return self.welcome.session

    @property
    def epoch(self) -> int:
        """The coordinator's life."""
        return self.welcome.epoch

    @property
    def buffered_bytes(self) -> int:
        """Bytes that wait to be sent. A sender of much should pause while this is high."""
        return self._connection.buffered_bytes

    @property
    def is_closed(self) -> bool:
        """Whether nothing sent from now on could arrive."""
        return self._connection.is_ended

    def send(self, message: Message) -> None:
        """Send soon, with everything else of this turn of the loop. Never blocks; does nothing on a closed link.

        A link with more than `SEND_BUFFER_BYTES_MAX` waiting is closed.

        Raises:
            PayloadTooLarge: the message does not fit into a frame.
        """
        self._connection.send(message)

    def pause_reading(self) -> None:
        """Take no more from the peer until `resume_reading`. Its heartbeats are not heard either."""
        self._connection.pause_reading()

    def resume_reading(self) -> None:
        """Take from the peer again."""
        self._connection.resume_reading()

    def close(self, reason: str = "") -> None:
        """Send what waits, then end. Idempotent; the observer hears `closed` with no error."""
        self._connection.close(reason)

    def refuse(self, refused: Refused) -> None:
        """Tell the peer why, then end. Only the coordinator refuses."""
        if not self._connection.is_ended:
            self._connection.send(refused)
            self._connection.close(refused.message)


class LinkObserver(Protocol):
    """What its owner does with links. Called in the loop, never awaited; must not block."""

    def opened(self, link: Link) -> None:
        """The link can be used. From here on it may send."""

    def received(self, link: Link, messages: list[Message]) -> None:
        """All messages that arrived together. The acceptor's observer answers `Heartbeat` itself."""

    def closed(self, link: Link, error: HerderError | None) -> None:
        """The last word about this link; `error` is None when we closed it, or the peer said that it does."""


class _Connection(asyncio.Protocol):
    """One TCP connection: TLS below, a session above. The two ends differ in how they greet."""

    def __init__(self, observer: LinkObserver, pipe: SecurePipe, send_buffer_bytes_max: int) -> None:
        self._observer = observer
        self._pipe = pipe
        self._send_buffer_bytes_max = send_buffer_bytes_max
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._session: Session | None = None
        self.link: Link | None = None
        #: Set when nothing more is received or sent; the socket may live for another `_LINGER_S`.
        self.is_ended = False
        self.error: HerderError | None = None
        #: Done when the socket is closed.
        self.gone: asyncio.Future[None] = self._loop.create_future()
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        #: Since when we do not listen, on the loop's clock.
        self._paused_s: float | None = None
        self._greeting_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        _tune(transport.get_extra_info("socket"))
        self._secure(b"")

    def data_received(self, data: bytes) -> None:
        if self.is_ended:
            return
        try:
            if self._pipe.is_secured:
                self._take(data)
            else:
                self._secure(data)
        except ssl.SSLError as error:
            self._fail(self._explain(error))
        except HerderError as error:
            self._fail(error)

    def eof_received(self) -> bool:
        self._end(self._broken("the connection was closed"))
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._end(self._broken(str(error) if error else "the connection was closed"))
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        self._transport = None
        if not self.gone.done():
            self.gone.set_result(None)

    # What the link does.

    @property
    def buffered_bytes(self) -> int:
        waiting = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return self._unsent_bytes + waiting

    def send(self, message: Message) -> None:
        if self.is_ended:
            return
        assert self._session is not None
        frame = self._session.send(message)
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(frame)
        self._unsent_bytes += len(frame)
        if self._unsent_bytes > BATCH_BYTES_MAX:
            self._flush()

    def pause_reading(self) -> None:
        if self._transport is not None and not self.is_ended and self._paused_s is None:
            self._paused_s = self._loop.time()
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None and not self.is_ended and self._paused_s is not None:
            self.forgive(self._loop.time() - self._paused_s)
            self._paused_s = None
            self._transport.resume_reading()

    def close(self, reason: str = "") -> None:
        if self.is_ended:
            return
        if reason:
            _log.debug("closing the link with %s: %s", self._who(), reason)
        self._flush()
        self._end(None)
        self._linger()

    def abort(self, error: HerderError | None = None) -> None:
        """End at once, whatever waits."""
        self._end(error)
        if self._transport is not None:
            self._transport.abort()

    def is_silent(self, now_s: float, silence_s: float) -> bool:
        """Whether the peer said nothing for so long, while we listened."""
        return self._session is not None and self._paused_s is None and self._session.is_silent(now_s, silence_s)

    def forgive(self, stall_s: float) -> None:
        if self._session is not None:
            self._session.forgive(stall_s)

    # Inside.

    def _explain(self, error: ssl.SSLError) -> HerderError:
        raise NotImplementedError

    def _secured(self) -> None:
        """TLS is up: make the session."""
        raise NotImplementedError

    def _greeted(self) -> None:
        """The session was moved by a message of the peer before it was open."""
        raise NotImplementedError

    def _fail(self, error: HerderError) -> None:
        """The peer broke the rules: say so where that is possible, and end."""
        raise NotImplementedError

    def _who(self) -> str:
        return "an unknown peer"

    def _broken(self, why: str) -> HerderError:
        return Unreachable(f"the connection with {self._who()} is gone: {why}")

    def _secure(self, data: bytes) -> None:
        try:
            through = self._pipe.handshake(data)
        finally:
            self._write(self._pipe.outgoing())
        if through:
            self._secured()
            self._take(b"")

    def _take(self, data: bytes) -> None:
        plain, ended = self._pipe.receive(data)
        if reply := self._pipe.outgoing():
            self._write(reply)
        if plain and self._session is not None and not self.is_ended:
            self._hear(self._session, plain)
        if ended and not self.is_ended:
            self._end(None)
            self._linger()

    def _hear(self, session: Session, plain: bytes) -> None:
        was_open = session.state is SessionState.OPEN
        messages = session.receive(plain, self._loop.time())
        if not was_open:
            self._greeted()
        if messages and self.link is not None and not self.is_ended:
            self._observer.received(self.link, messages)
        if session.refused is not None and not self.is_ended:
            self._end(error_of(session.refused))
            self._linger()

    def _open(self, peer: Peer) -> None:
        assert self._session is not None
        assert self._session.hello is not None
        assert self._session.welcome is not None
        self._stop_greeting()
        self.link = Link(self, peer, self._session.hello, self._session.welcome)
        self._observer.opened(self.link)

    def _flush(self) -> None:
        if not self._unsent or self.is_ended or self._transport is None:
            return
        data = b"".join(self._unsent) if len(self._unsent) > 1 else self._unsent[0]
        self._unsent.clear()
        self._unsent_bytes = 0
        self._transport.write(self._pipe.send(data))
        if self._transport.get_write_buffer_size() > self._send_buffer_bytes_max:
            self.abort(
                Unreachable(f"{self._who()} does not read: more than {self._send_buffer_bytes_max} bytes wait for it")
            )

    def _write(self, data: bytes) -> None:
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _linger(self) -> None:
        """Say that nothing follows, and give the peer a moment to hear all of it and to end its side."""
        if self._transport is None or self._transport.is_closing() or self._linger_timer is not None:
            return
        if self._pipe.is_secured:
            self._write(self._pipe.end())
        try:
            self._transport.write_eof()
        except OSError:  # the peer has reset the connection: nobody is left to hear the rest
            self._transport.abort()
            return
        if self._paused_s is not None:
            self._transport.resume_reading()
        self._linger_timer = self._loop.call_later(_LINGER_S, self._transport.abort)

    def _end(self, error: HerderError | None) -> None:
        if self.is_ended:
            return
        self.is_ended = True
        self.error = error
        self._unsent.clear()
        self._unsent_bytes = 0
        self._stop_greeting()
        if self.link is not None:
            self._loop.call_soon(self._observer.closed, self.link, error)

    def _stop_greeting(self) -> None:
        if self._greeting_timer is not None:
            self._greeting_timer.cancel()
            self._greeting_timer = None


# --- the coordinator's end -------------------------------------------------------------------------------------------


class _Accepted(_Connection):
    def __init__(self, acceptor: Acceptor) -> None:
        super().__init__(
            acceptor.observer,
            SecurePipe(acceptor.context, server_side=True),
            acceptor.send_buffer_bytes_max,
        )
        self._acceptor = acceptor
        self._peer: Peer | None = None
        self._address = "?"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        name = transport.get_extra_info("peername")
        self._address = f"{name[0]}:{name[1]}" if name else "?"
        self._greeting_timer = self._loop.call_later(self._acceptor.handshake_timeout_s, self._too_slow)
        self._acceptor.connected(self)
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._acceptor.disconnected(self)

    def _too_slow(self) -> None:
        self._acceptor.count("slow handshake", self._address)
        self.abort(RemoteProtocolError("the handshake took too long"))

    def _who(self) -> str:
        return (
            f"{self._peer.role} {self._peer.name!r} at {self._address}" if self._peer else f"a peer at {self._address}"
        )

    def _explain(self, error: ssl.SSLError) -> HerderError:
        return explain_accepting(error)

    def _secured(self) -> None:
        self._peer = peer_of(self._pipe.ssl_object)
        self._session = AcceptorSession(self._acceptor.cluster, self._peer)

    def _greeted(self) -> None:
        session = self._session
        if session is None or session.state is not SessionState.GREETING:
            return
        assert session.hello is not None
        assert self._peer is not None
        answer = self._acceptor.welcome(session.hello, self._peer)
        self.send(answer)
        if isinstance(answer, Welcome):
            self._open(self._peer)
            self._acceptor.greeted(self)
        else:
            self._acceptor.count(answer.error, self._address)
            self.close(answer.message)

    def _fail(self, error: HerderError) -> None:
        _log.debug("refused %s: %s", self._who(), error)
        self._acceptor.count(type(error).__name__, self._address, str(error))
        if self._session is not None and self._session.state is not SessionState.ENDED:
            self.send(refusal(error))
            self._flush()
        self._end(error)
        self._linger()


class Acceptor:
    """Listens, checks who dials, and gives links to its observer."""

    def __init__(
        self,
        *,
        context: ssl.SSLContext,
        cluster: ClusterId,
        welcome: Callable[[Hello, Peer], Welcome | Refused],
        observer: LinkObserver,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
        send_buffer_bytes_max: int = SEND_BUFFER_BYTES_MAX,
    ) -> None:
        self.context = context
        self.cluster = cluster
        self.welcome = welcome
        self.observer = observer
        self.handshake_timeout_s = handshake_timeout_s
        self.send_buffer_bytes_max = send_buffer_bytes_max
        #: How many were turned away, by the name of the error (or "slow handshake", "crowded out").
        self.refusals: Counter[str] = Counter()
        # In the order in which they connected.
        self._greeting: dict[_Accepted, None] = {}
        self._connections: dict[_Accepted, None] = {}
        self._server: asyncio.Server | None = None
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._swept_s = 0.0

    async def listen(self, host: str, port: int) -> tuple[str, int]:
        """Start; gives the address as bound (`port` 0 = any free one).

        Raises:
            ConfigError: the address cannot be had; names it and the cure.
        """
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: _Accepted(self), host, port, backlog=1024)
        except OSError as error:
            raise ConfigError(_explain_listen(host, port, error)) from error
        self._swept_s = loop.time()
        self._sweep_timer = loop.call_later(_SWEEP_S, self._sweep)
        bound = self._server.sockets[0].getsockname()
        return bound[0], bound[1]

    async def close(self) -> None:
        """End all links in good order and give the port back. Waits until every socket is closed."""
        if self._server is not None:
            self._server.close()
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        connections = list(self._connections)
        for connection in connections:
            if connection in self._greeting:
                connection.abort()
            else:
                connection.close("the coordinator ends")
        for connection in connections:
            await connection.gone
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None

    # What connections report.

    def connected(self, connection: _Accepted) -> None:
        """A TCP connection came. Where too many are greeting, the one that has taken longest makes room."""
        self._connections[connection] = None
        if len(self._greeting) >= HANDSHAKES_MAX:
            oldest = next(iter(self._greeting))
            del self._greeting[oldest]
            self.count("crowded out", "?")
            oldest.abort(RemoteProtocolError("too many handshakes"))
        self._greeting[connection] = None

    def greeted(self, connection: _Accepted) -> None:
        """It has become a link."""
        self._greeting.pop(connection, None)

    def disconnected(self, connection: _Accepted) -> None:
        """Its socket is closed."""
        self._greeting.pop(connection, None)
        self._connections.pop(connection, None)

    def count(self, reason: str, address: str, text: str = "") -> None:
        """Count a refusal; the first of each kind is logged."""
        self.refusals[reason] += 1
        if self.refusals[reason] == 1:
            _log.warning("refused %s: %s (later ones are only counted)", address, text or reason)

    def _sweep(self) -> None:
        """Drop links whose peer is silent for longer than it may be. If it was us who stood still, nobody is to blame."""
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        stall_s = now_s - self._swept_s - _SWEEP_S
        self._swept_s = now_s
        for connection in list(self._connections):
            link = connection.link
            if link is None or connection.is_ended:
                continue
            if stall_s > SELF_STALL_S:
                connection.forgive(stall_s)
            elif connection.is_silent(now_s, link.welcome.lease_s + link.welcome.heartbeat_s):
                connection.abort(Unreachable(f"{link.peer.role} {link.peer.name!r} is silent"))
        self._sweep_timer = loop.call_later(_SWEEP_S, self._sweep)


# --- the agent's and the client's end --------------------------------------------------------------------------------


class _Dialled(_Connection):
    def __init__(self, dialler: Dialler, address: str) -> None:
        super().__init__(
            dialler.observer,
            SecurePipe(dialler.context, server_side=False, server_hostname=dialler.server_name),
            SEND_BUFFER_BYTES_MAX,
        )
        self._dialler = dialler
        self._address = address
        self._beat_timer: asyncio.TimerHandle | None = None
        self._beat_due_s = 0.0
        self._beats = 0
        self._greeting_timer = self._loop.call_later(dialler.handshake_timeout_s, self._too_slow)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        if self._beat_timer is not None:
            self._beat_timer.cancel()

    def _too_slow(self) -> None:
        self.abort(Unreachable(f"what listens at {self._address} does not answer"))

    def _who(self) -> str:
        return f"the coordinator at {self._address}"

    def _explain(self, error: ssl.SSLError) -> HerderError:
        return explain_dialling(error, self._address)

    def _secured(self) -> None:
        self._session = DiallerSession()
        self.send(self._dialler.hello())
        self._flush()

    def _greeted(self) -> None:
        if self._session is None or self._session.state is not SessionState.OPEN:
            return
        assert self._session.welcome is not None
        self._beat_due_s = self._loop.time() + self._session.welcome.heartbeat_s
        self._beat_timer = self._loop.call_at(self._beat_due_s, self._beat)
        self._open(peer_of(self._pipe.ssl_object))

    def _fail(self, error: HerderError) -> None:
        self._end(error)
        self._linger()

    def _beat(self) -> None:
        if self.is_ended or self.link is None:
            return
        now_s = self._loop.time()
        late_s = now_s - self._beat_due_s
        if late_s > SELF_STALL_S:
            self.forgive(late_s)
        if self.is_silent(now_s, self.link.welcome.lease_s):
            self.abort(Unreachable(f"{self._who()} was silent for {self.link.welcome.lease_s:g} s"))
            return
        self._beats += 1
        self.send(self._dialler.heartbeat(self._beats))
        self._beat_due_s = now_s + self.link.welcome.heartbeat_s
        self._beat_timer = self._loop.call_at(self._beat_due_s, self._beat)


class Dialler:
    """Keeps a link to the coordinator: connects, greets, sends heartbeats, reconnects with full-jitter backoff for ever."""

    def __init__(
        self,
        *,
        addresses: Sequence[tuple[str, int]],
        context: ssl.SSLContext,
        server_name: str,
        hello: Callable[[], Hello],
        observer: LinkObserver,
        heartbeat: Callable[[int], Heartbeat] = Heartbeat,
        failing: Callable[[HerderError, float], None] | None = None,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
        backoff_s_min: float = BACKOFF_S_MIN,
        backoff_s_max: float = BACKOFF_S_MAX,
    ) -> None:
        if not addresses:
            raise ConfigError("there is no address of a coordinator: start one with `herder up`, or name one")
        self.addresses = tuple(addresses)
        self.context = context
        self.server_name = server_name
        self.hello = hello
        self.observer = observer
        self.heartbeat = heartbeat
        self.handshake_timeout_s = handshake_timeout_s
        #: For the owner's messages that must be sent again on each new link; it sends `unsettled.resend()` when opened.
        self.unsettled = Unsettled()
        self._failing = failing
        self._backoff_s_min = backoff_s_min
        self._backoff_s_max = backoff_s_max
        self._connection: _Dialled | None = None
        self._scope: asyncio.Timeout | None = None
        self._stopped: asyncio.Future[None] | None = None
        self._is_closing = False

    @property
    def link(self) -> Link | None:
        """The live link, or None while there is none."""
        connection = self._connection
        return connection.link if connection is not None and not connection.is_ended else None

    async def run(self) -> None:
        """Keep a link until `close`.

        Raises:
            Unauthorized, ProtocolMismatch: trying again cannot help; the message says what does.
            HerderError: the coordinator refused us for another reason, by that reason's name.
        """
        if self._is_closing:
            return
        self._stopped = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(None) as self._scope:
                await self._keep_linked()
        except TimeoutError:
            if not self._is_closing:
                raise
        finally:
            self._scope = None
            self._stopped.set_result(None)

    async def close(self) -> None:
        """Send what waits, end the link, and make `run` return. Waits until the socket is closed."""
        self._is_closing = True
        connection = self._connection
        if connection is not None:
            connection.close()
            await connection.gone
        if self._scope is not None:
            self._scope.reschedule(asyncio.get_running_loop().time())
        if self._stopped is not None:
            await asyncio.wait([self._stopped])

    async def _keep_linked(self) -> None:
        loop = asyncio.get_running_loop()
        backoff_s = self._backoff_s_min
        away_since_s = loop.time()
        while not self._is_closing:
            error, linked_s = await self._dial_all()
            now_s = loop.time()
            if linked_s:
                away_since_s = now_s
            if linked_s > self._backoff_s_max:
                backoff_s = self._backoff_s_min
            if not is_worth_another_try(error):
                raise error
            if self._failing is not None and not self._is_closing:
                self._failing(error, now_s - away_since_s)
            await asyncio.sleep(random.uniform(0, backoff_s))
            backoff_s = min(backoff_s * 2, self._backoff_s_max)

    async def _dial_all(self) -> tuple[HerderError, float]:
        """Try each address once, until one gave a link which then ended: why, and for how long there was a link.

        Where every address failed: the error that is not worth another try, unless another address may be merely away.
        """
        errors: list[HerderError] = []
        for host, port in self.addresses:
            error, linked_s = await self._dial(host, port)
            if linked_s:
                return error, linked_s
            errors.append(error)
        return next((error for error in errors if is_worth_another_try(error)), errors[0]), 0.0

    async def _dial(self, host: str, port: int) -> tuple[HerderError, float]:
        loop = asyncio.get_running_loop()
        address = f"{host}:{port}"
        connection: _Dialled | None = None
        try:
            async with asyncio.timeout(self.handshake_timeout_s):
                _, connection = await loop.create_connection(lambda: _Dialled(self, address), host, port)
        except (OSError, TimeoutError) as error:
            return Unreachable(f"the coordinator at {address} cannot be reached: {error or 'no answer'}"), 0.0
        self._connection = connection
        started_s = loop.time()
        try:
            await asyncio.wait([connection.gone])
        finally:
            self._connection = None
            if not connection.gone.done():
                connection.abort()
                await asyncio.wait([connection.gone])
        linked_s = loop.time() - started_s if connection.link is not None else 0.0
        return connection.error or Unreachable(f"the link to {address} was closed"), linked_s


def _tune(sock: Any) -> None:
    """Small messages leave at once; a peer that acknowledges nothing for a lease is gone for the kernel too."""
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(LEASE_S * 1000))


def _explain_listen(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            cure = "another program, perhaps another coordinator, has this port: stop it or listen on another"
        case errno.EACCES:
            cure = "ports below 1024 belong to root: listen on a higher one"
        case errno.EADDRNOTAVAIL:
            cure = "this machine does not have that address: listen on one of its own, or on 0.0.0.0"
        case _:
            cure = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
    return f"cannot listen on {host}:{port}: {cure}"
