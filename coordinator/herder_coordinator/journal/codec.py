"""Batches of records <-> bytes. A batch says which it is and carries a checksum, so that nothing half written,
misplaced or rotten is ever taken for history.

Layout: u32 CRC-32 of all that follows · u64 sequence number · msgpack array of records. Big-endian.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import msgspec

from herder_coordinator.core.records import Record
from herder_shared.limits import MIB

_HEAD = struct.Struct(">IQ")
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[list[Record]] = msgspec.msgpack.Decoder(list[Record])


class DamagedBatch(ValueError):
    """These bytes are not the batch that was written."""


def encode_batch(seq: int, records: Sequence[Record]) -> bytes:
    """The bytes of batch number `seq`."""
    return _headed(seq, _encoder.encode(records))


def _headed(seq: int, body: bytes) -> bytes:
    crc = zlib.crc32(body, zlib.crc32(seq.to_bytes(8, "big")))
    return _HEAD.pack(crc, seq) + body


def decode_batch(seq: int, content: bytes) -> list[Record]:
    """The records of batch number `seq`.

    Raises:
        DamagedBatch: the bytes are cut, changed, or those of another batch.
    """
    if len(content) < _HEAD.size:
        raise DamagedBatch(f"batch {seq} is cut after {len(content)} bytes")
    crc, found = _HEAD.unpack_from(content)
    if zlib.crc32(memoryview(content)[4:]) != crc:
        raise DamagedBatch(f"batch {seq}: the checksum of its {len(content)} bytes is wrong")
    if found != seq:
        raise DamagedBatch(f"batch {found} stands where batch {seq} should be")
    try:
        return _decoder.decode(memoryview(content)[_HEAD.size :])
    except msgspec.MsgspecError as error:
        raise DamagedBatch(f"batch {seq} has a record which this version does not know: {error}") from error


#: Records in one row, and their bytes: what a crash can tear, and what a replay holds in memory at a time. (One record
#: may be larger than that; it is below 5 MiB.)
ROW_RECORDS_MAX = 1_000
ROW_BYTES_MAX = 8 * MIB


def encode_snapshot(first: int, records: Iterable[Record]) -> Iterator[tuple[int, bytes]]:
    """As `encode_rows`, for records that may be millions of bytes each: a row of them is in memory at a time."""
    number, size_bytes = first, 0
    bodies: list[bytes] = []
    for record in records:
        body = _encoder.encode(record)
        if bodies and (len(bodies) >= ROW_RECORDS_MAX or size_bytes + len(body) > ROW_BYTES_MAX):
            yield number, _whole(number, bodies)
            number, bodies, size_bytes = number + 1, [], 0
        bodies.append(body)
        size_bytes += len(body)
    if bodies:
        yield number, _whole(number, bodies)


def _whole(seq: int, bodies: Sequence[bytes]) -> bytes:
    return _headed(seq, _encoder.encode([msgspec.Raw(body) for body in bodies]))


def encode_rows(first: int, records: Iterable[Record]) -> Iterator[tuple[int, bytes]]:
    """Records as numbered rows of bounded size, from number `first` on."""
    number = first
    iterator = iter(records)
    while group := list(islice(iterator, ROW_RECORDS_MAX)):
        todo = [group]
        while todo:
            part = todo.pop()
            content = encode_batch(number, part)
            if len(content) > ROW_BYTES_MAX and len(part) > 1:
                middle = len(part) // 2
                todo += [part[middle:], part[:middle]]
                continue
            yield number, content
            number += 1
