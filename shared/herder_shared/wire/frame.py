"""Frames: a length (32 bits, big-endian), then one message in msgpack. No I/O.

The length is compared with the bound before a byte is stored for it, so a peer cannot make us reserve memory by
announcing much; and whatever a peer's bytes are, the only error is `RemoteProtocolError`.
"""

from __future__ import annotations

from struct import Struct
from typing import TypeVar

import msgspec

from herder_shared.errors import PayloadTooLarge, RemoteProtocolError
from herder_shared.limits import FRAME_BYTES_MAX

_LENGTH = Struct(">I")
_encoder = msgspec.msgpack.Encoder()
_T = TypeVar("_T")


def encode_frame(message: msgspec.Struct) -> bytes:
    """The message as a frame.

    Raises:
        PayloadTooLarge: its encoded form is above `FRAME_BYTES_MAX`: the sender must cut it into several.
    """
    body = _encoder.encode(message)
    if len(body) > FRAME_BYTES_MAX:
        raise PayloadTooLarge(
            f"a {type(message).__name__} takes {len(body)} bytes, above the {FRAME_BYTES_MAX} of one frame"
        )
    return _LENGTH.pack(len(body)) + body


def decode_body(decoder: msgspec.msgpack.Decoder[_T], body: bytes | memoryview) -> _T:
    """Decode one frame's body.

    Raises:
        RemoteProtocolError: it is not what `decoder` accepts. Deep nesting, wrong types and bad UTF-8 all end here.
    """
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError, OverflowError) as error:
        raise RemoteProtocolError(f"a frame of {len(body)} bytes is not a message: {error}") from error


class FrameDecoder:
    """Cuts a stream of bytes, arriving in any pieces, into the bodies of frames.

    Invariant: between calls it holds less than one frame, so at most `bytes_max` + 4 bytes.
    """

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._pending = bytearray()
        #: What `_pending` must grow to before there is anything to do.
        self._wanted_bytes = _LENGTH.size

    @property
    def pending_bytes(self) -> int:
        """Bytes held of a frame that is not complete."""
        return len(self._pending)

    def feed(self, data: bytes | bytearray | memoryview) -> list[memoryview]:
        """Take bytes; give the bodies of all frames that are complete now, in order.

        The views are of bytes that nobody changes any more; they may be kept.

        Raises:
            RemoteProtocolError: a frame announces more than `bytes_max`. The stream cannot be continued.
        """
        if self._pending:
            self._pending += data
            if len(self._pending) < self._wanted_bytes:
                return []
            view = memoryview(bytes(self._pending))
            self._pending = bytearray()
        else:
            view = memoryview(data if isinstance(data, bytes) else bytes(data))
        bodies: list[memoryview] = []
        start, end = 0, len(view)
        self._wanted_bytes = _LENGTH.size
        while end - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(view, start)
            if length > self.bytes_max:
                raise RemoteProtocolError(f"a frame announces {length} bytes; at most {self.bytes_max} are allowed")
            stop = start + _LENGTH.size + length
            if stop > end:
                self._wanted_bytes = _LENGTH.size + length
                break
            bodies.append(view[start + _LENGTH.size : stop])
            start = stop
        if start < end:
            self._pending += view[start:]
        return bodies
