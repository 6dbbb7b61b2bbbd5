"""Why each task still waits after a round: one reason, and the numbers behind it.

The reasons form a ladder of budgets that shrink from rung to rung:

    capacity ⊇ − consumed ⊇ − reserved ⊇ only what is unlocked ⊇ − granted in this round

The first rung that a task doesn't fit is its reason: the worst that holds, since what fails on a
high rung fails on all below. Words are made elsewhere; here are numbers only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.scheduling.compiled import compiled
from dpmoe_operator.scheduling.filling import left_after, pairs_that_fit, tasks_that_fit
from dpmoe_operator.scheduling.round import ABSENT, Floats, Ints, Round
from dpmoe_operator.scheduling.unlocking import (
    ByArrivals,
    ByTime,
    Unlocking,
    arrivals_missing,
    when_unlocked,
)

_PARTS = 1000
"""Parts in which a smaller demand is looked for; amounts times it must stay within 64 bits."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why one job waits.

    Attributes:
        task: The task's place in the round; of an elastic job, the point that comes closest.
        reason: The worst reason that holds.
        block: The binding block row: the one with the largest shortfall, relative to what is asked.
        order: The Rényi order α at which the task comes closest to fitting there.
        asked: Units that the task asks at that order.
        left: Units that the block has at that order on the rung that the task doesn't fit:
            its capacity, what is not consumed, what is neither consumed nor reserved, what of that
            is unlocked, or what the round left over. Less than `asked`, unless it is `kept`.
        rank: Its job's place in the policy's order, from 1.
        of: How many jobs the order has.
        fits_now: The largest part of its demand that would fit now, after this round's grants, on
            each of its blocks at some order: in (0, 1), in thousandths, rounded down. None if not
            even a thousandth would.
        unlock_at: If waiting for an unlock: when all its blocks that unlock by time will have
            released enough, on the clock of `ByTime.opened`. None if no such block is short.
        held: Whether it would fit what the round left over, which is kept for tasks that are worth
            more and fit once more is unlocked; `left` is what they leave over then.
        kept: Whether it would fit what the round left over and has a place in the plan, which jobs
            that are worth more may still take from it until all is unlocked, at `unlock_at`.
        arrivals: If waiting for an unlock: how many more tasks must ask for its blocks that unlock
            by arrivals. None if no such block is short.
    """

    task: int
    reason: Reason
    block: int
    order: float
    asked: int
    left: int
    rank: int
    of: int
    fits_now: float | None = None
    unlock_at: float | None = None
    arrivals: int | None = None
    held: bool = False
    kept: bool = False

    @property
    def lacks(self) -> float:
        """The part of what it asks that is missing; above 1 where less than 0 is left."""
        return (self.asked - self.left) / max(self.asked, 1)


def explain(
    round: Round,
    granted: Ints,
    ranking: Ints,
    unlocking: Sequence[Unlocking],
    planned: Ints | None = None,
) -> tuple[Explanation, ...]:
    """Explain every job that was not granted.

    Of an elastic job, the point that comes closest is explained: the one with the least bad reason,
    and of several the one that lacks least of what it asks.

    Args:
        round: The round, as it was before the grants.
        granted: int64[G], the tasks that got budget.
        ranking: int64[T], all tasks in the policy's order, best first.
        unlocking: For each block row, its rule.
        planned: int64[P], the tasks for which budget is kept, in a round that looks ahead.

    Returns:
        One explanation for each waiting job, by its task's place in the round.

    Raises:
        ValueError: `ranking` doesn't list every task once, or a block lacks its rule.
    """
    if not np.array_equal(np.sort(ranking), np.arange(round.tasks)):
        raise ValueError(f"ranking: must list each of {round.tasks} tasks once.")
    if len(unlocking) != round.blocks:
        raise ValueError(f"unlocking: {len(unlocking)} rules for {round.blocks} block rows.")
    place = np.empty(round.tasks, dtype=np.int64)
    place[ranking] = np.arange(round.tasks)
    _, first = np.unique(round.job_of_task[ranking], return_index=True)
    rank = np.empty(round.jobs, dtype=np.int64)
    rank[np.argsort(first)] = np.arange(1, round.jobs + 1)
    left = left_after(round, granted)
    parts = _parts_that_fit(round.indptr, round.indices, round.demand, left)
    waiting = np.ones(round.tasks, dtype=bool)
    waiting[round.siblings(granted)] = False
    in_plan = np.zeros(round.tasks, dtype=bool)
    if planned is not None:
        in_plan[planned] = True
    # By job: a later rung overwrites an earlier one.
    explanations: dict[int, Explanation] = {}
    for held, kept, reason, budget in _ladder(round, left, planned):
        blocked = waiting & (in_plan if kept else ~tasks_that_fit(round, budget))
        if held:
            blocked &= ~in_plan  # What is left beside the plan is not what its own tasks lack.
        waiting &= ~blocked
        tasks = np.flatnonzero(blocked)
        tasks = tasks[np.argsort(place[tasks], kind="stable")]
        when: _Unlocks = {}
        if kept:
            when = _all_unlocked(round, tasks, unlocking)
        elif reason is Reason.WAITING_FOR_UNLOCK:
            when = _unlocks(round, tasks, unlocking)
        bindings = _bindings(
            round.indptr, round.indices, round.demand, round.capacity, budget, tasks
        )
        for task, block, order in zip(tasks.tolist(), *bindings.tolist(), strict=True):
            unlock_at, arrivals = when.get(task, (None, None))
            job = int(round.job_of_task[task])
            known = explanations.get(job)
            explained = Explanation(
                task=task,
                reason=reason,
                block=block,
                order=float(round.orders[order]),
                asked=int(round.demand[task, order]),
                left=int(budget[block, order]),
                rank=int(rank[job]),
                of=round.jobs,
                fits_now=int(parts[task]) / _PARTS if parts[task] > 0 else None,
                unlock_at=unlock_at,
                arrivals=arrivals,
                held=held,
                kept=kept,
            )
            if (
                known is None
                or (known.reason, known.held, known.kept) != (reason, held, kept)
                or explained.lacks < known.lacks
            ):
                explanations[job] = explained
    return tuple(explanation for _, explanation in sorted(explanations.items()))


def _ladder(
    round: Round, left: Ints, planned: Ints | None
) -> Iterator[tuple[bool, bool, Reason, Ints]]:
    """The rungs, worst reason first: `held`, `kept`, the reason, and the budget.

    Whom the last but one doesn't hold back waits only if it has a place in the plan.
    """
    yield False, False, Reason.DEMAND_EXCEEDS_CAPACITY, round.capacity
    yield False, False, Reason.BLOCK_EXHAUSTED, round.capacity - round.consumed
    yield False, False, Reason.WAITING_FOR_REFUND, round.capacity - round.consumed - round.reserved
    yield False, False, Reason.WAITING_FOR_UNLOCK, round.available
    yield False, False, Reason.OUTRANKED, left
    if planned is not None:
        yield True, False, Reason.OUTRANKED, left_after(round.ahead, planned)
        yield False, True, Reason.WAITING_FOR_UNLOCK, left


_Unlocks = dict[int, tuple[float | None, int | None]]


def _unlocks(round: Round, tasks: Ints, unlocking: Sequence[Unlocking]) -> _Unlocks:
    """Of each task, when and after how many arrivals all its blocks will have released enough."""
    pairs = round.pairs_of(tasks)
    pairs = pairs[~pairs_that_fit(round, round.available)[pairs]]
    needed, capacity = _soonest(round, pairs)
    when: _Unlocks = {}
    for task, block, amount, total in zip(
        round.task_of_pair[pairs].tolist(),
        round.indices[pairs].tolist(),
        needed.tolist(),
        capacity.tolist(),
        strict=True,
    ):
        time, arrivals = when.get(task, (None, None))
        match unlocking[block]:
            case ByTime() as rule:
                opens = when_unlocked(rule, amount, total)
                time = opens if time is None else max(time, opens)
            case ByArrivals() as rule:
                missing = arrivals_missing(rule, amount, total)
                arrivals = missing if arrivals is None else max(arrivals, missing)
        when[task] = time, arrivals
    return when


def _all_unlocked(round: Round, tasks: Ints, unlocking: Sequence[Unlocking]) -> _Unlocks:
    """Of each task, when all its blocks that unlock by time will have released everything."""
    when: _Unlocks = {}
    for task in tasks.tolist():
        rules = [unlocking[block] for block in round.blocks_of(task).tolist()]
        ends = [rule.opened + rule.lifetime for rule in rules if isinstance(rule, ByTime)]
        when[task] = max(ends, default=None), None
    return when


def _soonest(round: Round, pairs: Ints) -> tuple[Ints, Ints]:
    """What must be released for each pair, and of what capacity, where that is least of it."""
    tasks, blocks = round.task_of_pair[pairs], round.indices[pairs]
    part: Floats = np.full(len(pairs), np.inf)
    needed, capacity = np.zeros(len(pairs), np.int64), np.ones(len(pairs), np.int64)
    held = round.consumed + round.reserved
    for order in range(len(round.orders)):
        amount = round.demand[tasks, order] + held[blocks, order]
        total = round.capacity[blocks, order]
        asked = np.divide(amount, total, out=np.full(len(pairs), np.inf), where=total > 0)
        sooner = asked < part
        part[sooner], needed[sooner] = asked[sooner], amount[sooner]
        capacity[sooner] = total[sooner]
    return needed, capacity


@compiled
def _bindings(
    indptr: Ints, indices: Ints, demand: Ints, capacity: Ints, budget: Ints, tasks: Ints
) -> Ints:
    """int64[2, n]: for each task its binding block in `budget`, and the closest order there."""
    found = np.zeros((2, len(tasks)), dtype=np.int64)
    for place in range(len(tasks)):
        task, worst = tasks[place], -np.inf
        for pair in range(indptr[task], indptr[task + 1]):
            block, closest, best = indices[pair], 0, np.inf
            for order in range(demand.shape[1]):
                # An order that the block doesn't track is no order to come close at.
                if capacity[block, order] != ABSENT:
                    asked = demand[task, order]
                    shortfall = (asked - budget[block, order]) / max(asked, 1)
                    if shortfall < best:
                        closest, best = order, shortfall
            if best > worst:
                worst = best
                found[0, place], found[1, place] = block, closest
    return found


@compiled
def _parts_that_fit(indptr: Ints, indices: Ints, demand: Ints, left: Ints) -> Ints:
    """int64[T]: how many thousandths of each task's demand fit in `left`; below 0 if not even 0."""
    parts = np.empty(len(demand), dtype=np.int64)
    for task in range(len(demand)):
        parts[task] = _PARTS
        for pair in range(indptr[task], indptr[task + 1]):
            most = -1
            for order in range(demand.shape[1]):
                asked, room = demand[task, order], left[indices[pair], order]
                if asked <= room:
                    most = _PARTS
                elif room >= 0:
                    most = max(most, _PARTS * room // asked)
            parts[task] = min(parts[task], most)
    return parts
