"""One connection between two programs: TLS below, a session above, in an asyncio protocol. What both ends share.

Theory of operation. Every connection is one `asyncio.Protocol` on a plain TCP transport; TLS is `SecurePipe`, messages
are `Session`. Everything happens in callbacks: no task, queue or await stands between the socket and the observer, so a
message costs about ten microseconds and there is nothing to leak. What is sent in one turn of the loop leaves in one
write. A peer that does not read is dropped when too much waits for it, and never waited for.

A connection ends in one of three ways. *Broken*: the peer or the network ended it. *Closed*: we said all that we had to
say, then end of stream, and wait a moment for the peer's own end, since closing a socket with unread bytes in it makes
the kernel throw away what we sent last (RFC 1122, 4.2.2.13), which might be the very reason. *Aborted*: the peer does
not deserve that. In each case the observer hears `closed` once, in a turn of the loop of its own, and nothing after it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from typing import Any, Protocol, cast

from herder_shared.errors import HerderError, Unreachable
from herder_shared.limits import BATCH_BYTES_MAX, LEASE_S
from herder_shared.wire.messages import Hello, Message, Refused, Welcome
from herder_shared.wire.secure import SecurePipe
from herder_shared.wire.session import Peer, Session, SessionState, error_of

_log = logging.getLogger("herder.wire")

#: How long a closed connection may wait for the peer's end of stream.
_LINGER_S = 1.0
#: How long a message that nobody waits for may wait for one to travel with: each write wakes up the peer.
FLUSH_LATER_S = 0.005


class Link:
    """One live connection after hello and welcome."""

    def __init__(self, connection: Connection, peer: Peer, hello: Hello, welcome: Welcome) -> None:
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

    def put(self, message: Message) -> None:
        """As `send`, but it may stay here until `flush`: for who sends several and knows when that was all.

        Raises:
            PayloadTooLarge: the message does not fit into a frame.
        """
        self._connection.put(message)

    def flush(self) -> None:
        """Write now what waits."""
        self._connection.flush()

    def flush_later(self) -> None:
        """Write what waits with the next that is written, or in `FLUSH_LATER_S`: for what nobody waits for."""
        self._connection.flush_later()

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


class Connection(asyncio.Protocol):
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
        #: Whether `flush` has been ordered from the loop.
        self._unsent_is_due = False
        self._late_timer: asyncio.TimerHandle | None = None
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
        if not self._unsent_is_due and not self.is_ended:
            self._unsent_is_due = True
            self._loop.call_soon(self.flush)
        self.put(message)

    def put(self, message: Message) -> None:
        if self.is_ended:
            return
        assert self._session is not None
        if self._session.state is SessionState.ENDED:
            return  # in answer to what came in one piece with the peer's refusal
        frame = self._session.send(message)
        self._unsent.append(frame)
        self._unsent_bytes += len(frame)
        if self._unsent_bytes > BATCH_BYTES_MAX:
            self._write_unsent()

    def flush(self) -> None:
        self._unsent_is_due = False
        self._write_unsent()

    def flush_later(self) -> None:
        if self._late_timer is None and not self.is_ended:
            self._late_timer = self._loop.call_later(FLUSH_LATER_S, self._flush_late)

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
        self._write_unsent()
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
        if self._pipe.has_outgoing:
            self._write(self._pipe.outgoing())
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

    def _write_unsent(self) -> None:
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

    def _flush_late(self) -> None:
        self._late_timer = None
        self._write_unsent()

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
        if self._late_timer is not None:
            self._late_timer.cancel()
            self._late_timer = None
        self._stop_greeting()
        if self.link is not None:
            self._loop.call_soon(self._observer.closed, self.link, error)

    def _stop_greeting(self) -> None:
        if self._greeting_timer is not None:
            self._greeting_timer.cancel()
            self._greeting_timer = None


def _tune(sock: Any) -> None:
    """Small messages leave at once; a peer that acknowledges nothing for a lease is gone for the kernel too."""
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(LEASE_S * 1000))
