"""The shipped programs keep their promises in every simulated history. `tools/simulate` runs many more.

Half of the seeds are always the same, so that a change which breaks something is seen to; the other half are new each
time, so that every run of the tests looks where none has looked before.
"""

from __future__ import annotations

import random

import pytest

from sim.planted import BUGS, Bug, planted
from sim.run import simulate

BATCH = 25
FIXED = 250
FRESH = 250
#: Histories in which a planted bug must show, where the seed that showed it does not any more.
TRIES = 120


def run_seeds(first: int) -> None:
    for seed in range(first, first + BATCH):
        try:
            simulate(seed)
        except Exception as error:
            raise AssertionError(
                f"seed {seed} (tools/simulate --first {seed} --seeds 1): {type(error).__name__}: {error}"
            ) from error


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, FIXED, BATCH))
def test_every_promise_holds_in_every_history(first: int) -> None:
    run_seeds(first)


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(FRESH // BATCH))
def test_every_promise_holds_in_histories_that_nobody_has_seen(batch: int) -> None:
    run_seeds(random.SystemRandom().randrange(10**6, 10**9))


#: Seeds that found something in the product once. What they found has a test of its own where it is decided; here they
#: stay as histories like any other.
@pytest.mark.parametrize(
    "seed",
    [
        40,  # an end that was said twice was acknowledged twice, and its result unpinned twice
        703,  # a client whose acknowledgement got lost never took its last submission for settled, and hung at its end
        1862,  # a close overtook the submission that was to be said again with its blob; the job was given up
        1868,  # a client that reconnected as a job was opened attached to it first, and was told that there is none
        401094,  # a submission that depended on one which was to come again found that there was no such task
        2035,  # what came for a job that had been given up meanwhile was acknowledged, and waited for ever
        3080651,  # an acknowledged submission let go of a result that was still being fetched; its job was given up
        7001613,  # a job that was refused more tasks was not attached to again: those that it had taken never ended
        7046613,  # a blob was dropped for its last user while the next one, who had been promised it, was being heard
        7053570,  # a soft cancellation was answered twice, and the harder one of the same tasks taken for answered
        8011515,  # an agent that dialled a stopped coordinator once more was no node for the one that took over
        8089558,  # a coordinator that had stood still said that no node could run a task, and then heard of one
        9019263,  # three ends of one task in one inventory, of which a lost tail had known nothing, in another order
        1002548,  # a snapshot told of the verdict on a workload that no job had any more, and nobody knew which it was
    ],
)
def test_seed_that_once_broke_a_promise_keeps_it(seed: int) -> None:
    simulate(seed)


def test_the_same_seed_is_the_same_history() -> None:
    assert simulate(11) == simulate(11)


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(bug: Bug) -> None:
    with planted(bug):
        for seed in (bug.seed, *range(TRIES)):
            try:
                simulate(seed, bug.theme)
            except Exception:  # noqa: BLE001  whatever it broke, it is seen
                return
    pytest.fail(f"{bug.name}: {bug.text}; no history of {TRIES} shows it")
