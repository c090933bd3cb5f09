"""One session between a dialler (agent or client) and the coordinator, as a machine without I/O and without a clock.

Theory of operation. The dialler opens with `Hello`; the coordinator answers `Welcome` or `Refused`; nothing else is
legal before that, and neither `Hello` nor `Welcome` afterwards. `Refused` may come at any time from the coordinator and
ends the session. Each end accepts only the messages that the other end's *role* may send, where the acceptor takes the
role from the certificate and never from the hello: a message of another role is `Unauthorized`, not an accident.

A session lasts as long as its connection. What must survive a connection is the business of `Unsettled`: messages which
are sent again, in their first order, until the other side has said that they are durable.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from enum import Enum
from typing import Any, cast

import msgspec

from herder_shared import errors
from herder_shared.errors import HerderError, ProtocolMismatch, RemoteProtocolError, Unauthorized, Unreachable
from herder_shared.ids import ClusterId
from herder_shared.limits import FRAME_BYTES_MAX, FRAME_BYTES_MAX_HELLO, PROTOCOL_VERSION
from herder_shared.wire.frame import FrameDecoder, decode_body, encode_frame
from herder_shared.wire.messages import (
    AgentToCoordinator,
    ClientToCoordinator,
    CoordinatorToAgent,
    CoordinatorToClient,
    DrainNode,
    Heartbeat,
    HeartbeatAck,
    Hello,
    ListKeys,
    Message,
    Refused,
    RevokeKeys,
    Role,
    ShutDown,
    Welcome,
)


class Peer(msgspec.Struct, frozen=True):
    """Who is at the other end, by its certificate. `serial` is the certificate's serial number, in hex."""

    role: Role
    name: str
    cluster: ClusterId
    serial: str


class SessionState(Enum):
    """How far a session is. The same four for both ends."""

    #: Connected; nothing was said.
    START = "start"
    #: The hello was said and not answered.
    GREETING = "greeting"
    #: Welcomed.
    OPEN = "open"
    #: Refused, or broken. Nothing follows.
    ENDED = "ended"


#: Which message moves a session from which state; every other message leaves it OPEN and is illegal elsewhere.
SESSION_TRANSITIONS: dict[tuple[SessionState, type], SessionState] = {
    (SessionState.START, Hello): SessionState.GREETING,
    (SessionState.START, Refused): SessionState.ENDED,
    (SessionState.GREETING, Welcome): SessionState.OPEN,
    (SessionState.GREETING, Refused): SessionState.ENDED,
    (SessionState.OPEN, Refused): SessionState.ENDED,
}
_MOVING = (Hello, Welcome, Refused)

_hello_decoder = msgspec.msgpack.Decoder(Hello)
_answer_decoder: msgspec.msgpack.Decoder[Welcome | Refused] = msgspec.msgpack.Decoder(Welcome | Refused)
_from_client: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ClientToCoordinator | Heartbeat)
_from_agent: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AgentToCoordinator | Heartbeat)
_to_client: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(CoordinatorToClient | HeartbeatAck | Refused)
_to_agent: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(CoordinatorToAgent | HeartbeatAck | Refused)
_head_decoder = msgspec.msgpack.Decoder(list[msgspec.Raw])
_scalar_decoder: msgspec.msgpack.Decoder[str | int] = msgspec.msgpack.Decoder(str | int)

#: What the acceptor takes from whom. A coordinator's certificate may not dial.
_FROM_ROLE: dict[str, msgspec.msgpack.Decoder[Any]] = {
    "agent": _from_agent,
    "client": _from_client,
    "admin": _from_client,
}
#: Verbs that change the cluster itself.
ADMIN_VERBS = (DrainNode, ListKeys, RevokeKeys, ShutDown)
_KNOWN_VERBS = frozenset(kind.__name__ for kind in Message.__args__)


class Session:
    """What both ends share: frames, the state table, when the peer was last heard."""

    #: What this end calls itself in errors.
    _end = "session"

    def __init__(self, frame_bytes_max: int) -> None:
        self.state = SessionState.START
        self.hello: Hello | None = None
        self.welcome: Welcome | None = None
        self.refused: Refused | None = None
        #: The loop's clock when bytes last came; set by `receive` and `heard`.
        self.last_heard_s = 0.0
        self._frames = FrameDecoder(frame_bytes_max)
        self._decoder: msgspec.msgpack.Decoder[Any] | None = None

    def send(self, message: Message) -> bytes:
        """The bytes to send for `message`; moves the session where the message does.

        Raises:
            PayloadTooLarge: the message does not fit into a frame; the session is as before.
            AssertionError: this end may not send that now: a bug of ours.
        """
        frame = encode_frame(message)
        kind = type(message)
        if kind not in _MOVING:
            assert self.state is SessionState.OPEN, f"{self._end} sends {kind.__name__} when {self.state.name}"
        else:
            assert (self.state, kind) in SESSION_TRANSITIONS, (
                f"{self._end} sends {kind.__name__} when {self.state.name}"
            )
            self._move(cast("Hello | Welcome | Refused", message))
        return frame

    def receive(self, data: bytes | bytearray | memoryview, now_s: float) -> list[Message]:
        """All messages that `data` completes, but for `Hello`, `Welcome` and `Refused`: those are kept as attributes.

        Raises:
            RemoteProtocolError: the peer broke the protocol.
            Unauthorized: its role may not say this, or it is of another cluster.
            ProtocolMismatch: it speaks another version.
            Unreachable: what answered is an earlier life of the coordinator.
                After any of them nothing more may be received; the acceptor may still send `Refused`.
        """
        self.last_heard_s = now_s
        if self._is_over():
            return []
        messages: list[Message] = []
        for body in self._frames.feed(data):
            if self.state is SessionState.OPEN:
                message = self._decode(body)
                if type(message) is Refused:
                    self._move(message)
                else:
                    messages.append(message)
            elif not self._is_over():
                self._greet(body)
        return messages

    def is_silent(self, now_s: float, silence_s: float) -> bool:
        """Whether nothing came from the peer for `silence_s` or longer."""
        return now_s - self.last_heard_s >= silence_s

    def forgive(self, stall_s: float) -> None:
        """Do not count `stall_s` of silence: it was us who did not listen (a blocked loop, a suspended machine)."""
        self.last_heard_s += stall_s

    def _is_over(self) -> bool:
        return self.state is SessionState.ENDED

    def _greet(self, body: memoryview) -> None:
        raise NotImplementedError

    def _decode(self, body: memoryview) -> Message:
        assert self._decoder is not None
        try:
            return cast("Message", decode_body(self._decoder, body))
        except RemoteProtocolError as error:
            raise self._explain(body, error) from error.__cause__

    def _explain(self, body: memoryview, error: RemoteProtocolError) -> HerderError:  # noqa: ARG002  # for the acceptor
        """The error that says best why `body` is not acceptable."""
        return error

    def _move(self, message: Hello | Welcome | Refused) -> None:
        kind = type(message)
        state = SESSION_TRANSITIONS.get((self.state, kind))
        if state is None:
            raise RemoteProtocolError(f"{kind.__name__} when the session is {self.state.name}")
        match message:
            case Hello():
                self.hello = message
            case Welcome():
                self.welcome = message
            case Refused():
                self.refused = message
        self.state = state


class DiallerSession(Session):
    """The end of an agent or client. `send(Hello)` first."""

    _end = "dialler"

    def __init__(self) -> None:
        super().__init__(FRAME_BYTES_MAX)

    def _greet(self, body: memoryview) -> None:
        if self.state is SessionState.START or self.hello is None:
            raise RemoteProtocolError("the coordinator spoke before it was greeted")
        answer = decode_body(_answer_decoder, body)
        if isinstance(answer, Welcome):
            check_welcome(self.hello, answer)
            self._decoder = _to_client if self.hello.node is None else _to_agent
        self._move(answer)


class AcceptorSession(Session):
    """The coordinator's end of one connection, from `peer` as the certificate has it."""

    _end = "acceptor"

    def __init__(self, cluster: ClusterId, peer: Peer) -> None:
        super().__init__(FRAME_BYTES_MAX_HELLO)
        self.cluster = cluster
        self.peer = peer

    def send(self, message: Message) -> bytes:
        """As `Session.send`. After `Welcome` frames of full size are accepted."""
        frame = super().send(message)
        if type(message) is Welcome:
            self._frames.bytes_max = FRAME_BYTES_MAX
        return frame

    def _greet(self, body: memoryview) -> None:
        if self.state is not SessionState.START:
            raise RemoteProtocolError("a message before the hello was answered")
        hello = _decode_hello(body)
        check_hello(hello, self.peer, self.cluster)
        self._decoder = _FROM_ROLE[self.peer.role]
        self._move(hello)

    def _decode(self, body: memoryview) -> Message:
        message = super()._decode(body)
        if type(message) in ADMIN_VERBS and self.peer.role != "admin":
            raise _forbidden(self.peer, type(message).__name__)
        return message

    def _explain(self, body: memoryview, error: RemoteProtocolError) -> HerderError:
        verb = _verb_of(body)
        if verb in _KNOWN_VERBS and "Invalid value" in str(error.__cause__):
            return _forbidden(self.peer, verb)
        return error


class Unsettled:
    """Messages that must be sent again on each new link until the other side has settled them, in their first order."""

    def __init__(self) -> None:
        self._messages: dict[Hashable, Message] = {}

    def __len__(self) -> int:
        return len(self._messages)

    def keep(self, key: Hashable, message: Message) -> None:
        """Keep a message; one of the same key is replaced in its place."""
        self._messages[key] = message

    def settle(self, key: Hashable) -> bool:
        """Forget the message of this key; False when there is none (settled before: answers come twice)."""
        return self._messages.pop(key, None) is not None

    def settle_where(self, is_settled: Callable[[Any], bool]) -> int:
        """Forget all whose key satisfies the condition; how many they were."""
        keys = [key for key in self._messages if is_settled(key)]
        for key in keys:
            del self._messages[key]
        return len(keys)

    def resend(self) -> list[Message]:
        """All of them, oldest first."""
        return list(self._messages.values())


def check_hello(hello: Hello, peer: Peer, cluster: ClusterId) -> None:
    """Whether this peer may open a session with this hello.

    Raises:
        ProtocolMismatch: another version of the protocol.
        Unauthorized: another cluster, a role that may not dial, or an agent under another node's name.
    """
    if hello.protocol != PROTOCOL_VERSION:
        raise _version_mismatch(hello.protocol, hello.version)
    if peer.cluster != cluster:
        raise Unauthorized(
            f"the certificate of {peer.role} {peer.name!r} is of cluster {peer.cluster}; this is {cluster}:"
            " use the profile of this cluster"
        )
    if hello.cluster != cluster:
        raise Unauthorized(f"this is cluster {cluster}, not {hello.cluster}: use that cluster's profile or address")
    if peer.role not in _FROM_ROLE:
        raise Unauthorized(
            f"a certificate with the role {peer.role!r} may not connect to the coordinator: use one with the role"
            " agent, client or admin"
        )
    if (peer.role == "agent") != (hello.node is not None):
        raise Unauthorized(f"a certificate with the role {peer.role!r} may not connect as {_kind_of(hello)}")
    if hello.node is not None and hello.node.node != peer.name:
        raise Unauthorized(
            f"the certificate is of agent {peer.name!r}, which may not connect as node {hello.node.node!r}:"
            " issue a certificate for that name, or start the agent under its certificate's name"
        )


def check_welcome(hello: Hello, welcome: Welcome) -> None:
    """Whether the dialler may serve, or use, the coordinator that sent this welcome.

    Raises:
        Unauthorized: it is of another cluster.
        Unreachable: it is an earlier life of the coordinator than the one seen last; the current one may come back.
    """
    if welcome.cluster != hello.cluster:
        raise Unauthorized(f"the coordinator is of cluster {welcome.cluster}, this profile of {hello.cluster}")
    if welcome.epoch < hello.epoch_seen:
        raise Unreachable(
            f"the coordinator that answered is life {welcome.epoch} of the cluster, but life {hello.epoch_seen} was"
            " seen already: an old coordinator still runs, or its state directory was restored from an old copy"
        )


def refusal(error: HerderError) -> Refused:
    """How to tell a peer about an error that ends its session."""
    return Refused(error=type(error).__name__, message=str(error))


def error_of(refused: Refused) -> HerderError:
    """The error that a peer named; a name that is not in our tree becomes a plain `HerderError`."""
    kind = getattr(errors, refused.error, None)
    if isinstance(kind, type) and issubclass(kind, HerderError):
        return kind(refused.message)
    return HerderError(f"{refused.error}: {refused.message}")


def is_worth_another_try(error: HerderError) -> bool:
    """Whether dialling again may help after `error`."""
    return isinstance(error, Unreachable | RemoteProtocolError)


def _decode_hello(body: memoryview) -> Hello:
    try:
        return decode_body(_hello_decoder, body)
    except RemoteProtocolError as error:
        # Another version's hello may have another shape; its protocol number has always been the first field.
        protocol = _protocol_of(body)
        if protocol is not None and protocol != PROTOCOL_VERSION:
            raise _version_mismatch(protocol, "") from error
        raise


def _version_mismatch(protocol: int, version: str) -> ProtocolMismatch:
    return ProtocolMismatch(
        f"this coordinator speaks protocol {PROTOCOL_VERSION}, the peer{f' (Herder {version})' if version else ''}"
        f" speaks {protocol}: install the same version of Herder on both sides"
    )


def _forbidden(peer: Peer, verb: str) -> Unauthorized:
    return Unauthorized(f"the role {peer.role!r} (certificate of {peer.name!r}) may not send {verb}")


def _kind_of(hello: Hello) -> str:
    return "a client" if hello.node is None else "an agent"


def _head_of(body: memoryview) -> list[msgspec.Raw]:
    try:
        return decode_body(_head_decoder, body)
    except RemoteProtocolError:
        return []


def _scalar_of(raw: msgspec.Raw) -> str | int | None:
    try:
        return decode_body(_scalar_decoder, memoryview(raw))
    except RemoteProtocolError:
        return None


def _verb_of(body: memoryview) -> str:
    head = _head_of(body)
    verb = _scalar_of(head[0]) if head else None
    return verb if isinstance(verb, str) else ""


def _protocol_of(body: memoryview) -> int | None:
    head = _head_of(body)
    if len(head) < 2 or _scalar_of(head[0]) != "Hello":
        return None
    protocol = _scalar_of(head[1])
    return protocol if isinstance(protocol, int) else None
