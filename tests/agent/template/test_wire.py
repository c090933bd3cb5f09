"""Frames: cut anywhere, joined, with descriptors, and what is no frame."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from herder_agent.template import wire

Ends = tuple[wire.Channel, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """A channel and its peer's raw socket."""
    near, far = socket.socketpair()
    channel = wire.adopt(near.detach())
    yield channel, far
    channel.close()
    far.close()


def test_frames_may_be_cut_at_every_byte(ends: Ends) -> None:
    channel, far = ends
    frame = wire.pack({"t": "task", "n": 1}, b"body")
    for cut in range(1, len(frame)):
        far.sendall(frame[:cut])
        assert not channel.has_frame()
        far.sendall(frame[cut:])
        received = channel.receive()
        assert received is not None
        assert received[0] == {"t": "task", "n": 1}
        assert bytes(received[1]) == b"body"


def test_frames_may_come_together_and_be_larger_than_the_buffer(ends: Ends) -> None:
    channel, far = ends
    large = bytes(range(256)) * 400
    far.sendall(wire.pack({"t": "a"}) + wire.pack({"t": "b"}, large) + wire.pack({"t": "c"}, b"x"))
    bodies = []
    for _ in range(3):
        received = channel.receive()
        assert received is not None
        bodies.append((received[0]["t"], bytes(received[1])))
    assert bodies == [("a", b""), ("b", large), ("c", b"x")]
    assert not channel.has_frame()


def test_descriptors_stay_with_their_frame(ends: Ends) -> None:
    channel, far = ends
    pipes = [os.pipe() for _ in range(2)]
    for number, (read, _) in enumerate(pipes):
        far.sendall(wire.pack({"t": "plain"}))
        socket.send_fds(far, [wire.pack({"t": "fd", "n": number})], [read])
    for number, (read, write) in enumerate(pipes):
        assert channel.receive() is not None
        received = channel.receive()
        assert received is not None
        assert received[0]["n"] == number
        (taken,) = channel.take_descriptors(1)
        os.write(write, b"%d" % number)
        assert os.read(taken, 10) == b"%d" % number
        assert not os.get_inheritable(taken)
        for fd in (taken, read, write):
            os.close(fd)


def test_announced_descriptors_that_did_not_come_break_the_frame(ends: Ends) -> None:
    with pytest.raises(wire.BrokenFrame):
        ends[0].take_descriptors(1)


@pytest.mark.parametrize("content", [b"\xff" * 12, wire.HEADER.pack(3, 0) + b"[1]", wire.HEADER.pack(2, 0) + b"{\xff"])
def test_what_is_no_frame_is_refused(ends: Ends, content: bytes) -> None:
    ends[1].sendall(content)
    with pytest.raises(wire.BrokenFrame):
        ends[0].receive()


def test_deep_nesting_is_refused(ends: Ends) -> None:
    head = b'{"a":' + b"[" * 100_000
    ends[1].sendall(wire.HEADER.pack(len(head), 0) + head)
    with pytest.raises(wire.BrokenFrame):
        ends[0].receive()


def test_end_of_the_connection_is_none_even_within_a_frame(ends: Ends) -> None:
    channel, far = ends
    far.sendall(wire.pack({"t": "cut"})[:-1])
    far.close()
    assert channel.receive() is None
