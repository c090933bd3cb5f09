"""The core keeps its promises in every simulated history. `tools/simulate` runs many more."""

from __future__ import annotations

import pytest

from sim.run import simulate

BATCH = 25


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 300, BATCH))
def test_every_promise_holds_in_every_history(first: int) -> None:
    for seed in range(first, first + BATCH):
        try:
            simulate(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed} (tools/simulate --first {seed} --seeds 1): {error}") from error


# 20497: an agent that is back lists an attempt and its end; the end was recorded before the adoption.
@pytest.mark.parametrize("seed", [20497])
def test_seed_that_once_broke_a_promise_keeps_it(seed: int) -> None:
    simulate(seed)
