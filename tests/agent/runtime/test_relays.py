"""A running task's client: what the agent passes on, and what it does when one of the two others is gone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec

from agent.core.test_step import JOB, SPEC, Machine, ident
from herder_agent.core import events as ev
from herder_agent.core.effects import ReportSlot, ResumeTask
from herder_agent.runtime.relays import Relays
from herder_shared.ids import ClusterId, Incarnation
from herder_shared.limits import TASK_CLIENT_BUFFER_BYTES_MAX, TASK_CLIENT_FRAME_BYTES_MAX
from herder_shared.wire import messages as m
from herder_shared.wire.frame import FrameDecoder, encode_frame
from herder_shared.wire.relay import (
    RELAY_FRAME_BYTES_MAX,
    Closed,
    Heard,
    Opened,
    Said,
    SlotBack,
    TaskHello,
    WaitBegan,
    WaitEnded,
    to_task,
)
from herder_shared.wire.stream import Link

ME = TaskHello(Incarnation("i" * 16), 1, "0.1", "3.11/3.1")
WELCOME = m.Welcome(ClusterId("c" * 32), 3, 5)


class FakeLink:
    """The agent's link: keeps what is sent."""

    def __init__(self) -> None:
        self.welcome = WELCOME
        self.sent: list[Any] = []
        self.buffered_bytes = 0

    def send(self, message: Any) -> None:
        self.sent.append(message)


class Bench:
    """Attempt 1 runs in child 1; its task's end of the private socket is ours."""

    def __init__(self) -> None:
        self.machine = Machine(cores=1).serving()
        self.machine.take(ev.ChildStarted(1))
        self.events: list[ev.Event] = []
        self.link = FakeLink()
        self.relays = Relays(asyncio.get_running_loop(), self.machine.state, self.events.append)
        self.task = self.open()
        self.frames = FrameDecoder(RELAY_FRAME_BYTES_MAX)

    def open(self, child: int = 1) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.relays.open(child, theirs.detach())
        return ours

    def linked(self) -> None:
        self.relays.linked(cast("Link", self.link))

    async def say(self, *messages: msgspec.Struct) -> None:
        await asyncio.get_running_loop().sock_sendall(self.task, b"".join(map(encode_frame, messages)))

    async def hear(self, task: socket.socket | None = None) -> list[Any]:
        data = await asyncio.get_running_loop().sock_recv(task or self.task, 1 << 20)
        return [to_task.decode(body) for body in self.frames.feed(data)]

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - the other end is this very loop
                await asyncio.sleep(0)


def on_a_bench(go: Callable[[Bench], Awaitable[None]]) -> None:
    async def run() -> None:
        bench = Bench()
        try:
            await go(bench)
        finally:
            bench.relays.close()
            bench.task.close()

    asyncio.run(run())


def test_it_passes_on_what_both_say_and_who_waits() -> None:
    async def go(bench: Bench) -> None:
        bench.linked()
        await bench.say(ME, Said(b"one"), WaitBegan(), WaitEnded(4))
        await bench.until(lambda: len(bench.events) == 2)
        assert bench.link.sent == [
            m.TaskClientOpened(ident(1), ME.incarnation, 1, "0.1", "3.11/3.1"),
            m.TaskClientSaid(ident(1), b"one"),
        ]
        assert bench.events == [ev.WaitBegan(ident(1)), ev.WaitEnded(ident(1), 4)]
        (opened,) = await bench.hear()
        assert opened == Opened(WELCOME, SPEC, m.TaskOptions())
        bench.relays.told(m.TellTaskClient(ident(1), b"two"))
        bench.relays.resume(ResumeTask(ident(1), 4, (0,)))
        assert await bench.hear() == [Heard(b"two"), SlotBack(4, (0,))]

    on_a_bench(go)


def test_it_is_introduced_anew_after_each_reconnection() -> None:
    async def go(bench: Bench) -> None:
        await bench.say(ME, Said(b"lost"))
        bench.linked()
        await bench.until(lambda: bench.link.sent)
        await bench.hear()
        bench.relays.unlinked()
        assert await bench.hear() == [Closed()]
        await bench.say(Said(b"lost, too"))
        bench.linked()
        (again,) = await bench.hear()
        assert isinstance(again, Opened)
        assert [type(message) for message in bench.link.sent].count(m.TaskClientOpened) >= 2
        assert m.TaskClientSaid(ident(1), b"lost, too") not in bench.link.sent[:-1]

    on_a_bench(go)


def test_the_coordinator_hears_that_it_is_gone() -> None:
    async def go(bench: Bench) -> None:
        bench.linked()
        await bench.say(ME)
        await bench.until(lambda: bench.link.sent)
        bench.task.close()
        await bench.until(lambda: bench.link.sent[-1] == m.TaskClientClosed(ident(1)))
        bench.relays.told(m.TellTaskClient(ident(1), b"late"))
        bench.relays.resume(ResumeTask(ident(1), 1, ()))

    on_a_bench(go)


def test_a_task_has_one_client_and_one_that_has_ended_none() -> None:
    async def go(bench: Bench) -> None:
        second = bench.open()
        (refused,) = await bench.hear(second)
        assert isinstance(refused, m.Refused)
        assert "another process of this task" in refused.message
        second.close()
        none = bench.open(child=2)
        assert await bench.hear(none) == []
        none.close()

    on_a_bench(go)


def test_what_is_no_frame_of_ours_ends_the_client_and_nothing_else() -> None:
    async def go(bench: Bench) -> None:
        bench.linked()
        await bench.say(ME)
        await bench.until(lambda: bench.link.sent)
        await asyncio.get_running_loop().sock_sendall(bench.task, b"\x00\x00\x00\x01\xc1")
        await bench.until(lambda: bench.link.sent[-1] == m.TaskClientClosed(ident(1)))
        heard = await bench.hear()
        assert isinstance(heard[-1], m.Refused)

    on_a_bench(go)


def test_a_frame_that_its_link_could_not_carry_ends_the_client() -> None:
    async def go(bench: Bench) -> None:
        bench.linked()
        await bench.say(ME, Said(bytes(TASK_CLIENT_FRAME_BYTES_MAX + 1)))
        await bench.until(lambda: bench.link.sent and bench.link.sent[-1] == m.TaskClientClosed(ident(1)))

    on_a_bench(go)


def test_one_that_says_much_is_not_read_while_the_link_is_full() -> None:
    async def go(bench: Bench) -> None:
        bench.linked()
        await bench.say(ME, Said(b"first"))
        await bench.until(lambda: len(bench.link.sent) == 2)
        bench.link.buffered_bytes = TASK_CLIENT_BUFFER_BYTES_MAX + 1
        await bench.say(Said(b"second"))
        await bench.until(lambda: len(bench.link.sent) == 3)
        await bench.say(Said(b"third"))
        await asyncio.sleep(0.03)  # a look at the link, and another
        assert len(bench.link.sent) == 3
        bench.link.buffered_bytes = 0
        await bench.until(lambda: len(bench.link.sent) == 4)

    on_a_bench(go)


def test_changes_of_one_turn_are_one_message() -> None:
    async def go(bench: Bench) -> None:
        bench.linked()
        for effect in (
            ReportSlot(ident(1), lent=True),
            ReportSlot(ident(2), lent=True),
            ReportSlot(ident(1), lent=False),
        ):
            bench.relays.report(effect)
        await bench.until(lambda: bench.link.sent)
        assert bench.link.sent == [m.SlotsChanged((ident(2),), (ident(1),))]

    on_a_bench(go)


def test_the_core_may_end_it() -> None:
    async def go(bench: Bench) -> None:
        bench.relays.refuse(ident(1), "too many")
        (refused,) = await bench.hear()
        assert refused == m.Refused("HerderError", "too many")
        assert bench.machine.state.attempts[ident(1)].start.job == JOB

    on_a_bench(go)
