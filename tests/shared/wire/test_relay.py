"""A task's own client: what it may say, and the link that has no connection of its own."""

from __future__ import annotations

import msgspec
import pytest

from herder_shared.errors import PayloadTooLarge, RemoteProtocolError, Unauthorized
from herder_shared.ids import ClusterId, Incarnation, JobId, NodeName, blob_id
from herder_shared.limits import TASK_CLIENT_FRAME_BYTES_MAX
from herder_shared.wire import messages as m
from herder_shared.wire.relay import Relayed, read_from_client, read_to_client
from herder_shared.wire.session import Peer
from herder_shared.wire.stream import Link

encode = msgspec.msgpack.Encoder().encode
CLUSTER = ClusterId("c" * 32)


@pytest.mark.parametrize("message", [m.DrainNode(1, NodeName("n")), m.ShutDown(1)])
def test_a_task_is_no_admin(message: m.Message) -> None:
    with pytest.raises(Unauthorized, match=type(message).__name__):
        read_from_client(encode(message))


@pytest.mark.parametrize("body", [b"", b"\xff", encode(m.SubmitOk(JobId("j"), 1)), encode(m.Sync())])
def test_what_is_no_message_of_a_client_breaks_the_protocol(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        read_from_client(body)
    if body != encode(m.SubmitOk(JobId("j"), 1)):
        with pytest.raises(RemoteProtocolError):
            read_to_client(body)


class Carrier:
    """What a relayed link has below it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.flushes = 0
        self.overs: list[tuple[str, m.Refused | None]] = []
        self.end = Relayed(
            carry=self.bodies.append,
            flushed=self.flush,
            over=lambda reason, refused: self.overs.append((reason, refused)),
            waiting_bytes=lambda: 17,
        )

    def flush(self) -> None:
        self.flushes += 1

    def link(self) -> Link:
        hello = m.Hello(1, CLUSTER, Incarnation("i"))
        return self.end.link(Peer("client", "a task", CLUSTER, "1"), hello, m.Welcome(CLUSTER, 3, 5))


def test_a_link_carries_bodies_until_it_is_over() -> None:
    carrier = Carrier()
    link = carrier.link()
    assert (link.epoch, link.session, link.buffered_bytes) == (3, 5, 17)
    link.put(m.SubmitOk(JobId("j"), 1))
    link.send(m.SubmitOk(JobId("j"), 2))
    assert carrier.flushes == 1  # what was put went with what was sent
    assert [read_to_client(body) for body in carrier.bodies] == [m.SubmitOk(JobId("j"), 1), m.SubmitOk(JobId("j"), 2)]
    link.close("enough")
    link.close("again")
    link.send(m.SubmitOk(JobId("j"), 3))
    assert link.is_closed
    assert (len(carrier.bodies), carrier.overs) == (2, [("enough", None)])


def test_a_refusal_is_the_last_word() -> None:
    carrier = Carrier()
    refused = m.Refused("Unauthorized", "no")
    carrier.link().refuse(refused)
    assert (carrier.bodies, carrier.overs) == ([], [("no", refused)])


def test_a_message_that_does_not_fit_is_refused_before_it_is_carried() -> None:
    carrier = Carrier()
    data = bytes(TASK_CLIENT_FRAME_BYTES_MAX)
    with pytest.raises(PayloadTooLarge, match="PutBlob"):
        carrier.link().send(m.PutBlob(blob_id(data), 0, len(data), data))
    assert not carrier.bodies
