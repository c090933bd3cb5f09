"""Who listens and who dials: links between the coordinator (`Acceptor`) and an agent or client (`Dialler`).

A dialler keeps one link for ever: it connects, greets, sends heartbeats, leaves a coordinator that is silent for a
lease, and dials again after a wait drawn between nothing and a bound that doubles (full jitter: a thousand agents that
lost the coordinator together do not come back together). Only what trying again cannot mend ends it: a wrong
certificate, cluster or version. An acceptor bounds what strangers can cost: how many may be greeting at a time, and for
how long.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import ssl
from collections import Counter
from collections.abc import Callable, Sequence

from herder_shared.errors import ConfigError, HerderError, RemoteProtocolError, Unauthorized, Unreachable
from herder_shared.ids import ClusterId
from herder_shared.limits import (
    BACKOFF_S_MAX,
    BACKOFF_S_MIN,
    HANDSHAKE_TIMEOUT_S,
    HANDSHAKES_MAX,
    SELF_STALL_S,
    SEND_BUFFER_BYTES_MAX,
)
from herder_shared.tls import peer_of
from herder_shared.wire.connection import Connection, Link, LinkObserver
from herder_shared.wire.messages import Heartbeat, Hello, Refused, Welcome
from herder_shared.wire.secure import SecurePipe, explain_accepting, explain_dialling
from herder_shared.wire.session import (
    AcceptorSession,
    DiallerSession,
    Peer,
    SessionState,
    Unsettled,
    is_worth_another_try,
    refusal,
)

__all__ = ["Acceptor", "Dialler", "Link", "LinkObserver"]

_log = logging.getLogger("herder.wire")

#: How often an acceptor looks for silent links.
_SWEEP_S = 1.0
#: A handshake younger than this is not crowded out by newer ones; an honest one takes a few milliseconds.
_YOUNG_S = 1.0


# --- the coordinator's end -------------------------------------------------------------------------------------------


class _Accepted(Connection):
    def __init__(self, acceptor: Acceptor) -> None:
        super().__init__(
            acceptor.observer,
            SecurePipe(acceptor.context, server_side=True),
            acceptor.send_buffer_bytes_max,
        )
        self._acceptor = acceptor
        self._peer: Peer | None = None
        self._address = "?"
        self.started_s = self._loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        name = transport.get_extra_info("peername")
        self._address = f"{name[0]}:{name[1]}" if name else "?"
        self._greeting_timer = self._loop.call_later(self._acceptor.handshake_timeout_s, self._too_slow)
        super().connection_made(transport)
        self._acceptor.connected(self)

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
        why = self._acceptor.why_not(self._peer)
        if why:
            self.turn_out(why)

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

    @property
    def peer(self) -> Peer | None:
        """Who is there; None while that is not known."""
        return self._peer

    def turn_out(self, why: str) -> None:
        """Its certificate, good as it is, is not to be let in (any more): say so, and take nothing from it."""
        if not self.is_ended:
            self._refuse(Unauthorized(why), "revoked")

    def _fail(self, error: HerderError) -> None:
        self._refuse(error, type(error).__name__)

    def _refuse(self, error: HerderError, reason: str) -> None:
        _log.debug("refused %s: %s", self._who(), error)
        self._acceptor.count(reason, self._address, str(error))
        if self._session is not None and self._session.state is not SessionState.ENDED:
            self.send(refusal(error))
            self.flush()
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
        why_not: Callable[[Peer], str] = lambda _peer: "",
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
        send_buffer_bytes_max: int = SEND_BUFFER_BYTES_MAX,
    ) -> None:
        self.context = context
        self.cluster = cluster
        self.welcome = welcome
        self.observer = observer
        #: Asked when the handshake of TLS is through, before a byte of the peer's is looked at: why it is turned away.
        self.why_not = why_not
        self.handshake_timeout_s = handshake_timeout_s
        self.send_buffer_bytes_max = send_buffer_bytes_max
        #: How many were turned away, by the name of the error (or "slow handshake", "crowded out", "revoked").
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

    def peers(self) -> Counter[Peer]:
        """Who is connected, and how often."""
        return Counter(each.link.peer for each in self._connections if each.link is not None and not each.is_ended)

    def turn_out(self, is_unwanted: Callable[[Peer], bool], why: str) -> Counter[Peer]:
        """End all connections of these peers now, links and those who are greeting; who they were."""
        out: Counter[Peer] = Counter()
        for connection in list(self._connections):
            peer = connection.peer
            if peer is not None and not connection.is_ended and is_unwanted(peer):
                connection.turn_out(why)
                out[peer] += 1
        return out

    # What connections report.

    def connected(self, connection: _Accepted) -> None:
        """A TCP connection came.

        Where too many are greeting, the one that has taken longest makes room. While all of them are young it is the
        new one that must come again: in a crowd of honest peers (a restart) what is nearly done is not thrown away.
        """
        self._connections[connection] = None
        self._greeting[connection] = None
        if len(self._greeting) > HANDSHAKES_MAX:
            oldest = next(iter(self._greeting))
            unlucky = oldest if connection.started_s - oldest.started_s > _YOUNG_S else connection
            del self._greeting[unlucky]
            self.count("crowded out", "?", f"more than {HANDSHAKES_MAX} handshakes at a time")
            unlucky.abort(RemoteProtocolError("too many handshakes"))

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
        """Drop links whose peer is silent for too long. If it was us who stood still, nobody is to blame."""
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


class _Dialled(Connection):
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
        self.flush()

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
    """Keeps a link to the coordinator: connects, greets, sends heartbeats, dials again, for ever."""

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
        #: For messages that must be sent again on each new link; the owner sends `unsettled.resend()` when it opened.
        self.unsettled = Unsettled()
        self._failing = failing
        self._backoff_s_min = backoff_s_min
        self._backoff_s_max = backoff_s_max
        self._connection: _Dialled | None = None
        self._scope: asyncio.Timeout | None = None
        self._stopped: asyncio.Future[None] | None = None
        self._is_closing = False
        #: Where there was a link last: dialled first.
        self._first = 0

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
        """Try each address once, until one gave a link which then ended: why, and for how long there was a link. The
        one that served last comes first: where others are dead, a restart costs no time with them.

        Where every address failed: the error that is not worth another try, unless another address may be merely away.
        """
        errors: list[HerderError] = []
        count = len(self.addresses)
        for number in [(self._first + n) % count for n in range(count)]:
            error, linked_s = await self._dial(*self.addresses[number])
            if linked_s:
                self._first = number
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
