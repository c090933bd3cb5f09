"""Who has had how much: the account by which owners, and the jobs of an owner, take their part of the cores.

What a contender *uses* is the cores that it holds now plus the cores that it held lately, on average: an exponential
mean over the past, of which half counts after each half-life. Whoever uses least for his weight is next. So equal
owners with work for the whole cluster hold equal parts of it, whoever came first and however long each task takes;
one who comes back after a pause gets more than his part at first, and smoothly no more than his part later; and what
anyone did a day ago is forgotten.

The mean is exact and needs no estimate of how long anything will take: while the cores held do not change it moves
towards them by a known law, so it is brought up to date only when they change or when somebody asks. Look-ahead
holds nothing yet; so that one contender does not take all of it, it counts as the cores that it will keep busy for
`LOOK_AHEAD_S`.

The mean outlives the coordinator: it is recorded now and then (`KEEP_EVERY_S`), as one record whatever happened
meanwhile, and in each snapshot. What is held needs no record: agents tell it when they are back. A new life goes on
with the mean as it was; how long nobody was there to count is not known, and takes nothing from anybody.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

from herder_coordinator.core.records import SharesKept
from herder_coordinator.core.state import UNITS, Share
from herder_shared.limits import LOOK_AHEAD_S

if TYPE_CHECKING:
    from herder_coordinator.core.state import Node, State, Task
    from herder_coordinator.core.turn import Turn

#: Owners whose account is kept although they have no job.
OWNERS_KEPT_MAX = 1_000
#: What a coordinator that dies may forget of the account: a tenth of the half-life, as configured by default.
KEEP_EVERY_S = 60.0
#: Jobs in such a record, those that held most; the mean in it is a multiple of this: a hundredth of a core.
JOBS_RECORDED_MAX = 1_000
GRAIN = UNITS // 100


def use(share: Share, state: State) -> float:
    """Cores that count as used, for the weight: the least goes first."""
    if share.at_s != state.now_s:
        _advance(share, state)
    return (share.held + share.mean + share.ahead) / share.weight


def _advance(share: Share, state: State) -> None:
    if share.mean != share.held:
        share.mean = mean_now(share, state)
        if abs(share.mean - share.held) < 1.0:  # a ten-thousandth of a core: forget it, so that idle ones are equal
            share.mean = float(share.held)
    share.at_s = state.now_s


def mean_now(share: Share, state: State) -> float:
    """The mean as of the latest step, in `UNITS`. Changes nothing."""
    kept = math.exp2((share.at_s - state.now_s) / state.policy.half_life_s)
    return share.held + (share.mean - share.held) * kept


def hold(state: State, task: Task, cores: int) -> None:
    """The task's attempt holds so many cores more (less, if negative) from now on, in `UNITS`."""
    job, now_s = task.job, state.now_s
    share = job.share
    if share.at_s != now_s:
        _advance(share, state)
    share.held += cores
    share = job.owner_share
    if share.at_s != now_s:
        _advance(share, state)
    share.held += cores


def lie_ahead(task: Task, node: Node, cost_s: float) -> None:
    """The task's attempt lies in the node's look-ahead, of which it is so many seconds (negative: no more)."""
    job = task.job
    cores = round(cost_s * node.cores / LOOK_AHEAD_S)
    job.share.ahead += cores
    job.owner_share.ahead += cores


def owner_of(state: State, owner: str) -> Share:
    """The owner's account, made where there is none."""
    share = state.owners.get(owner)
    if share is None:
        if len(state.owners) >= OWNERS_KEPT_MAX:
            _forget_idle(state)
        share = state.owners[owner] = Share(weight=weight_of(state, owner), at_s=state.now_s)
    return share


def weight_of(state: State, owner: str) -> float:
    """As configured for the owner, or for his name without the machine (`ann` of `ann@desk`); 1 for whoever is not."""
    weights = state.policy.weights
    weight = weights.get(owner, weights.get(owner.partition("@")[0], 1.0))
    return max(weight, 1 / UNITS)


def _forget_idle(state: State) -> None:
    busy = {job.owner for job in state.jobs.values()}
    for owner in [owner for owner in state.owners if owner not in busy][: OWNERS_KEPT_MAX // 10]:
        del state.owners[owner]


# --- over the coordinator's end --------------------------------------------------------------------------------------


def note(turn: Turn) -> None:
    """Record the account, if that was not done for a while and it has changed."""
    state = turn.state
    if state.now_s < state.shares_kept_s + KEEP_EVERY_S:
        return
    state.shares_kept_s = state.now_s
    record = kept(state)
    if record != (state.shares_kept or SharesKept((), ())):
        state.shares_kept = record
        turn.record(record)


def kept(state: State) -> SharesKept:
    """The account as of now. Changes nothing."""
    owners = [(name, _grains(share, state)) for name, share in state.owners.items() if share.held or share.mean]
    jobs = [(job.id, _grains(job.share, state)) for job in state.jobs.values() if job.share.held or job.share.mean]
    if len(jobs) > JOBS_RECORDED_MAX:
        jobs = heapq.nlargest(JOBS_RECORDED_MAX, jobs, key=lambda one: one[1])
    return SharesKept(tuple(one for one in owners if one[1]), tuple(one for one in jobs if one[1]))


def _grains(share: Share, state: State) -> int:
    return round(mean_now(share, state) / GRAIN) * GRAIN


def restore(state: State, record: SharesKept) -> None:
    """In a replay: the account as it was recorded."""
    state.shares_kept = record
    for share in [*state.owners.values(), *(job.share for job in state.jobs.values())]:
        share.mean = 0.0
    for owner, mean in record.owners:
        owner_of(state, owner).mean = float(mean)
    for job_id, mean in record.jobs:
        job = state.jobs.get(job_id)
        if job is not None:
            job.share.mean = float(mean)


def begin(state: State) -> None:
    """The replay is over: the means are as of now."""
    state.shares_kept_s = state.now_s
    for share in [*state.owners.values(), *(job.share for job in state.jobs.values())]:
        share.at_s = state.now_s
