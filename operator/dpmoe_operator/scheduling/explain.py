"""Why each task still waits after a round: one reason, and the numbers behind it.

The reasons form a ladder of budgets that shrink from rung to rung:

    capacity ⊇ − consumed ⊇ − reserved ⊇ only what is unlocked ⊇ − granted in this round

The first rung that a task doesn't fit is its reason: the worst that holds, since what fails on a
high rung fails on all below. Words are made elsewhere; here are numbers only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.scheduling.filling import left_after, pairs_that_fit, tasks_that_fit
from dpmoe_operator.scheduling.round import ABSENT, Ints, Round
from dpmoe_operator.scheduling.unlocking import Unlocking, arrivals_missing, when_unlocked


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why one task waits.

    Attributes:
        task: The task's place in the round.
        reason: The worst reason that holds.
        block: The binding block row: the one with the largest shortfall, relative to what is asked.
        order: The Rényi order α at which the task comes closest to fitting there.
        asked: Units that the task asks at that order.
        left: Units that the block has at that order on the rung that the task doesn't fit:
            its capacity, what is not consumed, what is neither consumed nor reserved, what of that
            is unlocked, or what the round left over. Less than `asked`.
        unlock_at: If waiting for an unlock: when all its blocks that unlock by time will have
            released enough, on the clock of `ByTime.opened`. None if no such block is short.
        arrivals: If waiting for an unlock: how many more tasks must ask for its blocks that unlock
            by arrivals. None if no such block is short.
        rank: If outranked: its place in the policy's order, from 1.
        of: If outranked: how many tasks the order has.
    """

    task: int
    reason: Reason
    block: int
    order: float
    asked: int
    left: int
    unlock_at: float | None = None
    arrivals: int | None = None
    rank: int | None = None
    of: int | None = None


def explain(
    round: Round, granted: Ints, ranking: Ints, unlocking: Sequence[Unlocking]
) -> tuple[Explanation, ...]:
    """Explain every task that was not granted.

    Args:
        round: The round, as it was before the grants.
        granted: int64[G], the tasks that got budget.
        ranking: int64[T], all tasks in the policy's order, best first.
        unlocking: For each block row, its rule.

    Returns:
        One explanation for each waiting task, by its place in the round.

    Raises:
        ValueError: `ranking` doesn't list every task once, or a block lacks its rule.
    """
    if not np.array_equal(np.sort(ranking), np.arange(round.tasks)):
        raise ValueError(f"ranking: must list each of {round.tasks} tasks once.")
    if len(unlocking) != round.blocks:
        raise ValueError(f"unlocking: {len(unlocking)} rules for {round.blocks} block rows.")
    waiting = np.ones(round.tasks, dtype=bool)
    waiting[granted] = False
    explanations: list[Explanation] = []
    for reason, budget in _ladder(round):
        blocked = waiting & ~tasks_that_fit(round, budget)
        found = _bindings(round, blocked, reason, budget)
        if reason is Reason.WAITING_FOR_UNLOCK:
            found = _with_unlocks(round, list(found), unlocking)
        explanations.extend(found)
        waiting &= ~blocked
    outranked = _bindings(round, waiting, Reason.OUTRANKED, left_after(round, granted))
    explanations.extend(_with_ranks(outranked, ranking))
    return tuple(sorted(explanations, key=lambda explanation: explanation.task))


def _ladder(round: Round) -> Iterator[tuple[Reason, Ints]]:
    """The rungs that don't depend on the round's grants, worst reason first."""
    yield Reason.DEMAND_EXCEEDS_CAPACITY, round.capacity
    yield Reason.BLOCK_EXHAUSTED, round.capacity - round.consumed
    yield Reason.WAITING_FOR_REFUND, round.capacity - round.consumed - round.reserved
    yield Reason.WAITING_FOR_UNLOCK, round.available


def _bindings(
    round: Round, blocked: NDArray[np.bool_], reason: Reason, budget: Ints
) -> Iterator[Explanation]:
    """For each blocked task, its binding block in `budget` and the closest order there."""
    pairs = np.flatnonzero(blocked[round.task_of_pair])
    tasks, blocks = round.task_of_pair[pairs], round.indices[pairs]
    closest = np.zeros(len(pairs), dtype=np.int64)
    shortfall = np.full(len(pairs), np.inf)
    for order in range(len(round.orders)):
        asked, left = round.demand[tasks, order], budget[blocks, order]
        relative = (asked - left) / np.maximum(asked, 1)
        # An order that the block doesn't track is no order to come close at.
        relative[round.capacity[blocks, order] == ABSENT] = np.inf
        closest[relative < shortfall] = order
        np.minimum(shortfall, relative, out=shortfall)
    worst_first = np.lexsort((-shortfall, tasks))
    _, first = np.unique(tasks[worst_first], return_index=True)
    for pair in worst_first[first].tolist():
        task, block, order = int(tasks[pair]), int(blocks[pair]), int(closest[pair])
        yield Explanation(
            task=task,
            reason=reason,
            block=block,
            order=float(round.orders[order]),
            asked=int(round.demand[task, order]),
            left=int(budget[block, order]),
        )


def _with_unlocks(
    round: Round, explanations: list[Explanation], unlocking: Sequence[Unlocking]
) -> Iterator[Explanation]:
    """Add when, or after how many arrivals, all of a task's blocks will have released enough."""
    short = ~pairs_that_fit(round, round.available)
    for explanation in explanations:
        start, end = round.indptr[explanation.task], round.indptr[explanation.task + 1]
        blocks = round.indices[start:end][short[start:end]]
        needed = round.demand[explanation.task] + round.consumed[blocks] + round.reserved[blocks]
        capacity = round.capacity[blocks]
        released = np.divide(
            needed, capacity, out=np.full(needed.shape, np.inf), where=capacity > 0
        )
        soonest = released.argmin(axis=1)
        rows = np.arange(len(blocks))
        rules = [
            (unlocking[block], amount, total)
            for block, amount, total in zip(
                blocks.tolist(),
                needed[rows, soonest].tolist(),
                capacity[rows, soonest].tolist(),
                strict=True,
            )
        ]
        times = [t for rule in rules if (t := when_unlocked(*rule)) is not None]
        missing = [n for rule in rules if (n := arrivals_missing(*rule)) is not None]
        yield replace(
            explanation,
            unlock_at=max(times, default=None),
            arrivals=max(missing, default=None),
        )


def _with_ranks(explanations: Iterator[Explanation], ranking: Ints) -> Iterator[Explanation]:
    rank = np.empty(len(ranking), dtype=np.int64)
    rank[ranking] = np.arange(1, len(ranking) + 1)
    for explanation in explanations:
        yield replace(explanation, rank=int(rank[explanation.task]), of=len(ranking))
