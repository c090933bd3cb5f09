"""The environment of each workload's processes: made once, by its prologue if it has one."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from herder_agent.launch.prologue import Prologue
from herder_agent.runtime.host import template_environment
from herder_agent.runtime.reap import Reaper
from herder_shared.ids import NodeName, WorkloadKey
from herder_shared.wire.messages import WorkloadSpec

if TYPE_CHECKING:
    from herder_agent.runtime.loop import Place

#: Environments that are kept; one is a few KiB.
_KEPT_MAX = 1_000

_Done = Callable[[dict[str, str]], None]
_Failed = Callable[[str], None]


def marker(place: Place, node: NodeName) -> str:
    """What every process of this agent, in any of its lives, has in its environment."""
    folder = hashlib.blake2b(str(place.state_dir.resolve()).encode(), digest_size=8).hexdigest()
    return f"HERDER_AGENT={place.cluster}/{node}/{folder}"


class Environments:
    """Gives each workload its environment."""

    def __init__(self, loop: asyncio.AbstractEventLoop, place: Place, node: NodeName, reaper: Reaper) -> None:
        self._loop = loop
        self._place = place
        self._reaper = reaper
        name, _, value = marker(place, node).partition("=")
        self._marks = {"HERDER_CLUSTER": str(place.cluster), name: value}
        self._kept: dict[WorkloadKey, dict[str, str]] = {}
        self._waiting: dict[WorkloadKey, list[tuple[_Done, _Failed]]] = {}
        self._running: dict[WorkloadKey, Prologue] = {}

    def get(self, spec: WorkloadSpec | None, done: _Done, failed: _Failed) -> None:
        """Call `done` with the environment: at once, or when the prologue has run; `failed` when it does not."""
        base = template_environment(self._place.environ, spec, self._marks)
        if spec is None or spec.prologue is None:
            done(base)
            return
        kept = self._kept.get(spec.key)
        if kept is not None:
            done(dict(kept))
            return
        waiting = self._waiting.setdefault(spec.key, [])
        waiting.append((done, failed))
        if len(waiting) > 1:
            return
        key = spec.key

        def ran(environment: dict[str, str]) -> None:
            self._over(key)
            if len(self._kept) >= _KEPT_MAX:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = {**environment, **spec.env, **self._marks}
            for each, _ in self._waiting.pop(key, []):
                each(dict(self._kept[key]))

        def broke(message: str) -> None:
            self._over(key)
            for _, each in self._waiting.pop(key, []):
                each(message)

        try:
            prologue = Prologue(self._loop, spec.prologue, base, self._place.state_dir, ran, broke)
        except OSError as error:
            broke(f"the workload's prologue cannot be run: {error}")
            return
        self._running[key] = prologue
        self._reaper.known.add(prologue.pid)

    def close(self) -> None:
        """End prologues that run."""
        self._waiting.clear()
        for prologue in self._running.values():
            prologue.kill()

    def _over(self, key: WorkloadKey) -> None:
        prologue = self._running.pop(key, None)
        if prologue is not None:
            self._reaper.known.discard(prologue.pid)
