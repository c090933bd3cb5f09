"""How many interpreters are kept warm."""

from __future__ import annotations

import pytest

from herder_agent.core.demand import PER_CORE_MAX, Demand, reserve
from herder_agent.core.state import Pool, State, Workload, new_state
from herder_shared.ids import NodeName, WorkloadKey
from herder_shared.wire.messages import WorkloadSpec

GIB = 1 << 30


def _pool(gap_s: float, start_s: float, anon_bytes: int = 0, count: int = 32) -> tuple[State, Pool, float]:
    state = new_state(NodeName("n"), 4, 8 * GIB, 0.0)
    pool = Pool(Workload(WorkloadSpec(WorkloadKey("w"), start="fresh"), "fresh"), "fresh")
    now_s = 0.0
    for _ in range(count):
        now_s += gap_s
        pool.demand.note_arrival(now_s)
    pool.demand.note_warm(start_s, anon_bytes)
    return state, pool, now_s


@pytest.mark.parametrize(("gap_s", "start_s", "wanted"), [(10.0, 1.0, 1), (1.0, 1.0, 2), (0.5, 2.0, 6), (0.3, 1.2, 6)])
def test_as_many_as_are_asked_for_while_one_starts_and_a_margin(gap_s: float, start_s: float, wanted: int) -> None:
    state, pool, now_s = _pool(gap_s, start_s)
    assert reserve(state, pool, now_s) == wanted


def test_cores_and_memory_bound_it() -> None:
    state, pool, now_s = _pool(0.001, 5.0)
    assert reserve(state, pool, now_s) == 4 * PER_CORE_MAX
    state, pool, now_s = _pool(0.001, 5.0, anon_bytes=GIB // 2)
    assert reserve(state, pool, now_s) == 4
    state, pool, now_s = _pool(0.001, 5.0, anon_bytes=100 * GIB)
    assert reserve(state, pool, now_s) == 1


def test_demand_that_has_ceased_is_forgotten() -> None:
    state, pool, now_s = _pool(0.1, 2.0)
    assert reserve(state, pool, now_s) > 1
    assert reserve(state, pool, now_s + 5.0) == 1


def test_nothing_is_known_at_first() -> None:
    state, pool, now_s = _pool(0.1, 2.0, count=0)
    assert reserve(state, pool, now_s) == 1
    pool.demand = Demand()
    pool.demand.note_arrival(1.0)
    pool.demand.note_arrival(1.1)
    assert reserve(state, pool, 1.1) == 1
