"""Sessions: greeting, versions, clusters, epochs, roles, silence, and what is sent again."""

from __future__ import annotations

import msgspec
import pytest

from herder_shared.errors import (
    ConfigError,
    HerderError,
    ProtocolMismatch,
    RemoteProtocolError,
    Unauthorized,
    Unreachable,
)
from herder_shared.ids import BlobId, ClusterId, Incarnation, JobId, NodeName
from herder_shared.limits import FRAME_BYTES_MAX_HELLO, PROTOCOL_VERSION
from herder_shared.wire.frame import encode_frame
from herder_shared.wire.messages import (
    AgentToCoordinator,
    Answer,
    AttemptsStarted,
    BlobStored,
    ClientToCoordinator,
    CoordinatorToAgent,
    CoordinatorToClient,
    Drain,
    DrainNode,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    Message,
    NodeFacts,
    PutBlob,
    Query,
    Refused,
    Role,
    ShutDown,
    Sync,
    Welcome,
)
from herder_shared.wire.session import (
    AcceptorSession,
    DiallerSession,
    Peer,
    SessionState,
    Unsettled,
    error_of,
    is_worth_another_try,
    refusal,
)

CLUSTER = ClusterId("c1" * 16)
OTHER = ClusterId("0d" * 16)
CLIENT_HELLO = Hello(PROTOCOL_VERSION, CLUSTER, Incarnation("i" * 16), epoch_seen=5)
AGENT_HELLO = msgspec.structs.replace(CLIENT_HELLO, node=NodeFacts(NodeName("n1"), 4, 1 << 30))
WELCOME = Welcome(CLUSTER, epoch=5, session=1)


def peer(role: Role, name: str = "n1", cluster: ClusterId = CLUSTER) -> Peer:
    return Peer(role, name, cluster, "1f")


def hello_for(role: Role) -> Hello:
    return AGENT_HELLO if role == "agent" else CLIENT_HELLO


def open_acceptor(role: Role = "client") -> AcceptorSession:
    session = AcceptorSession(CLUSTER, peer(role))
    assert session.receive(encode_frame(hello_for(role)), 0.0) == []
    session.send(WELCOME)
    return session


def open_dialler(hello: Hello = CLIENT_HELLO) -> DiallerSession:
    session = DiallerSession()
    session.send(hello)
    assert session.receive(encode_frame(WELCOME), 0.0) == []
    return session


def bare(kind: type) -> bytes:
    """A message of this kind that lacks all fields: enough to see whether the kind is allowed at all."""
    body = msgspec.msgpack.encode([kind.__name__])
    return len(body).to_bytes(4, "big") + body


# --- greeting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["agent", "client", "admin"])
def test_both_ends_are_open_after_hello_and_welcome(role: Role) -> None:
    dialler, acceptor = DiallerSession(), AcceptorSession(CLUSTER, peer(role))
    assert acceptor.receive(dialler.send(hello_for(role)), 1.0) == []
    assert acceptor.hello == hello_for(role)
    assert {acceptor.state, dialler.state} == {SessionState.GREETING}
    assert dialler.receive(acceptor.send(WELCOME) + acceptor.send(HeartbeatAck(1)), 1.0) == [HeartbeatAck(1)]
    assert dialler.welcome == WELCOME
    assert {acceptor.state, dialler.state} == {SessionState.OPEN}
    assert acceptor.receive(dialler.send(Heartbeat(2)), 1.0) == [Heartbeat(2)]


def test_another_version_is_a_protocol_mismatch_whatever_its_hello_looks_like() -> None:
    for body in (
        msgspec.msgpack.encode(msgspec.structs.replace(CLIENT_HELLO, protocol=PROTOCOL_VERSION + 1, version="9.0")),
        msgspec.msgpack.encode(["Hello", PROTOCOL_VERSION + 1, {"everything": "else"}, 7]),
    ):
        with pytest.raises(ProtocolMismatch, match="same version"):
            AcceptorSession(CLUSTER, peer("client")).receive(len(body).to_bytes(4, "big") + body, 0.0)


@pytest.mark.parametrize(
    ("hello", "whose", "text"),
    [
        (msgspec.structs.replace(CLIENT_HELLO, cluster=OTHER), peer("client"), "not 0d0d"),
        (CLIENT_HELLO, peer("client", cluster=OTHER), "use the profile of this cluster"),
        (CLIENT_HELLO, peer("coordinator"), "'coordinator' may not connect"),
        (CLIENT_HELLO, peer("agent"), "as a client"),
        (AGENT_HELLO, peer("client"), "as an agent"),
        (AGENT_HELLO, peer("admin"), "as an agent"),
        (AGENT_HELLO, peer("agent", "n2"), "may not connect as node 'n1'"),
    ],
)
def test_a_hello_that_its_certificate_does_not_cover_is_unauthorized(hello: Hello, whose: Peer, text: str) -> None:
    session = AcceptorSession(CLUSTER, whose)
    with pytest.raises(Unauthorized, match=text):
        session.receive(encode_frame(hello), 0.0)
    assert session.state is SessionState.START


def test_a_lower_epoch_is_left_and_an_equal_or_higher_one_is_served() -> None:
    for epoch in (5, 6):
        session = DiallerSession()
        session.send(CLIENT_HELLO)
        session.receive(encode_frame(msgspec.structs.replace(WELCOME, epoch=epoch)), 0.0)
        assert session.state is SessionState.OPEN
    session = DiallerSession()
    session.send(CLIENT_HELLO)
    with pytest.raises(Unreachable, match="life 4") as caught:
        session.receive(encode_frame(msgspec.structs.replace(WELCOME, epoch=4)), 0.0)
    assert is_worth_another_try(caught.value)
    assert session.state is SessionState.GREETING


def test_a_welcome_of_another_cluster_is_unauthorized() -> None:
    session = DiallerSession()
    session.send(CLIENT_HELLO)
    with pytest.raises(Unauthorized, match="0d0d"):
        session.receive(encode_frame(msgspec.structs.replace(WELCOME, cluster=OTHER)), 0.0)


def test_anything_before_the_greeting_is_a_protocol_error() -> None:
    first = encode_frame(CLIENT_HELLO)
    for data in (encode_frame(Goodbye()), first + encode_frame(Goodbye()), first + first, bare(Hello)):
        with pytest.raises(RemoteProtocolError):
            AcceptorSession(CLUSTER, peer("client")).receive(data, 0.0)
    with pytest.raises(RemoteProtocolError):
        DiallerSession().receive(encode_frame(WELCOME), 0.0)
    greeted = DiallerSession()
    greeted.send(CLIENT_HELLO)
    with pytest.raises(RemoteProtocolError):
        greeted.receive(encode_frame(HeartbeatAck(1)), 0.0)


def test_frames_are_small_until_the_welcome() -> None:
    large = PutBlob(BlobId("a"), 0, 1, bytes(FRAME_BYTES_MAX_HELLO))
    with pytest.raises(RemoteProtocolError, match="announces"):
        AcceptorSession(CLUSTER, peer("client")).receive(encode_frame(large)[:4], 0.0)
    assert open_acceptor().receive(encode_frame(large), 0.0) == [large]


def test_a_refusal_ends_the_session_and_names_its_error() -> None:
    acceptor, dialler = AcceptorSession(CLUSTER, peer("client")), DiallerSession()
    acceptor.receive(dialler.send(CLIENT_HELLO), 0.0)
    dialler.receive(acceptor.send(refusal(Unauthorized("certificate revoked"))), 0.0)
    assert acceptor.state is dialler.state is SessionState.ENDED
    assert dialler.refused == Refused("Unauthorized", "certificate revoked")


def test_a_refusal_of_an_open_session_comes_after_what_was_sent_before_it() -> None:
    acceptor, dialler = open_acceptor(), open_dialler()
    data = acceptor.send(HeartbeatAck(1)) + acceptor.send(Refused("Unauthorized", "revoked")) + bare(Hello)
    assert dialler.receive(data, 0.0) == [HeartbeatAck(1)]
    assert dialler.refused is not None
    assert dialler.receive(b"junk" * 10, 0.0) == []


def test_sending_what_the_state_does_not_allow_is_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        DiallerSession().send(Goodbye())
    with pytest.raises(AssertionError):
        AcceptorSession(CLUSTER, peer("client")).send(WELCOME)
    with pytest.raises(AssertionError):
        open_acceptor().send(WELCOME)


# --- roles -----------------------------------------------------------------------------------------------------------

_KINDS: list[type] = sorted(set(Message.__args__), key=lambda kind: kind.__name__)
_ALLOWED: dict[str, set[type]] = {
    "agent": {*AgentToCoordinator.__args__, Heartbeat},
    "admin": {*ClientToCoordinator.__args__, Heartbeat},
    "client": {*ClientToCoordinator.__args__, Heartbeat} - {DrainNode, ShutDown},
}


@pytest.mark.parametrize("role", ["agent", "client", "admin"])
@pytest.mark.parametrize("kind", _KINDS, ids=lambda kind: kind.__name__)
def test_the_coordinator_takes_from_a_role_exactly_its_own_verbs(role: Role, kind: type) -> None:
    session = open_acceptor(role)
    body = msgspec.msgpack.encode(ADMIN_EXAMPLES.get(kind, [kind.__name__]))
    data = len(body).to_bytes(4, "big") + body
    if kind in _ALLOWED[role]:
        # Whole, or incomplete and therefore a protocol error: but never forbidden.
        try:
            session.receive(data, 0.0)
        except RemoteProtocolError:
            pass
    else:
        with pytest.raises(Unauthorized, match=f"'{role}'.*may not send {kind.__name__}"):
            session.receive(data, 0.0)


ADMIN_EXAMPLES: dict[type, Message] = {DrainNode: DrainNode(1, NodeName("n1")), ShutDown: ShutDown(1)}


@pytest.mark.parametrize("kind", _KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("hello", [CLIENT_HELLO, AGENT_HELLO], ids=["client", "agent"])
def test_a_dialler_takes_only_what_a_coordinator_sends_to_its_kind(hello: Hello, kind: type) -> None:
    allowed = CoordinatorToClient.__args__ if hello.node is None else CoordinatorToAgent.__args__
    session = open_dialler(hello)
    if kind in {*allowed, HeartbeatAck, Refused}:
        return
    with pytest.raises(RemoteProtocolError, match="Invalid value"):
        session.receive(bare(kind), 0.0)


def test_messages_arrive_as_they_were_sent_in_both_directions() -> None:
    acceptor, dialler = open_acceptor("agent"), open_dialler(AGENT_HELLO)
    up: list[Message] = [Sync(), AttemptsStarted(()), BlobStored(BlobId("b"), 3)]
    assert acceptor.receive(b"".join(map(dialler.send, up)), 0.0) == up
    assert dialler.receive(acceptor.send(Drain()), 0.0) == [Drain()]
    client = open_dialler()
    assert client.receive(open_acceptor().send(Answer(3, error="JobNotFound")), 0.0) == [Answer(3, error="JobNotFound")]


def test_a_known_verb_with_wrong_fields_is_a_protocol_error_and_not_a_matter_of_roles() -> None:
    body = msgspec.msgpack.encode(["Query", 1, "everything"])
    with pytest.raises(RemoteProtocolError):
        open_acceptor("client").receive(len(body).to_bytes(4, "big") + body, 0.0)


# --- silence, repetition, errors -------------------------------------------------------------------------------------


def test_a_peer_is_silent_when_nothing_came_for_the_time_given() -> None:
    session = open_acceptor()
    session.receive(encode_frame(Query(1, "jobs", JobId("j"))), 10.0)
    assert not session.is_silent(39.9, 30.0)
    assert session.is_silent(40.0, 30.0)
    session.forgive(5.0)
    assert not session.is_silent(44.9, 30.0)


def test_half_a_frame_is_a_sign_of_life() -> None:
    session = open_acceptor()
    session.receive(encode_frame(Goodbye())[:3], 10.0)
    assert not session.is_silent(39.0, 30.0)


def test_unsettled_messages_are_sent_again_in_their_first_order_until_settled() -> None:
    unsettled = Unsettled()
    for n in range(5):
        unsettled.keep(n, Heartbeat(n))
    unsettled.keep(1, Heartbeat(11))
    assert unsettled.settle(0)
    assert not unsettled.settle(0)
    assert unsettled.settle_where(lambda n: n > 3) == 1
    assert unsettled.resend() == [Heartbeat(11), Heartbeat(2), Heartbeat(3)]
    assert unsettled.resend() == unsettled.resend()
    assert len(unsettled) == 3


@pytest.mark.parametrize("error", [Unauthorized("a"), ProtocolMismatch("b"), Unreachable("c"), ConfigError("d")])
def test_an_error_survives_its_way_as_a_refusal(error: HerderError) -> None:
    back = error_of(refusal(error))
    assert (type(back), str(back)) == (type(error), str(error))


def test_a_refusal_with_a_name_that_is_no_error_of_ours_is_a_plain_error() -> None:
    for name in ("SystemExit", "Any", "_rebuild", "", "__builtins__"):
        assert type(error_of(Refused(name, "text"))) is HerderError


def test_only_being_away_or_broken_is_worth_another_try() -> None:
    assert is_worth_another_try(Unreachable("x"))
    assert is_worth_another_try(RemoteProtocolError("x"))
    for error in (Unauthorized("x"), ProtocolMismatch("x"), ConfigError("x"), HerderError("x")):
        assert not is_worth_another_try(error)
