"""The account: every second of every core once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herder_agent.core.account import Account
from herder_shared.states import CoreState

HELD = [CoreState.TASK, CoreState.START, CoreState.TRANSFER, CoreState.SYSTEM]


def test_idle_cores_are_told_apart_by_whether_work_waits() -> None:
    account = Account(4, 10.0)
    account.advance(11.0)
    account.move(1, None, CoreState.TASK)
    account.work_waiting = True
    account.advance(13.0)
    assert account.seconds[CoreState.IDLE] == 4.0
    assert account.seconds[CoreState.TASK] == 2.0
    assert account.seconds[CoreState.IDLE_WORK_WAITING] == 6.0


def test_time_that_does_not_pass_counts_nothing() -> None:
    account = Account(4, 10.0)
    account.advance(10.0)
    account.advance(9.0)
    assert sum(account.seconds.values()) == 0.0


@given(st.lists(st.tuples(st.floats(0, 100), st.sampled_from(HELD), st.booleans()), max_size=50))
def test_states_sum_to_cores_times_elapsed(moves: list[tuple[float, CoreState, bool]]) -> None:
    account = Account(3, 0.0)
    now_s = 0.0
    held: list[CoreState] = []
    for elapsed_s, state, waiting in moves:
        now_s += elapsed_s
        account.advance(now_s)
        account.work_waiting = waiting
        if len(held) < 3:
            account.move(1, None, state)
            held.append(state)
        else:
            account.move(1, held[0], state)
            held = [*held[1:], state]
    assert sum(account.seconds.values()) == pytest.approx(3 * now_s)
