"""The limits and accounts of attempts: by a control group where there are any and a limit was asked for, else by the
watcher.

An attempt without a limit has no group: entering one costs a task of two milliseconds 0.15 ms while groups are entered
all the time, and up to 14 ms after a pause (docs/decisions/0012-limits.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from herder_agent.core import events
from herder_agent.core.events import Answer, Exit
from herder_agent.core.state import PIDS
from herder_agent.launch.child import Child
from herder_agent.runtime.cgroups import Group, Groups
from herder_agent.runtime.host import is_memory_low
from herder_agent.runtime.memory import MemoryWatch

#: `ru_inblock` and `ru_oublock` count in these, whatever the device has.
BLOCK_BYTES = 512


class Limits:
    """Owns the groups and who is in which."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, groups: Groups, dispatch: Callable[[events.Event], None]
    ) -> None:
        self.groups = groups
        self._watch = MemoryWatch(loop, lambda number, size, tasks: dispatch(events.MemorySeen(number, size, tasks)))
        #: Of attempts whose workload does not say.
        self.pids = PIDS
        #: By child, those that it was sent into; the last is its task's.
        self._entered: dict[int, list[Group]] = {}

    def enter(self, number: int, memory_bytes: int, pids: int) -> tuple[str, ...]:
        """Where this child's next process or task must write "0" before it runs; nowhere, where it has no limit."""
        entered = self._entered.get(number)
        if entered is None and not memory_bytes and not pids:
            return ()
        group = self.groups.take(memory_bytes, pids or self.pids)
        if group is None:
            return ()
        if entered is None:
            entered = self._entered[number] = []
        # It has left its groups of earlier tasks; what these tasks left running is there until it ends.
        for earlier in entered[:-1]:
            if not earlier.processes():
                entered.remove(earlier)
                self.groups.give_back(earlier)
        entered.append(group)
        return group.entrances

    def begin(self, child: Child, *, is_limited: bool) -> None:
        """It runs a task now."""
        self._watch.add(child, is_limited=is_limited, group=self._group(child.number))

    def end(self, number: int) -> None:
        """Its task has answered."""
        self._watch.remove(number)

    def answered(self, number: int, answer: Answer) -> Answer:
        """The answer, with what its group knows of it."""
        group = self._group(number)
        if group is None:
            return answer
        account = group.account()
        has_memory = group.holds_memory and group.has_peak
        return Answer(
            answer.result,
            answer.failure,
            answer.wall_s,
            account.user_s if account.has_use else answer.user_s,
            account.system_s if account.has_use else answer.system_s,
            answer.minor_faults,
            answer.major_faults,
            account.peak_bytes if has_memory else answer.peak_bytes,
            max(answer.read_bytes, account.read_bytes),
            max(answer.write_bytes, account.write_bytes),
            "cgroup" if group.holds_memory else "",
            account.oom_kills > 0,
        )

    def exited(self, number: int, exit_: Exit, was_killed: bool) -> Exit:
        """The exit, with what its groups know of it; these are empty soon."""
        group = self._group(number)
        if group is None or not self._watch.is_watched(number):
            if was_killed and self._watch.oom_since(number):
                exit_ = msgspec.structs.replace(exit_, oom_seen=True, memory_is_low=is_memory_low())
            self.leave(number)
            return exit_
        account = group.account()
        self._watch.expect_kills(account.oom_kills)
        oom_seen = was_killed and not account.oom_kills and self._watch.oom_since(number)
        done = Exit(
            exit_.status,
            account.user_s if account.has_use else exit_.user_s,
            account.system_s if account.has_use else exit_.system_s,
            exit_.minor_faults,
            exit_.major_faults,
            oom_seen,
            account.peak_bytes,
            max(exit_.read_bytes, account.read_bytes),
            max(exit_.write_bytes, account.write_bytes),
            "cgroup" if group.holds_memory else "",
            account.oom_kills > 0,
            oom_seen and is_memory_low(),
        )
        self.leave(number)
        return done

    def leave(self, number: int) -> None:
        """The child is gone, or will not come."""
        self._watch.remove(number)
        for group in self._entered.pop(number, ()):
            self.groups.give_back(group)

    def kill(self, number: int) -> None:
        """SIGKILL to all that its task has."""
        group = self._group(number)
        if group is not None:
            group.kill()

    def close(self) -> None:
        """Let go of all."""
        self._watch.close()
        for number in list(self._entered):
            self.leave(number)
        self.groups.close()

    def _group(self, number: int) -> Group | None:
        entered = self._entered.get(number)
        return entered[-1] if entered else None
