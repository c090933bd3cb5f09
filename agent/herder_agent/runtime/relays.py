"""Running tasks as clients: passes on what they and the coordinator say to each other, and who waits.

Who holds what. A task that makes itself a client makes a socket pair and sends one end over its task socket: nothing
listens anywhere, no name or secret exists that another task could use, and ordinary tasks cost nothing. That end is
ours from then on; the task's end closes with its client, or with its process.

Nothing of what is passed on is read here but its length. A task that says more than the link can take is not read for a
while; one that does not read what it is told loses its client.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable

import msgspec

from herder_agent.core import events
from herder_agent.core.effects import ReportSlot, ResumeTask
from herder_agent.core.state import Attempt, State
from herder_shared.errors import HerderError, RemoteProtocolError
from herder_shared.ids import AttemptId
from herder_shared.limits import SEND_BUFFER_BYTES_MAX, TASK_CLIENT_BUFFER_BYTES_MAX, TASK_CLIENT_FRAME_BYTES_MAX
from herder_shared.wire.frame import FrameDecoder, decode_body, encode_frame
from herder_shared.wire.messages import (
    DropTaskClient,
    Refused,
    SlotsChanged,
    TaskClientClosed,
    TaskClientOpened,
    TaskClientSaid,
    TellTaskClient,
)
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
    from_task,
)
from herder_shared.wire.session import refusal
from herder_shared.wire.stream import Link

_log = logging.getLogger("herder.agent")

_READ_BYTES = 256 * 1024
#: A task that is not read, as the link is full, is looked at again after this.
_PAUSE_S = 0.01


class _Relay:
    """Our end of one task's private socket."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fd: int,
        attempt: Attempt,
        heard: Callable[[_Relay, list[memoryview]], None],
        ended: Callable[[_Relay, HerderError | None], None],
    ) -> None:
        self.attempt = attempt
        self.hello: TaskHello | None = None
        #: The coordinator was told of it over the present link.
        self.is_open = False
        self._loop = loop
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._fd = fd
        self._heard = heard
        self._ended = ended
        self._frames = FrameDecoder(RELAY_FRAME_BYTES_MAX)
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._is_closed = False
        self._pause: asyncio.TimerHandle | None = None
        loop.add_reader(fd, self._readable)

    def tell(self, message: msgspec.Struct) -> None:
        """Send soon; never blocks."""
        if self._is_closed:
            return
        view = memoryview(encode_frame(message))
        if not self._unsent:
            view = view[self._write(view) :]
            if not view or self._is_closed:
                return
            self._loop.add_writer(self._fd, self._writable)
        self._unsent.append(view)
        self._unsent_bytes += len(view)
        if self._unsent_bytes > SEND_BUFFER_BYTES_MAX:
            self._ended(self, RemoteProtocolError("it does not read what it is told"))

    def pause(self, is_full: Callable[[], bool]) -> None:
        """Take nothing more from it while the link is full."""
        if self._pause is None and not self._is_closed:
            self._loop.remove_reader(self._fd)
            self._pause = self._loop.call_later(_PAUSE_S, self._resume, is_full)

    def close(self) -> None:
        """Close our end. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._pause is not None:
            self._pause.cancel()
        else:
            self._loop.remove_reader(self._fd)
        if self._unsent:
            self._loop.remove_writer(self._fd)
        self._socket.close()

    def _resume(self, is_full: Callable[[], bool]) -> None:
        self._pause = None
        self._loop.add_reader(self._fd, self._readable)
        if is_full():
            self.pause(is_full)

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._ended(self, None)
            return
        try:
            self._heard(self, self._frames.feed(data))
        except HerderError as error:
            self._ended(self, error)

    def _writable(self) -> None:
        while self._unsent:
            view = self._unsent[0]
            sent = self._write(view)
            self._unsent_bytes -= sent
            if sent < len(view):
                self._unsent[0] = view[sent:]
                return
            self._unsent.popleft()
        self._loop.remove_writer(self._fd)

    def _write(self, view: memoryview) -> int:
        try:
            return self._socket.send(view)
        except BlockingIOError:
            return 0
        except OSError:  # it is gone: the reader hears of it
            return len(view)


class Relays:
    """The clients of all running tasks, by attempt."""

    def __init__(self, loop: asyncio.AbstractEventLoop, state: State, dispatch: Callable[[events.Event], None]) -> None:
        self._loop = loop
        self._state = state
        self._dispatch = dispatch
        self._relays: dict[AttemptId, _Relay] = {}
        self._link: Link | None = None
        #: Reports of this turn of the loop: the last word on each attempt.
        self._changed: dict[AttemptId, bool] = {}

    # What tasks do.

    def open(self, child: int, fd: int) -> None:
        """The task of this child makes itself a client; the descriptor is ours."""
        known = self._state.children.get(child)
        attempt = known.attempt if known is not None else None
        if attempt is None:
            socket.socket(fileno=fd).close()  # it has ended
            return
        relay = _Relay(self._loop, fd, attempt, self._heard, self._ended)
        if attempt.id in self._relays:
            text = "another process of this task is its client already: let that one submit, or make a herder.Client()"
            relay.tell(Refused("HerderError", text))
            relay.close()
            return
        self._relays[attempt.id] = relay

    def _heard(self, relay: _Relay, bodies: list[memoryview]) -> None:
        attempt = relay.attempt.id
        for body in bodies:
            match decode_body(from_task, body):
                case Said() as said:
                    self._pass_on(relay, said)
                case WaitBegan():
                    self._dispatch(events.WaitBegan(attempt))
                case WaitEnded() as wait:
                    self._dispatch(events.WaitEnded(attempt, wait.n))
                case TaskHello() as hello:
                    relay.hello = hello
                    if self._link is not None:
                        self._introduce(relay, self._link)

    def _pass_on(self, relay: _Relay, said: Said) -> None:
        if len(said.body) > TASK_CLIENT_FRAME_BYTES_MAX:
            raise RemoteProtocolError(f"a frame of {len(said.body)} bytes")
        link = self._link
        if link is None or not relay.is_open:
            return  # it says it again when it is told that it is back
        link.send(TaskClientSaid(relay.attempt.id, said.body))
        if link.buffered_bytes > TASK_CLIENT_BUFFER_BYTES_MAX:
            relay.pause(self._is_full)

    def _is_full(self) -> bool:
        return self._link is not None and self._link.buffered_bytes > TASK_CLIENT_BUFFER_BYTES_MAX

    def _ended(self, relay: _Relay, error: HerderError | None) -> None:
        """It has closed its end, or is not worth more words."""
        if error is not None:
            _log.warning("the client in attempt %s is ended: %s", relay.attempt.id, error)
            relay.tell(refusal(error))
        relay.close()
        if self._relays.get(relay.attempt.id) is not relay:
            return
        del self._relays[relay.attempt.id]
        if self._link is not None and relay.is_open:
            self._link.send(TaskClientClosed(relay.attempt.id))

    # What the coordinator does.

    def linked(self, link: Link) -> None:
        """There is a new link, and all that we have was said over it."""
        self._link = link
        for relay in self._relays.values():
            if relay.hello is not None:
                self._introduce(relay, link)

    def unlinked(self) -> None:
        """The link is gone."""
        self._link = None
        for relay in self._relays.values():
            relay.is_open = False
            relay.tell(Closed())

    def _introduce(self, relay: _Relay, link: Link) -> None:
        hello = relay.hello
        assert hello is not None
        relay.is_open = True
        link.send(TaskClientOpened(relay.attempt.id, hello.incarnation, hello.protocol, hello.version, hello.python))
        relay.tell(Opened(link.welcome, relay.attempt.workload.spec, relay.attempt.options))

    def told(self, message: TellTaskClient) -> None:
        """The coordinator says something to one of them."""
        relay = self._relays.get(message.attempt)
        if relay is not None:
            relay.tell(Heard(message.body))

    def dropped(self, message: DropTaskClient) -> None:
        """It says that one of them is no more."""
        relay = self._relays.get(message.attempt)
        if relay is not None:
            relay.is_open = False
            relay.tell(Refused(message.error, message.message))

    # What the core decides.

    def resume(self, effect: ResumeTask) -> None:
        """A task has its cores back."""
        relay = self._relays.get(effect.attempt)
        if relay is not None:
            relay.tell(SlotBack(effect.n, effect.cpus))

    def refuse(self, attempt: AttemptId, message: str) -> None:
        """A task's client ends."""
        relay = self._relays.get(attempt)
        if relay is not None:
            self._ended(relay, HerderError(message))

    def report(self, effect: ReportSlot) -> None:
        """Tell the coordinator who waits, with all that changes in this turn of the loop."""
        if not self._changed:
            self._loop.call_soon(self._flush)
        self._changed[effect.attempt] = effect.lent

    def _flush(self) -> None:
        changed, self._changed = self._changed, {}
        if self._link is not None:
            lent = tuple(attempt for attempt, is_lent in changed.items() if is_lent)
            back = tuple(attempt for attempt, is_lent in changed.items() if not is_lent)
            self._link.send(SlotsChanged(lent, back))

    def close(self) -> None:
        """Let go of all."""
        self._link = None
        for relay in self._relays.values():
            relay.close()
        self._relays.clear()
