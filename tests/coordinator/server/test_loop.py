"""The loop around the core: order of effects, batches, ticks, fail-stop. Real core; the test commits the journal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from coordinator.server.conftest import Run
from herder_coordinator.core import events
from herder_coordinator.core.effects import Observe
from herder_coordinator.core.records import Record
from herder_coordinator.core.state import new_state
from herder_coordinator.journal.interface import JournalError
from herder_coordinator.server import loop
from herder_coordinator.server.loop import TICK_S, CoreLoop
from herder_shared.ids import BlobId, Incarnation, JobId, NodeName
from herder_shared.wire import messages as m
from support.coordinators import FUNCTION, JOB, MemoryJournal, job_spec, tasks
from support.links import CLUSTER

CLIENT = Incarnation("c" * 16)


class Outlets:
    """Keeps what comes out."""

    def __init__(self) -> None:
        self.sent: list[m.Message] = []
        self.decisions = 0
        self.commits = 0

    def send_to_client(self, client: Incarnation, message: m.Message) -> None:
        assert client == CLIENT
        self.sent.append(message)

    def send_to_agent(self, node: NodeName, session: int, message: m.Message) -> None:
        raise AssertionError("there is no agent")

    def flush(self) -> None:
        pass

    def drop_agent(self, node: NodeName, session: int, reason: str) -> None:
        raise AssertionError("there is no agent")

    def turn_out(self, serials: tuple[str, ...]) -> None:
        raise AssertionError("there is nobody")

    def drop_blobs(self, blobs: tuple[BlobId, ...]) -> None:
        raise AssertionError("there is no blob")

    def observe(self, observation: Observe) -> None:
        pass

    def observe_decision(self, seconds: float) -> None:
        self.decisions += 1

    def observe_commit(self, seconds: float) -> None:
        self.commits += 1


class Lab:
    """A loop with one connected client."""

    def __init__(self) -> None:
        self.journal = MemoryJournal()
        self.outlets = Outlets()
        self.errors: list[Exception] = []
        self.core = CoreLoop(new_state(CLUSTER, 1), self.journal, self.outlets, self.errors.append)
        self.core.raise_event(events.ClientConnected(CLIENT, 1, "ann"))

    def open(self, job: JobId = JOB) -> None:
        self.core.raise_event(events.JobOpened(CLIENT, job_spec(job)))

    def submit(self, first: int, count: int) -> None:
        items = tasks(*[b"x"] * count)
        self.core.raise_event(events.TasksSubmitted(CLIENT, JOB, first, FUNCTION, items, ""))

    async def turned(self) -> None:
        """All that was raised so far has been stepped, and what was committed has been released."""
        asked = asyncio.Event()
        self.core.ask(lambda _state, _now_s: asked.set())
        await asked.wait()
        await asyncio.sleep(0)

    def upto(self) -> list[int]:
        return [one.upto for one in self.outlets.sent if isinstance(one, m.SubmitOk)]


def in_lab(run: Run, test: Callable[[Lab], asyncio.Future[None]] | Callable[..., object]) -> None:
    async def go() -> None:
        lab = Lab()
        await test(lab)  # type: ignore[misc]
        lab.core.stop()

    run(go())


def test_all_events_of_a_turn_are_one_batch(run: Run) -> None:
    async def test(lab: Lab) -> None:
        appended: list[int] = []
        append = lab.journal.append

        def counting(records: list[Record], durable: Callable[[float], None]) -> None:
            appended.append(len(records))
            append(records, durable)

        lab.journal.append = counting  # type: ignore[assignment, method-assign]
        lab.open()
        for first in range(0, 50, 5):
            lab.submit(first, 5)
        await lab.turned()
        assert len(appended) == 1
        assert appended[0] >= 11
        assert lab.outlets.decisions == 1
        assert lab.upto()[-1] == 50

    in_lab(run, test)


def test_acknowledgements_wait_for_their_batch_and_keep_their_order(run: Run) -> None:
    async def test(lab: Lab) -> None:
        lab.journal.hold = True
        lab.open()
        lab.submit(0, 1)
        await lab.turned()
        lab.submit(1, 2)
        await lab.turned()
        assert lab.upto() == []
        assert not await lab.core.wait_durable(0.02)
        assert lab.core.sync_age_s() > 0
        lab.journal.commit()
        await lab.turned()
        assert lab.upto() == sorted(lab.upto())
        assert lab.upto()[-1] == 3
        assert lab.outlets.commits == 2
        assert lab.core.sync_age_s() == 0

    in_lab(run, test)


def test_a_submission_is_written_with_the_next_batch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LAZY_S", 60.0)

    async def test(lab: Lab) -> None:
        lab.open()
        lab.submit(0, 1)
        await lab.turned()
        commits = lab.outlets.commits
        lab.submit(1, 1)
        await lab.turned()
        assert (lab.outlets.commits, lab.upto()[-1]) == (commits, 1)
        lab.open(JobId("fedcba9876543210"))
        await lab.turned()
        assert (lab.outlets.commits, lab.upto()[-2:]) == (commits + 1, [2, 0])

    in_lab(run, test)


def test_a_submission_that_no_batch_follows_is_written_soon(run: Run) -> None:
    async def test(lab: Lab) -> None:
        lab.open()
        await lab.turned()
        lab.submit(0, 1)
        async with asyncio.timeout(30):
            while lab.upto()[-1] != 1:  # noqa: ASYNC110  nothing tells us
                await asyncio.sleep(loop.LAZY_S)

    in_lab(run, test)


def test_what_needs_no_record_still_waits_for_those_before_it(run: Run) -> None:
    async def test(lab: Lab) -> None:
        lab.open()
        await lab.turned()
        lab.journal.hold = True
        lab.submit(0, 1)
        await lab.turned()
        sent = len(lab.upto())
        lab.submit(0, 1)  # a repetition: nothing to record, and yet not durable
        await lab.turned()
        assert len(lab.upto()) == sent
        lab.journal.commit()
        await lab.turned()
        assert lab.upto()[-1] == 1

    in_lab(run, test)


def test_a_question_sees_what_was_raised_before_it(run: Run) -> None:
    async def test(lab: Lab) -> None:
        seen: list[int] = []
        lab.open()
        lab.core.ask(lambda state, _now_s: seen.append(len(state.jobs)))
        await lab.turned()
        assert seen == [1]

    in_lab(run, test)


def test_nothing_is_released_after_the_journal_failed(run: Run) -> None:
    async def test(lab: Lab) -> None:
        lab.journal.hold = True
        lab.open()
        await lab.turned()
        lab.journal.fail(JournalError("gone"))
        lab.journal.fail(JournalError("gone again"))
        await asyncio.sleep(0)
        lab.journal.commit()
        await asyncio.sleep(0)
        assert [str(error) for error in lab.errors] == ["gone"]
        assert lab.outlets.sent == []
        assert not await lab.core.wait_durable(1.0)

    in_lab(run, test)


def test_a_bug_in_a_step_is_fail_stop_too(run: Run) -> None:
    async def test(lab: Lab) -> None:
        lab.core.raise_event("not an event")  # type: ignore[arg-type]
        lab.open()
        await asyncio.sleep(0.01)
        assert len(lab.errors) == 1
        assert lab.journal.records == []

    in_lab(run, test)


def test_waiting_for_what_is_queued_ends_when_it_is_durable(run: Run) -> None:
    async def test(lab: Lab) -> None:
        assert await lab.core.wait_durable(1.0)
        lab.journal.hold = True
        lab.open()
        asyncio.get_running_loop().call_later(0.02, lab.journal.commit)
        assert await lab.core.wait_durable(5.0)
        assert lab.upto() == [0]
        lab.submit(0, 1)
        assert not await lab.core.wait_durable(0.02)
        lab.journal.commit()

    in_lab(run, test)


def test_it_ticks_without_being_asked(run: Run) -> None:
    async def test(lab: Lab) -> None:
        lab.core.start([])
        await lab.turned()
        decisions = lab.outlets.decisions
        async with asyncio.timeout(5 * TICK_S):
            while lab.outlets.decisions < decisions + 2:
                await lab.turned()
                await asyncio.sleep(TICK_S / 4)

    in_lab(run, test)
