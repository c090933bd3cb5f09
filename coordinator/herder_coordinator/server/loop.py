"""The only owner of `State`: events of a turn → `step` → journal → effects.

Theory of operation. Whatever the connections bring during one turn of the event loop is collected, and one callback
at the end of the turn steps through all of it. The turn's records go to the journal as one batch, which the journal's
writer commits together with whatever else is queued (group commit). Effects marked `"now"` are carried out at the end
of the turn; those marked `"durable"` wait in `_held`, by batch and in order, until the writer's thread has said that
their batch and all before it are on disk. So an acknowledgement never overtakes what it acknowledges, and no task
pays for an fsync of its own. A submission waits a few milliseconds for the next batch (`_may_wait`): the end of a short
task is then in the same commit.

Nothing here awaits between reading the state and changing it, because nothing here awaits. Whoever wants to *read*
the state in order after what was raised before (`ask`) gets a callback at the end of the turn.

Fail-stop: a failed journal, or an exception of our own code, ends everything. What was held is dropped, no callback
is run any more, and `failed` is told once; the program then ends and the next life replays the journal."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from herder_coordinator.core.effects import (
    DropAgent,
    DropBlobs,
    Effect,
    Observe,
    Persist,
    SendToAgent,
    SendToClient,
    TurnOut,
)
from herder_coordinator.core.events import Event, Ticked
from herder_coordinator.core.records import AttemptsAssigned, EventsAcked, Record, TasksSubmitted
from herder_coordinator.core.state import State
from herder_coordinator.core.step import next_deadline_s, step
from herder_coordinator.journal.interface import Journal, JournalError
from herder_coordinator.server.coalesce import coalesce
from herder_shared.ids import BlobId, Incarnation, NodeName
from herder_shared.wire.messages import Message, SubmitOk

log = logging.getLogger(__name__)

#: The longest time between two ticks.
TICK_S = 0.5
#: The shortest: a deadline that has just passed must not make the loop spin.
TICK_S_MIN = 0.001
#: The most records that wait for the next batch, and how long an acknowledgement may wait with them.
LAZY_MAX = 1_000
LAZY_S = 0.005
#: What may wait: the client repeats a submission until it is acknowledged, and its acknowledgement of ends is a hint.
_LAZY_RECORDS = (TasksSubmitted, AttemptsAssigned, EventsAcked)
#: A held effect's batch that waits longer than this for the disk makes the coordinator not ready.
SYNC_HANGS_S = 30.0
#: ... longer than this is said by /healthz; longer than this, new submissions are asked to come again later.
SYNC_SLOW_S = 1.0
SYNC_PAUSES_S = 5.0

Question = Callable[[State, float], None]


class Outlets(Protocol):
    """Where effects go. Nothing here blocks."""

    def send_to_client(self, client: Incarnation, message: Message) -> None: ...

    def send_to_agent(self, node: NodeName, session: int, message: Message) -> None: ...

    def flush(self) -> None:
        """Everything was sent that is to be sent now: it leaves, in one write for each peer."""

    def drop_agent(self, node: NodeName, session: int, reason: str) -> None: ...

    def turn_out(self, serials: tuple[str, ...]) -> None: ...

    def drop_blobs(self, blobs: tuple[BlobId, ...]) -> None: ...

    def observe(self, observation: Observe) -> None: ...

    def observe_decision(self, seconds: float) -> None: ...

    def observe_commit(self, seconds: float) -> None: ...


class CoreLoop:
    """Steps the core. Everything but the journal's callbacks runs in the event loop's thread.

    `failed` is called at most once, with a JournalError or with whatever our own code raised.
    """

    def __init__(self, state: State, journal: Journal, outlets: Outlets, failed: Callable[[Exception], None]) -> None:
        self.state = state
        self._journal = journal
        self._outlets = outlets
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._events: list[Event] = []
        self._questions: list[Question] = []
        self._turn_is_due = False
        self._tick: asyncio.TimerHandle | None = None
        self._tick_s = 0.0
        self._is_stopped = False
        #: Batches given to the journal, and those it has on disk. Batch n's effects are in `_held` until `n <= _done`.
        self._appended = 0
        self._done = 0
        #: Records that wait for the next batch, `LAZY_S` or the next tick: see `_may_wait`.
        self._lazy: list[Record] = []
        self._lazy_timer: asyncio.TimerHandle | None = None
        self._held: deque[tuple[int, list[Effect]]] = deque()
        #: How many held orders there are to drop each blob.
        self._dropping: Counter[BlobId] = Counter()
        self._append_times_s: deque[tuple[int, float]] = deque()
        #: Written by the journal's thread, emptied in the loop's.
        self._commits: deque[tuple[int, float]] = deque()
        self._commits_wake = False
        self._idle_waiters: list[asyncio.Future[None]] = []
        journal.on_failure(self._journal_failed)

    # --- what the connections call -----------------------------------------------------------------------------------

    def raise_event(self, event: Event) -> None:
        """Queue an event for the end of this turn. Silently dropped once the loop has stopped."""
        self._events.append(event)
        self._schedule()

    def ask(self, question: Question) -> None:
        """Call `question(state, now_s)` after all events raised so far have been stepped. It must not change the
        state."""
        self._questions.append(question)
        self._schedule()

    def now_s(self) -> float:
        """The clock that the core sees."""
        return self._loop.time()

    def start(self, effects: list[Effect]) -> None:
        """Carry out what the end of the replay asks for, and begin to tick."""
        self._conclude(effects)
        self._set_tick()

    def sync_age_s(self) -> float:
        """For how long the oldest batch under way has been waiting for the disk."""
        return self.now_s() - self._append_times_s[0][1] if self._append_times_s else 0.0

    async def wait_durable(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or held. False when that took longer, or the loop has failed."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._is_stopped and (self._turn_is_due or self._append_times_s or self._lazy):
                    self._append_lazy()
                    waiter = self._loop.create_future()
                    self._idle_waiters.append(waiter)
                    await waiter
        except TimeoutError:
            return False
        return not self._is_stopped

    def stop(self) -> None:
        """Step nothing more and release nothing more. Idempotent."""
        self._is_stopped = True
        self._events.clear()
        self._questions.clear()
        self._held.clear()
        for timer in (self._tick, self._lazy_timer):
            if timer is not None:
                timer.cancel()
        self._wake_idle_waiters()

    # --- a turn ------------------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        if not self._turn_is_due and not self._is_stopped:
            self._turn_is_due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._turn_is_due = False
        if self._is_stopped:
            return
        try:
            self._step_events()
            questions, self._questions = self._questions, []
            now_s = self.now_s()
            for question in questions:
                question(self.state, now_s)
            self._set_tick()
        except Exception as error:  # noqa: BLE001  the top of the loop: a bug of ours, or a journal that refuses
            self._fail(error)
        if not self._append_times_s:
            self._wake_idle_waiters()

    def _step_events(self) -> None:
        events, self._events = self._events, []
        if not events:
            return
        now_s = self.now_s()
        effects: list[Effect] = []
        start_s = time.perf_counter()
        for event in events:
            effects += step(self.state, event, now_s)
        self._outlets.observe_decision(time.perf_counter() - start_s)
        self._conclude(effects)

    def _conclude(self, effects: list[Effect]) -> None:
        """Give the records to the journal, carry out what may be, hold the rest."""
        records: list[Record] = []
        now: list[Effect] = []
        durable: list[Effect] = []
        for effect in effects:
            if type(effect) is Persist:
                records.append(effect.record)
            elif getattr(effect, "after", "now") == "durable":
                durable.append(effect)
                if type(effect) is DropBlobs:
                    self._dropping.update(effect.blobs)
            else:
                now.append(effect)
        self._carry_out(now)
        # Last, so that the journal's thread wakes up when this one has nothing more to do, and not to fight for it.
        if (records or self._lazy) and len(self._lazy) < LAZY_MAX and _may_wait(records, durable):
            self._lazy += records
            if durable:
                self._held.append((self._appended + 1, durable))
                if self._lazy_timer is None:
                    self._lazy_timer = self._loop.call_later(LAZY_S, self._lazy_due)
            return
        if records or durable:
            self._append(records)
        if durable:
            if self._done == self._appended:
                self._carry_out(durable)
            else:
                self._held.append((self._appended, durable))

    def _lazy_due(self) -> None:
        self._lazy_timer = None
        self._append_lazy()

    def _append_lazy(self) -> None:
        if self._lazy and not self._is_stopped:
            self._append([])

    def _append(self, records: list[Record]) -> None:
        """To the journal, behind what nobody waits for."""
        if self._lazy:
            records, self._lazy = self._lazy + records, []
        if not records:
            return
        self._appended += 1
        batch = self._appended
        self._append_times_s.append((batch, self.now_s()))
        self._journal.append(records, lambda seconds: self._committed(batch, seconds))

    def _carry_out(self, effects: list[Effect]) -> None:
        if not effects:
            return
        to_clients: dict[Incarnation, list[Message]] = {}
        to_agents: dict[tuple[NodeName, int], list[Message]] = {}
        outlets = self._outlets
        for effect in effects:
            match effect:
                case SendToClient():
                    to_clients.setdefault(effect.client, []).append(effect.message)
                case SendToAgent():
                    to_agents.setdefault((effect.node, effect.session), []).append(effect.message)
                case Observe():
                    outlets.observe(effect)
                case DropAgent():
                    outlets.drop_agent(effect.node, effect.session, effect.reason)
                case TurnOut():
                    outlets.turn_out(effect.serials)
                case DropBlobs():
                    outlets.drop_blobs(self._droppable(effect.blobs))
                case Persist():
                    raise AssertionError("a record is appended, not carried out")
        for client, messages in to_clients.items():
            for message in coalesce(messages):
                outlets.send_to_client(client, message)
        for (node, session), messages in to_agents.items():
            for message in coalesce(messages):
                outlets.send_to_agent(node, session, message)
        if to_clients or to_agents:
            outlets.flush()

    def _droppable(self, blobs: tuple[BlobId, ...]) -> tuple[BlobId, ...]:
        """Those whose last order this is: if a task used the blob again in between and ended, the disk may not know of
        that end yet, and the order which follows from it is still held."""
        self._dropping.subtract(blobs)
        last = tuple(blob for blob in blobs if self._dropping[blob] <= 0)
        for blob in last:
            del self._dropping[blob]
        return last

    # --- time --------------------------------------------------------------------------------------------------------

    def _ticked(self) -> None:
        self._tick = None
        self._append_lazy()
        self.raise_event(Ticked())

    def _set_tick(self) -> None:
        """Have `Ticked` at the next deadline. That it became later is noticed when the tick comes."""
        if self._is_stopped:
            return
        now_s = self.now_s()
        deadline_s = next_deadline_s(self.state)
        due_s = now_s + TICK_S if deadline_s is None else min(now_s + TICK_S, max(deadline_s, now_s + TICK_S_MIN))
        if self._tick is None:
            self._tick_s = due_s
            self._tick = self._loop.call_at(due_s, self._ticked)
        elif due_s < self._tick_s - TICK_S_MIN:
            self._tick.cancel()
            self._tick_s = due_s
            self._tick = self._loop.call_at(due_s, self._ticked)

    # --- the journal's answers ---------------------------------------------------------------------------------------

    def _committed(self, batch: int, seconds: float) -> None:
        """In the journal's thread. One wake-up of the loop serves all batches of a group commit."""
        self._commits.append((batch, seconds))
        if not self._commits_wake:
            self._commits_wake = True
            self._call_loop(self._release)

    def _journal_failed(self, error: JournalError) -> None:
        """In the journal's thread."""
        self._call_loop(self._fail, error)

    def _call_loop(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            log.warning("the journal answered after the event loop had ended")

    def _release(self) -> None:
        self._commits_wake = False  # first: a batch that comes from here on wakes us again
        if self._is_stopped:
            return
        released: list[Effect] = []
        try:
            while self._commits:
                batch, seconds = self._commits.popleft()
                self._done = max(self._done, batch)
                self._outlets.observe_commit(seconds)
            while self._append_times_s and self._append_times_s[0][0] <= self._done:
                self._append_times_s.popleft()
            while self._held and self._held[0][0] <= self._done:
                released += self._held.popleft()[1]
            self._carry_out(released)
        except Exception as error:  # noqa: BLE001  the top of the loop, again
            self._fail(error)
        if not self._append_times_s:
            self._wake_idle_waiters()

    def _fail(self, error: Exception) -> None:
        if self._is_stopped:
            return
        self.stop()
        self._failed(error)

    def _wake_idle_waiters(self) -> None:
        waiters, self._idle_waiters = self._idle_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


def _may_wait(records: list[Record], durable: list[Effect]) -> bool:
    """Whether nobody waits for these records but a client's submission, which needs no answer soon: the end of a short
    task then comes before, and both are one commit."""
    return all(type(record) in _LAZY_RECORDS for record in records) and all(
        type(effect) is SendToClient and type(effect.message) is SubmitOk for effect in durable
    )
