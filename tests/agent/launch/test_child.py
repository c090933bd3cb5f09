"""Captured output: head and tail are kept, the middle is dropped, nothing blocks."""

from __future__ import annotations

import asyncio
import os

from hypothesis import given
from hypothesis import strategies as st

from herder_agent.launch.child import Capture, Child


def capture_of(loop: asyncio.AbstractEventLoop, head: int, tail: int) -> tuple[Capture, int]:
    read, write = os.pipe()
    return Capture(loop, read, head, tail), write


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=20), st.integers(1, 30), st.integers(1, 30))
def test_head_and_tail_of_what_was_written_are_kept(writes: list[bytes], head: int, tail: int) -> None:
    loop = asyncio.new_event_loop()
    capture, write = capture_of(loop, head, tail)
    for data in writes:
        os.write(write, data)
        capture.drain()
    whole = b"".join(writes)
    kept, dropped = capture.take()
    if len(whole) <= head + tail:
        assert (kept, dropped) == (whole, False)
    else:
        assert (kept, dropped) == (whole[:head] + whole[-tail:], True)
    assert capture.take() == (b"", False)
    os.close(write)
    capture.drain()
    capture.close()
    loop.close()


def test_attached_capture_reads_as_it_comes_until_the_end() -> None:
    async def main() -> None:
        capture, write = capture_of(asyncio.get_running_loop(), 10, 10)
        capture.attach()
        for _ in range(4):
            os.write(write, b"x" * 60_000)
            await asyncio.sleep(0)
            await asyncio.sleep(0.001)
        os.close(write)
        await asyncio.sleep(0.001)
        assert capture.take() == (b"x" * 20, True)
        capture.close()

    asyncio.run(main())


def test_child_without_output_has_no_logs_and_closes_twice() -> None:
    loop = asyncio.new_event_loop()
    child = Child(1, os.getpid(), "fork", 1)
    child.stdout, out = capture_of(loop, 5, 5)
    child.stderr, err = capture_of(loop, 5, 5)
    assert child.take_logs() is None
    os.write(err, b"oh")
    child.drain_output()
    logs = child.take_logs()
    assert logs is not None
    assert (logs.stdout, logs.stderr, logs.truncated) == (b"", b"oh", False)
    child.close()
    child.close()
    os.close(out)
    os.close(err)
    loop.close()
