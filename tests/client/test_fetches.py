"""Large results arrive whole, whatever happens to the link."""

from __future__ import annotations

from herder.fetches import FETCHES_MAX, Fetches
from herder_shared.ids import BlobId
from herder_shared.wire.messages import BlobStored, PutBlob, WantBlob

NAME = BlobId("b")


def test_chunks_are_put_together_and_confirmed() -> None:
    fetches, got = Fetches(), list[bytes | None]()
    fetches.want(NAME, got.append)
    fetches.want(NAME, got.append)
    assert fetches.pump() == [WantBlob(NAME, 0)]
    assert fetches.pump() == []
    assert fetches.received(PutBlob(NAME, 0, 5, b"abc")) == [BlobStored(NAME, 3)]
    assert got == []
    assert fetches.received(PutBlob(NAME, 3, 5, b"de")) == [BlobStored(NAME, 5)]
    assert got == [b"abcde", b"abcde"]
    assert fetches.received(PutBlob(NAME, 0, 5, b"abc")) == []


def test_a_lost_link_is_continued_where_it_stopped() -> None:
    fetches, got = Fetches(), list[bytes | None]()
    fetches.want(NAME, got.append)
    fetches.pump()
    fetches.received(PutBlob(NAME, 0, 5, b"abc"))
    fetches.rewind()
    assert fetches.pump() == [WantBlob(NAME, 3)]
    assert fetches.received(PutBlob(NAME, 0, 5, b"abc")) == []
    fetches.received(PutBlob(NAME, 3, 5, b"de"))
    assert got == [b"abcde"]


def test_a_forgotten_blob_is_told() -> None:
    fetches, got = Fetches(), list[bytes | None]()
    fetches.want(NAME, got.append)
    fetches.missing(NAME)
    fetches.missing(NAME)
    assert got == [None]


def test_few_are_fetched_at_a_time() -> None:
    fetches, got = Fetches(), list[bytes | None]()
    for n in range(FETCHES_MAX + 2):
        fetches.want(BlobId(f"b{n}"), got.append)
    assert len(fetches.pump()) == FETCHES_MAX
    fetches.received(PutBlob(BlobId("b0"), 0, 1, b"x"))
    assert fetches.pump() == [WantBlob(BlobId(f"b{FETCHES_MAX}"), 0)]
