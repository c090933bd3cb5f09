"""Readiness by an epoll of our own."""

from __future__ import annotations

import asyncio
import os

from herder_agent.launch.poller import Poller


def test_callback_comes_while_there_is_something_to_read_and_not_after_remove() -> None:
    async def go() -> list[bytes]:
        poller = Poller(asyncio.get_running_loop())
        read, write = os.pipe()
        heard: list[bytes] = []
        came = asyncio.Event()

        def readable() -> None:
            heard.append(os.read(read, 2))
            came.set()

        poller.add(read, readable)
        os.write(write, b"abc")
        async with asyncio.timeout(30):
            while len(heard) < 2:
                came.clear()
                await came.wait()
        poller.remove(read)
        os.write(write, b"d")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        poller.remove(read)
        poller.close()
        poller.remove(read)
        os.close(read)
        os.close(write)
        return heard

    assert asyncio.run(go()) == [b"ab", b"c"]


def test_callback_which_removes_another_of_the_same_round_keeps_it_silent() -> None:
    async def go() -> list[int]:
        poller = Poller(asyncio.get_running_loop())
        pipes = [os.pipe(), os.pipe()]
        heard: list[int] = []
        came = asyncio.Event()

        def readable(number: int) -> None:
            heard.append(number)
            for read, _ in pipes:
                poller.remove(read)
            came.set()

        for number, (read, write) in enumerate(pipes):
            poller.add(read, lambda number=number: readable(number))  # type: ignore[misc]
            os.write(write, b"x")
        async with asyncio.timeout(30):
            await came.wait()
        poller.close()
        for pipe in pipes:
            for fd in pipe:
                os.close(fd)
        return heard

    assert len(asyncio.run(go())) == 1
