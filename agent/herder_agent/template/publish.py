"""Setup's value for processes that are no forks of the one that made it: pickled once, into one sealed memory file.

    header | pickle stream | memory of arrays and buffers
    header: magic · u64 start and length of the stream · u64 number of entries · u64 where they are (behind all else)
    entry:  u64 offset of an array's (or buffer's) first byte · u64 its length

Consumers map the file privately and writeable and unpickle: their arrays are ordinary writeable ones which lie in the
mapping, and a write copies the page for the writer alone. Nothing is copied beforehand.

What is kept. The memory of two arrays that overlap is one stretch of the file, so views stay views and overlaps stay
overlaps, whatever their strides; objects keep their identity by pickle's own memo; arrays keep shape, strides,
alignment and whether they are writeable. `OWNDATA` and `base` are not kept: the owner of the memory is the mapping.
Subclasses of arrays and arrays of objects go the way that they chose for pickle, as does all else; what pickles out of
band (PEP 574: pandas, Arrow) is not copied either.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import pickle
import struct
import sys

from . import failures, rehome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HEADER = struct.Struct("<8sQQQQ")
_ENTRY = struct.Struct("<QQ")
_MAGIC = b"herder-1"
#: Memory keeps its address modulo this: what a processor's vector units ask for.
_ALIGNMENT = 64
_WRITE_BYTES = 32 << 20


class NotPublished(Exception):
    """The value does not pickle, or there is no room for it. The text says what and why."""


class Value:
    """A published value, mapped into this process. `load` gives it; the mapping stays as long as the process."""

    def __init__(self, fd: int) -> None:
        self._size = os.fstat(fd).st_size
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = rehome.map_anywhere(self._size, protection, fd)
        self._memory = memoryview((ctypes.c_char * self._size).from_address(address)).cast("B")

    def load(self) -> Any:
        """Unpickle it. Raises whatever the user's types raise."""
        global _loading
        magic, start, length, count, table = _HEADER.unpack_from(self._memory)
        if magic != _MAGIC:
            raise ValueError("not a value that was published")
        entries = list(_ENTRY.iter_unpack(self._memory[table : table + count * _ENTRY.size]))
        _loading = (self._memory, entries)
        try:
            stream = self._memory[start : start + length]
            return pickle.loads(stream, buffers=_Buffers())
        finally:
            _loading = None


#: While a value is loaded: its memory, and the entries.
_loading: tuple[memoryview, list[tuple[int, int]]] | None = None


class _Buffers:
    """The out-of-band buffers in the order in which they were written; arrays take their entries by number."""

    def __init__(self) -> None:
        self._next = 0

    def __iter__(self) -> _Buffers:
        return self

    def __next__(self) -> memoryview:
        assert _loading is not None
        memory, entries = _loading
        count = len(entries)
        while self._next < count:
            offset, length = entries[self._next]
            self._next += 1
            if length & _OUT_OF_BAND:
                length &= ~_OUT_OF_BAND
                return memory[offset : offset + length]
        raise StopIteration


#: Marks the entries that `pickle` asks for in order; no memory is so large.
_OUT_OF_BAND = 1 << 63


def array(number: int, lead: int, shape: Any, strides: Any, dtype: Any, is_writeable: bool) -> Any:  # noqa: PLR0917
    """Rebuild a numpy array on the memory of entry `number`; its first element is `lead` bytes into it."""
    assert _loading is not None
    memory, entries = _loading
    made = sys.modules["numpy"].ndarray(shape, dtype, memory, entries[number][0] + lead, strides)
    if not is_writeable:
        made.flags.writeable = False
    return made


def tensor(values: Any, requires_grad: bool) -> Any:
    """Rebuild a torch tensor on an array's memory."""
    made = __import__("torch").from_numpy(values)
    return made.requires_grad_() if requires_grad else made


class _Spans:
    """The stretches of memory that a value refers to."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int, int]] = []
        self._kept: list[Any] = []

    def add(self, address: int, length: int, owner: Any, mark: int = 0) -> int:
        """The number of this entry. `owner` keeps the memory alive."""
        self.entries.append((address, length, mark))
        self._kept.append(owner)
        return len(self.entries) - 1

    def clear(self) -> None:
        """Let go of the owners now: a memoryview that the cycle collector clears while its buffer is in use crashes
        (seen with 3.11), and the pickler's class is a cycle."""
        self._kept.clear()

    def merged(self) -> list[tuple[int, int]]:
        """[start, end) of what overlaps, together."""
        found: list[tuple[int, int]] = []
        for address, length, _ in sorted(self.entries):
            if found and address < found[-1][1]:
                found[-1] = (found[-1][0], max(found[-1][1], address + length))
            elif length:
                found.append((address, address + length))
        return found


def publish(value: Any) -> int:
    """A descriptor of the sealed memory file. Raises NotPublished."""
    fd = os.memfd_create("herder-value", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    spans = _Spans()
    try:
        with open(fd, "r+b", closefd=False) as file:
            file.seek(_HEADER.size)
            try:
                _pickler(file, spans).dump(value)
            except Exception as error:
                raise NotPublished(failures.not_serializable(value, error)) from error
            end = file.tell()
        _write_memory(fd, spans, end)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError as error:
        os.close(fd)
        raise NotPublished(f"it cannot be written to shared memory: {error.strerror}") from error
    except BaseException:
        os.close(fd)
        raise
    finally:
        spans.clear()
    return fd


def _pickler(file: Any, spans: _Spans) -> Any:
    import cloudpickle

    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    plain_array = getattr(numpy, "ndarray", None)
    plain_tensor = getattr(torch, "Tensor", None)

    def keep(buffer: pickle.PickleBuffer) -> None:
        raw = buffer.raw()
        address, length = _place_of(raw)
        spans.add(address, length, raw, _OUT_OF_BAND)

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            kind = type(obj)
            if kind is plain_array and obj.nbytes and not obj.dtype.hasobject:
                return array, _describe(obj, spans)
            if kind is plain_tensor and _is_plain(obj):
                return tensor, (obj.detach().numpy(), obj.requires_grad)
            return super().reducer_override(obj)

    return Pickler(file, protocol=5, buffer_callback=keep)


def _describe(array_: Any, spans: _Spans) -> tuple[Any, ...]:
    """What `array` needs to rebuild it."""
    address = array_.__array_interface__["data"][0]
    below = above = 0
    for count, stride in zip(array_.shape, array_.strides, strict=True):
        below += min(0, stride * (count - 1))
        above += max(0, stride * (count - 1))
    number = spans.add(address + below, above - below + array_.itemsize, array_)
    return number, -below, array_.shape, array_.strides, array_.dtype, bool(array_.flags.writeable)


def _is_plain(tensor_: Any) -> bool:
    """Whether it is an ordinary array in main memory, and no result of a computation that autograd remembers."""
    try:
        return bool(
            tensor_.device.type == "cpu"
            and str(tensor_.layout) == "torch.strided"
            and tensor_.is_leaf
            and not (tensor_.is_quantized or tensor_.is_conj() or tensor_.is_neg())
            and tensor_.numel()
            and tensor_.detach().numpy() is not None
        )
    except (RuntimeError, TypeError, AttributeError):
        return False


class _PyBuffer(ctypes.Structure):
    """`Py_buffer` (stable ABI since 3.11)."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def _place_of(buffer: memoryview) -> tuple[int, int]:
    """Address and length of a contiguous buffer, writeable or not."""
    view = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(buffer), ctypes.byref(view), 0)
    try:
        return view.buf or 0, view.len
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))


def _write_memory(fd: int, spans: _Spans, stream_end: int) -> None:
    """Write the stretches of memory behind the stream, then the entries, then the header."""
    at = stream_end
    places: list[tuple[int, int, int]] = []
    for start, end in spans.merged():
        # As far from a page's beginning as it is here, or at least as well aligned.
        grain = rehome.PAGE_BYTES if end - start >= rehome.PAGE_BYTES else _ALIGNMENT
        at += (start - at) % grain
        places.append((start, end, at))
        at += end - start
    os.ftruncate(fd, at)
    for start, end, offset in places:
        _write_stretch(fd, start, end, offset)
    table = at + -at % 8
    os.ftruncate(fd, table)
    entries = b"".join(_entries(spans, places))
    header = _HEADER.pack(_MAGIC, _HEADER.size, stream_end - _HEADER.size, len(spans.entries), table)
    _write_all(fd, memoryview(entries), table)
    _write_all(fd, memoryview(header), 0)


def _entries(spans: _Spans, places: list[tuple[int, int, int]]) -> list[bytes]:
    from bisect import bisect_right

    starts = [start for start, _, _ in places]
    found = []
    for address, length, mark in spans.entries:
        offset = 0
        if length:
            start, _, place = places[bisect_right(starts, address) - 1]
            offset = place + address - start
        found.append(_ENTRY.pack(offset, length | mark))
    return found


def _write_stretch(fd: int, start: int, end: int, offset: int) -> None:
    """Pages that were never touched stay holes of the file."""
    page = rehome.PAGE_BYTES
    first, last = -(-start // page) * page, end // page * page
    if last - first < rehome.BLOCK_BYTES_MIN:
        _write_memory_at(fd, start, end, offset)
        return
    _write_memory_at(fd, start, first, offset)
    for below in range(first, last, _WRITE_BYTES):
        length = min(_WRITE_BYTES, last - below)
        for left, right in rehome.runs(below, length):
            _write_memory_at(fd, below + left, below + right, offset + below + left - start)
    _write_memory_at(fd, last, end, offset + last - start)


def _write_memory_at(fd: int, start: int, end: int, offset: int) -> None:
    if end > start:
        _write_all(fd, memoryview((ctypes.c_char * (end - start)).from_address(start)).cast("B"), offset)


def _write_all(fd: int, content: memoryview, offset: int) -> None:
    written = 0
    while written < len(content):
        written += os.pwrite(fd, content[written:], offset + written)
