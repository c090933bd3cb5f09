"""The frame codec: whole however it is cut, bounded, and never anything but `RemoteProtocolError`."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herder_shared.errors import PayloadTooLarge, RemoteProtocolError
from herder_shared.ids import BlobId
from herder_shared.limits import FRAME_BYTES_MAX, GIB, KIB, MIB
from herder_shared.wire.frame import FrameDecoder, decode_body, encode_frame
from herder_shared.wire.messages import AgentToCoordinator, BlobStored, ClientToCoordinator, Hello, PutBlob, Welcome

CLIENT = msgspec.msgpack.Decoder(ClientToCoordinator)
DECODERS = [CLIENT, msgspec.msgpack.Decoder(AgentToCoordinator), msgspec.msgpack.Decoder(Hello | Welcome)]

messages = st.lists(
    st.builds(BlobStored, id=st.text(max_size=40).map(BlobId), upto=st.integers(0, 2**40))
    | st.builds(PutBlob, id=st.just(BlobId("b")), offset=st.just(0), total=st.just(1), data=st.binary(max_size=300)),
    max_size=8,
)


def feed_in_pieces(stream: bytes, cuts: list[int]) -> list[object]:
    frames = FrameDecoder(FRAME_BYTES_MAX)
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    bodies = [body for a, b in pairwise(edges) for body in frames.feed(stream[a:b])]
    assert frames.pending_bytes == 0
    return [decode_body(CLIENT, body) for body in bodies]


@given(messages, st.lists(st.integers(0, 10_000), max_size=6))
def test_frames_are_whole_however_the_stream_is_cut(sent: list[PutBlob | BlobStored], cuts: list[int]) -> None:
    assert feed_in_pieces(b"".join(map(encode_frame, sent)), cuts) == sent


def test_frames_are_whole_when_cut_at_every_byte() -> None:
    sent = [BlobStored(BlobId("a" * 40), 1), PutBlob(BlobId("b"), 0, 3, b"xyz"), BlobStored(BlobId(""), 2**33)]
    stream = b"".join(map(encode_frame, sent))
    for cut in range(len(stream) + 1):
        assert feed_in_pieces(stream, [cut]) == sent
    assert feed_in_pieces(stream, list(range(len(stream)))) == sent


def test_views_stay_valid_after_more_was_fed() -> None:
    frames = FrameDecoder(1000)
    stream = bytearray(encode_frame(BlobStored(BlobId("a"), 1)))
    (first,) = frames.feed(stream)
    stream[:] = bytes(len(stream))
    frames.feed(encode_frame(BlobStored(BlobId("b"), 2))[:-1])
    assert decode_body(CLIENT, first) == BlobStored(BlobId("a"), 1)


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_junk_raises_nothing_but_remote_protocol_error(pieces: list[bytes]) -> None:
    frames = FrameDecoder(150)
    try:
        for piece in pieces:
            for body in frames.feed(piece):
                for decoder in DECODERS:
                    try_to_decode(decoder, body)
            assert frames.pending_bytes <= 154
    except RemoteProtocolError:
        pass


@given(st.binary(max_size=200), st.sampled_from(["OpenJob", "SubmitTasks", "Sync", "AttemptsEnded", "Hello", "Query"]))
@settings(max_examples=300)
def test_junk_behind_a_good_tag_raises_nothing_but_remote_protocol_error(junk: bytes, tag: str) -> None:
    body = b"\x96" + msgspec.msgpack.encode(tag) + junk
    for decoder in DECODERS:
        try_to_decode(decoder, body)


def try_to_decode(decoder: msgspec.msgpack.Decoder[object], body: bytes | memoryview) -> None:
    try:
        decode_body(decoder, body)
    except RemoteProtocolError:
        pass


def test_a_gibibyte_announced_is_refused_before_a_byte_is_stored() -> None:
    frames = FrameDecoder(FRAME_BYTES_MAX)
    with pytest.raises(RemoteProtocolError, match="1073741824"):
        frames.feed(GIB.to_bytes(4, "big") + b"x" * 1000)
    assert frames.pending_bytes == 0


@pytest.mark.parametrize(
    "body",
    [
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\x92\xafAttemptsStarted\xdd\x7f\xff\xff\xff",
        b"\x92\xafAttemptsStarted\xdc\xff\xff" * 1000,
        b"\x92\xb1WorkloadsReported\x91\x82\xa3key\xa1k\xa1z" + b"\x91" * 100_000,
        b"\x92\xb1WorkloadsReported\x91\x82\xa3key\xa1k\xa1z" + b"\x81\xa1a" * 100_000,
        b"\x92\xadAttemptsEnded\xc6\xff\xff\xff\xff",
    ],
    ids=["deep", "wide", "wide tuple", "many wide tuples", "deep unknown", "deep unknown maps", "long bytes"],
)
def test_nested_and_oversized_bodies_are_errors_that_cost_no_memory(body: bytes) -> None:
    tracemalloc.start()
    try:
        for decoder in DECODERS:
            with pytest.raises(RemoteProtocolError):
                decode_body(decoder, body)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


def test_wrong_types_are_remote_protocol_errors() -> None:
    for fields in (
        ["BlobStored", 7, 1],
        ["BlobStored", "a", "1"],
        ["BlobStored", "a"],
        ["Nobody", 1],
        {"a": 1},
        7,
        None,
    ):
        with pytest.raises(RemoteProtocolError):
            decode_body(CLIENT, msgspec.msgpack.encode(fields))


def test_fields_that_a_later_version_added_are_ignored() -> None:
    body = msgspec.msgpack.encode(["BlobStored", "a", 1, "something new"])
    assert decode_body(CLIENT, body) == BlobStored(BlobId("a"), 1)


def test_a_message_above_the_bound_is_refused_at_its_sender() -> None:
    with pytest.raises(PayloadTooLarge, match="PutBlob"):
        encode_frame(PutBlob(BlobId("a"), 0, 3 * MIB, bytes(3 * MIB)))


def test_a_large_frame_in_small_pieces_is_held_once() -> None:
    stream = encode_frame(PutBlob(BlobId("a"), 0, MIB, bytes(MIB)))
    frames = FrameDecoder(FRAME_BYTES_MAX)
    pieces = [frames.feed(stream[at : at + 16 * KIB]) for at in range(0, len(stream), 16 * KIB)]
    assert [len(bodies) for bodies in pieces] == [0] * (len(pieces) - 1) + [1]
