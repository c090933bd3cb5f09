"""The memory file in which setup's value is published."""

from __future__ import annotations

import os
import pickle
import threading
from typing import Any

import numpy as np
import pytest

from herder_agent.template import publish

MIB = 1 << 20


def _through(value: Any) -> Any:
    fd = publish.publish(value)
    try:
        return publish.Value(fd).load()
    finally:
        os.close(fd)


def test_each_consumer_has_its_own_writeable_copy() -> None:
    fd = publish.publish(np.arange(1000))
    first, second = publish.Value(fd).load(), publish.Value(fd).load()
    os.close(fd)
    first[0] = 5
    assert (int(first[0]), int(second[0])) == (5, 0)


def test_file_is_sealed() -> None:
    fd = publish.publish(np.arange(1000))
    try:
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 10)
    finally:
        os.close(fd)


def test_memory_that_two_arrays_share_is_written_once() -> None:
    whole = np.ones(MIB, dtype="u1")
    fd = publish.publish([whole, whole[::3], whole[5:], whole.reshape(1024, 1024).T, whole[::-1]])
    size = os.fstat(fd).st_size
    os.close(fd)
    assert size < MIB + 16384


def test_every_layout_comes_back() -> None:
    base = np.arange(5 * 6 * 7, dtype="f8").reshape(5, 6, 7)
    arrays = [
        base,
        base[::-1, ::2, 3],
        base.transpose(2, 0, 1),
        np.asfortranarray(base),
        np.broadcast_to(base[0], (4, 6, 7)),
        base.astype(">i2"),
        np.array(["a", "bc"]),
        np.array([1, 2], dtype="M8[us]"),
        base[1:1],
        np.frombuffer(b"12345678" * 4, dtype="i4"),
        np.ndarray((3,), "i4", bytearray(20), 1),
    ]
    for old, new in zip(arrays, _through(arrays), strict=True):
        assert np.array_equal(old, new)
        assert (old.dtype, old.strides, old.shape) == (new.dtype, new.strides, new.shape)
        for flag in ("writeable", "c_contiguous", "f_contiguous", "aligned"):
            assert getattr(old.flags, flag) == getattr(new.flags, flag), flag


def test_out_of_band_buffers_keep_order_overlap_and_whether_they_are_read_only() -> None:
    memory = bytearray(range(100))
    buffers = [
        pickle.PickleBuffer(memory),
        np.arange(5),
        pickle.PickleBuffer(memoryview(memory)[10:20]),
        pickle.PickleBuffer(b""),
        pickle.PickleBuffer(bytes(range(50))),
    ]
    whole, _, part, empty, fixed = _through(buffers)
    whole[11] = 255
    assert (bytes(part[:3]), bytes(empty), bytes(fixed)) == (b"\x0a\xff\x0c", b"", bytes(range(50)))
    assert memoryview(fixed).readonly
    assert not memoryview(whole).readonly


def test_untouched_pages_stay_holes() -> None:
    array = np.zeros(1 << 26)
    array[1 << 20] = 3
    fd = publish.publish(array)
    blocks = os.fstat(fd).st_blocks * 512
    value = publish.Value(fd).load()
    os.close(fd)
    assert blocks < 4 * MIB
    assert (float(value[1 << 20]), float(value[1 << 21])) == (3.0, 0.0)


def test_what_does_not_pickle_is_named_and_leaves_nothing_behind() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(publish.NotPublished, match="lock"):
        publish.publish({"a": [np.ones(10), threading.Lock()]})
    assert os.listdir("/proc/self/fd") == before


def test_class_that_exists_nowhere_else_goes_by_value() -> None:
    class Own:
        number = 7

    assert _through(Own()).number == 7
