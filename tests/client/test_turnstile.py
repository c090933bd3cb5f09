"""Where a task stands while it waits: when it says so, and when it may go on."""

from __future__ import annotations

import threading
from concurrent.futures import Future, as_completed, wait

import pytest

from herder.turnstile import Patience, Turnstile, Waiters

WAIT_S = 10.0


class Agent:
    """Keeps what it is told, and answers when the test says so."""

    def __init__(self) -> None:
        self.told: list[str | int] = []
        self.moves: list[tuple[int, ...]] = []
        self.asked = threading.Semaphore(0)
        self.waits = threading.Semaphore(0)
        self.turnstile = Turnstile(self.began, self.ended, self.moves.append)

    def began(self) -> None:
        self.told.append("waits")
        self.waits.release()

    def ended(self, n: int) -> None:
        self.told.append(n)
        self.asked.release()

    def going_on(self) -> threading.Thread:
        """A thread that ends its wait."""
        thread = threading.Thread(target=self.turnstile.end)
        thread.start()
        return thread


def joined(thread: threading.Thread) -> bool:
    thread.join(WAIT_S)
    return not thread.is_alive()


def test_it_goes_on_when_its_cores_are_back() -> None:
    agent = Agent()
    agent.turnstile.begin()
    thread = agent.going_on()
    assert agent.asked.acquire(timeout=WAIT_S)
    assert thread.is_alive()
    agent.turnstile.slot_back(1, (3, 4))
    assert joined(thread)
    assert (agent.told, agent.moves) == (["waits", 1], [(3, 4)])


def test_while_others_wait_one_goes_on_at_once() -> None:
    agent = Agent()
    agent.turnstile.begin()
    agent.turnstile.begin()
    agent.turnstile.end()
    assert agent.told == ["waits"]


def test_who_wants_to_go_on_does_so_when_another_begins_to_wait() -> None:
    agent = Agent()
    agent.turnstile.begin()
    thread = agent.going_on()
    assert agent.asked.acquire(timeout=WAIT_S)
    agent.turnstile.begin()
    assert joined(thread)
    agent.turnstile.slot_back(1, ())  # it crossed with the new wait: the agent has the cores again by now
    second = agent.going_on()
    assert agent.asked.acquire(timeout=WAIT_S)
    agent.turnstile.slot_back(1, ())
    assert second.is_alive()
    agent.turnstile.slot_back(2, ())
    assert joined(second)
    assert agent.told == ["waits", 1, "waits", 2]


def test_nobody_stands_there_when_the_agent_is_gone() -> None:
    agent = Agent()
    agent.turnstile.begin()
    thread = agent.going_on()
    assert agent.asked.acquire(timeout=WAIT_S)
    agent.turnstile.close()
    assert joined(thread)
    agent.turnstile.begin()
    agent.turnstile.end()
    assert agent.told == ["waits", 1]


def test_a_wait_that_need_not_be_is_none() -> None:
    agent = Agent()
    with Patience(agent.turnstile):
        pass
    with Patience(None) as patience:
        patience.begin()
    assert agent.told == []


def patient_futures(agent: Agent) -> list[Future[int]]:
    futures: list[Future[int]] = [Future(), Future()]
    for future in futures:
        future._waiters = Waiters(agent.turnstile)
    return futures


@pytest.mark.parametrize("by", ["wait", "as_completed"])
def test_the_standard_librarys_waits_are_patient(by: str) -> None:
    agent = Agent()
    futures = patient_futures(agent)

    def answer() -> None:
        assert agent.waits.acquire(timeout=WAIT_S)
        for n, future in enumerate(futures, start=1):
            future.set_result(n)
        assert agent.asked.acquire(timeout=WAIT_S)
        agent.turnstile.slot_back(1, ())

    thread = threading.Thread(target=answer)
    thread.start()
    done = wait(futures).done if by == "wait" else set(as_completed(futures))
    assert done == set(futures)
    assert joined(thread)
    assert agent.told == ["waits", 1]
