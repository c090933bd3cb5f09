"""The launcher's own short talks with the coordinator, over the wire and with the profile's identity."""

from __future__ import annotations

import asyncio
import importlib.metadata
import uuid
from collections.abc import Callable

from herder_shared import tls
from herder_shared.config import PORT, Profile, parse_address
from herder_shared.errors import HerderError, Unreachable
from herder_shared.ids import Incarnation, NodeName
from herder_shared.limits import PROTOCOL_VERSION
from herder_shared.states import AgentState
from herder_shared.wire.messages import Answer, Hello, Message, Query, ShutDown
from herder_shared.wire.stream import Dialler, Link

#: Between two looks at the list of nodes, while they are awaited.
LOOK_AGAIN_S = 0.2

#: Agents that work, or would.
_IN = frozenset({AgentState.READY, AgentState.DRAINING})


def wait_nodes(profile: Profile, names: set[NodeName], timeout_s: float) -> set[NodeName]:
    """Those of `names` which the coordinator lists as connected, as soon as it lists all, at the latest after the time.

    Raises:
        HerderError: the coordinator cannot be reached from here, or refuses us.
    """
    seen: set[NodeName] = set()

    def is_complete(answer: Answer) -> bool:
        seen.clear()
        seen.update(node.facts.node for node in answer.nodes or () if node.state in _IN)
        return names <= seen

    _talk(profile, lambda n: Query(id=n, what="nodes"), is_complete, timeout_s)
    return names & seen


def shut_down(profile: Profile, timeout_s: float) -> None:
    """Have the coordinator end its agents and then itself.

    Raises:
        Unreachable: nobody answered in time; what runs must be ended otherwise.
        HerderError: it refuses us.
    """
    if not _talk(profile, ShutDown, lambda _: True, timeout_s):
        raise Unreachable("the coordinator did not answer")


def _talk(
    profile: Profile, message: Callable[[int], Message], is_done: Callable[[Answer], bool], timeout_s: float
) -> bool:
    return asyncio.run(_converse(profile, message, is_done, timeout_s))


class _Asker:
    """Asks on each new link, and again after each answer which does not settle it."""

    def __init__(self, message: Callable[[int], Message], is_done: Callable[[Answer], bool]) -> None:
        self._message = message
        self._is_done = is_done
        self._count = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.had_link = False

    def opened(self, link: Link) -> None:
        self.had_link = True
        self._ask(link)

    def received(self, link: Link, messages: list[Message]) -> None:
        for message in messages:
            if not isinstance(message, Answer) or self.done.done():
                continue
            if message.error:
                self.done.set_exception(HerderError(message.message))
            elif self._is_done(message):
                self.done.set_result(None)
            else:
                asyncio.get_running_loop().call_later(LOOK_AGAIN_S, self._ask, link)

    def closed(self, link: Link, error: HerderError | None) -> None:
        """The dialler connects again, and then it is asked again."""

    def _ask(self, link: Link) -> None:
        self._count += 1
        link.send(self._message(self._count))


async def _converse(
    profile: Profile, message: Callable[[int], Message], is_done: Callable[[Answer], bool], timeout_s: float
) -> bool:
    incarnation = Incarnation(uuid.uuid4().hex[:16])
    asker = _Asker(message, is_done)
    version = importlib.metadata.version("herder")
    last: list[HerderError] = []
    dialler = Dialler(
        addresses=[parse_address(address, PORT) for address in profile.addresses],
        context=tls.client_context(profile.identity),
        server_name=tls.server_name(profile.cluster),
        hello=lambda: Hello(PROTOCOL_VERSION, profile.cluster, incarnation, version=version, owner="herder up"),
        observer=asker,
        failing=lambda error, _: last.append(error),
    )
    running = asyncio.ensure_future(dialler.run())
    try:
        await asyncio.wait({running, asker.done}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()  # it only ends by saying why trying again cannot help
        if asker.done.done():
            asker.done.result()
            return True
        if not asker.had_link:
            raise last[-1] if last else Unreachable(f"no answer from {', '.join(profile.addresses)}")
        return False
    finally:
        await dialler.close()
        await asyncio.wait({running})
        asker.done.cancel()
