"""A running task as a client, through its agent (decision 22): what travels on its private socket, and `Relayed`, which
stands below a `Link` where there is no connection of its own.

    task ── TaskHello, Said, WaitBegan, WaitEnded ──▶ agent ── TaskClientOpened, TaskClientSaid ──▶ coordinator
      ◀── Opened, Heard, SlotBack, Closed, Refused ──       ◀── TellTaskClient, DropTaskClient ──

Both ways are frames as everywhere (`frame.py`). The agent reads none of the bodies that it passes on: it bounds their
size, and says from which attempt they are. No certificate or key is on this way: who the client is follows from the
attempt that the agent vouches for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import msgspec

from herder_shared.errors import PayloadTooLarge, Unauthorized
from herder_shared.ids import Incarnation
from herder_shared.limits import FRAME_BYTES_MAX, TASK_CLIENT_FRAME_BYTES_MAX
from herder_shared.wire.connection import Connection, Link
from herder_shared.wire.frame import decode_body
from herder_shared.wire.messages import (
    ClientToCoordinator,
    CoordinatorToClient,
    Hello,
    Message,
    Refused,
    TaskOptions,
    Welcome,
    WorkloadSpec,
)
from herder_shared.wire.session import ADMIN_VERBS, Peer

#: A frame on the private socket: one that the agent passes on, and what is around it.
RELAY_FRAME_BYTES_MAX = FRAME_BYTES_MAX


class _Local(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pass


# --- from the task ---------------------------------------------------------------------------------------------------


class TaskHello(_Local, frozen=True):
    """First message, and again after `Closed` or a `Refused` that is worth another try."""

    incarnation: Incarnation
    protocol: int
    version: str = ""
    python: str = ""


class Said(_Local, frozen=True):
    """For the coordinator."""

    body: bytes


class WaitBegan(_Local, frozen=True):
    """The task waits for tasks of its own: its cores are free for others."""


class WaitEnded(_Local, frozen=True):
    """It wants its cores back, and waits for the `SlotBack` of the same number."""

    n: int


# --- to the task -----------------------------------------------------------------------------------------------------


class Opened(_Local, frozen=True):
    """There is a link; what the task is like, which is how its own tasks start too unless they say otherwise."""

    welcome: Welcome
    workload: WorkloadSpec
    options: TaskOptions


class Heard(_Local, frozen=True):
    """From the coordinator."""

    body: bytes


class SlotBack(_Local, frozen=True):
    """It may go on, on these CPUs (empty: any)."""

    n: int
    cpus: tuple[int, ...] = ()


class Closed(_Local, frozen=True):
    """The agent has lost the coordinator; an `Opened` follows when it is back."""


FromTask = TaskHello | Said | WaitBegan | WaitEnded
ToTask = Opened | Heard | SlotBack | Closed | Refused

from_task: msgspec.msgpack.Decoder[FromTask] = msgspec.msgpack.Decoder(FromTask)
to_task: msgspec.msgpack.Decoder[ToTask] = msgspec.msgpack.Decoder(ToTask)

_encode = msgspec.msgpack.Encoder().encode
_from_client: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ClientToCoordinator)
_to_client: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(CoordinatorToClient)


def read_from_client(body: bytes) -> Message:
    """What a task's client said.

    Raises:
        RemoteProtocolError: it is no message of a client.
        Unauthorized: only an admin may say it.
    """
    message = cast("Message", decode_body(_from_client, body))
    if type(message) in ADMIN_VERBS:
        raise Unauthorized(f"a task's own client may not say {type(message).__name__}: that is for an admin")
    return message


def read_to_client(body: bytes) -> Message:
    """What the coordinator says to a task's client.

    Raises:
        RemoteProtocolError: it is no message to a client.
    """
    return cast("Message", decode_body(_to_client, body))


class Relayed:
    """Stands below a `Link` in place of a `Connection`: what is sent goes into a carrier, one body at a time.

    `carry(body)` takes what is sent, `flushed()` is told when that was all for now, `over(reason, refused)` when our
    side ends the link: with a word to the peer, or without.
    """

    def __init__(
        self,
        *,
        carry: Callable[[bytes], None],
        flushed: Callable[[], None],
        over: Callable[[str, Refused | None], None],
        waiting_bytes: Callable[[], int],
    ) -> None:
        self.is_ended = False
        self._carry = carry
        self._flushed = flushed
        self._over = over
        self._waiting_bytes = waiting_bytes

    def link(self, peer: Peer, hello: Hello, welcome: Welcome) -> Link:
        """The link that stands on this."""
        return Link(cast("Connection", self), peer, hello, welcome)

    @property
    def buffered_bytes(self) -> int:
        """Of the carrier, which others use too."""
        return self._waiting_bytes()

    def send(self, message: Message) -> None:
        """As `Link.send`."""
        self.put(message)
        self.flush()

    def put(self, message: Message) -> None:
        """As `Link.put`."""
        if self.is_ended:
            return
        if isinstance(message, Refused):
            self.is_ended = True
            self._over(message.message, message)
            return
        body = _encode(message)
        if len(body) > TASK_CLIENT_FRAME_BYTES_MAX:
            raise PayloadTooLarge(
                f"a {type(message).__name__} takes {len(body)} bytes, above the {TASK_CLIENT_FRAME_BYTES_MAX} of one "
                "frame of a task's own client"
            )
        self._carry(body)

    def flush(self) -> None:
        """As `Link.flush`."""
        if not self.is_ended:
            self._flushed()

    def flush_later(self) -> None:
        """As `Link.flush_later`: here at once, as the carrier has its own ways."""
        self.flush()

    def pause_reading(self) -> None:
        """The carrier is for all: what one client may have under way bounds it."""

    def resume_reading(self) -> None:
        """As `pause_reading`."""

    def close(self, reason: str = "") -> None:
        """As `Link.close`."""
        if not self.is_ended:
            self.is_ended = True
            self._over(reason, None)

    def lose(self) -> None:
        """The carrier, or the peer, is gone: nothing more is sent."""
        self.is_ended = True
