"""An upper bound on what any policy could grant in a round, whatever orders the blocks hold at.

Fixing an order for each block makes the round a linear program, but its value bounds only the
grants that hold at *those* orders. The bound here leaves every block its choice. Give each block a
copy of the tasks and split every task's weight over the blocks that it asks for, v_ij ≥ 0 with
Σ_j v_ij ≥ w_i. Then for every set of tasks x that fits,

    Σ_i w_i x_i ≤ Σ_j Σ_i v_ij x_i ≤ Σ_j max over α of max { Σ v_ij x_i : Σ d_iα x_i ≤ a_jα },

since at block j the set fits at *some* order (a Lagrangian decomposition; Guignard and Kim 1987).
Each inner knapsack is bounded by its linear relaxation, and that from above by any price μ ≥ 0:

    μ + Σ over tasks with d_iα ≤ a_jα of max(0, v_ij − μ d_iα / a_jα),

where the points of one elastic job count once, with the largest term among them.

So any split and any prices give a valid bound; good ones give a tight one. Splitting in proportion
to what a task pays at each block at the prices of `dual` makes the bound equal to the value of
that linear program unless another order would hold more. A few subgradient steps, which move a
task's weight to the blocks that would not grant it, close most of what is left then.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpmoe_operator.scheduling.compiled import compiled
from dpmoe_operator.scheduling.filling import tasks_that_fit
from dpmoe_operator.scheduling.outcome import Prices
from dpmoe_operator.scheduling.points import best_weights
from dpmoe_operator.scheduling.round import Floats, Ints, Round
from dpmoe_operator.scheduling.shares import parts_asked

_WORK = 6_000_000
"""About how many (task, block, order) triples all subgradient steps together may look at."""

_MOST_STEPS = 30
_FIRST_STEP = 0.3
_PRECISION = 1e-5
"""To which a block's price is found. Any price bounds; the bound is flat where the best one is."""

_ROUNDING = 1e-9
"""Relative; far above what float64 loses in a sum of millions of terms."""


def upper_bound(round: Round, prices: Prices) -> float:
    """The weight that no set of tasks that fits exceeds.

    Args:
        round: The round.
        prices: Any prices; the better they are, the tighter is the bound.
    """
    hopeful = tasks_that_fit(round, round.available)
    weight = np.where(hopeful, round.weight, 0.0)
    asked = np.diff(round.indptr)
    share = (weight / asked)[round.task_of_pair]
    paid = parts_asked(round, prices.pick) * prices.price[round.indices]
    split = _scaled(round, weight, paid)
    blocks = _blocks(round)
    steps = max(1, min(_MOST_STEPS, _WORK // max(1, len(round.indices) * len(round.orders))))
    best = float(best_weights(round, hopeful).sum())
    taken = np.zeros(len(round.indices))
    for step in range(steps):
        value = 0.0
        for block in blocks:
            worth, taken[block.pairs] = _knapsack(
                block.asked,
                split[block.pairs],
                block.last,
                block.available,
                int(prices.pick[block.row]),
            )
            value += worth
        best = min(best, value)
        mean = np.bincount(round.task_of_pair, taken, minlength=round.tasks) / asked
        size = _FIRST_STEP / (1 + step / 5)
        moved = split + size * share * (mean[round.task_of_pair] - taken)
        split = _scaled(round, weight, np.maximum(moved, 0.0))
    return rounded(best, round.weight)


@dataclass(frozen=True)
class _Block:
    """A block with the n pairs that ask for it, what they ask, float64[A, n], and what it has.

    `last` says which of the pairs is the last one of its job.
    """

    row: int
    pairs: Ints
    asked: Floats
    last: NDArray[np.bool_]
    available: Ints


def _blocks(round: Round) -> list[_Block]:
    ends = np.cumsum(np.bincount(round.indices, minlength=round.blocks))
    pairs = _pairs_by_block(round.indices, np.append(0, ends[:-1]))
    return [
        _Block(
            row,
            own,
            np.ascontiguousarray(round.demand[round.task_of_pair[own]].T, dtype=np.float64),
            np.diff(round.job_of_task[round.task_of_pair[own]], append=round.jobs) > 0,
            round.available[row],
        )
        for row, own in enumerate(np.split(pairs, ends[:-1]))
        if len(own)
    ]


def rounded(bound: float, weight: Floats) -> float:
    """A bound with float64's errors taken into account; whole if all weights are whole."""
    bound += _ROUNDING * (1 + abs(bound))
    whole = bool((weight == np.floor(weight)).all())
    return float(math.floor(bound)) if whole else bound


def _scaled(round: Round, weight: Floats, parts: Floats) -> Floats:
    """Parts of each task, scaled to add up to its weight; equal ones where all are zero."""
    total = np.bincount(round.task_of_pair, parts, minlength=round.tasks)
    asked = np.diff(round.indptr)
    factor = np.divide(weight, total, out=np.zeros(round.tasks), where=total > 0)
    equal = np.where(total > 0, 0.0, weight / asked)
    return parts * factor[round.task_of_pair] + equal[round.task_of_pair]


@compiled
def _pairs_by_block(indices: Ints, next_place: Ints) -> Ints:
    """int64[nnz]: the places of all pairs, block by block, from where each block starts."""
    places = np.empty(len(indices), dtype=np.int64)
    for pair in range(len(indices)):
        places[next_place[indices[pair]]] = pair
        next_place[indices[pair]] += 1
    return places


@compiled
def _knapsack(
    asked: Floats, split: Floats, last: NDArray[np.bool_], available: Ints, first: int
) -> tuple[float, Floats]:
    """Bound one block's knapsack, at the order where it is worth most. One point counts of a job.

    Returns:
        The bound; float64[n], which part of each task the relaxed knapsack takes.
    """
    orders, tasks = asked.shape
    best, price = 0.0, 0.0
    taken, load = np.zeros(tasks), np.zeros(tasks)
    at_high, at_low = np.zeros(tasks, dtype=np.bool_), np.zeros(tasks, dtype=np.bool_)
    for turn in range(orders):
        # The order that is priced is likely the best one, and shows others to be worse early.
        order = (first + turn) % orders
        room, asked_here = available[order], asked[order]
        if room < 0:
            continue
        inverse = 1.0 / room if room > 0 else 0.0
        whole, total, value = 0.0, 0.0, price
        most, most_load, gain = 0.0, 0.0, 0.0
        for i in range(tasks):
            load[i] = asked_here[i] * inverse if asked_here[i] <= room else np.inf
            if load[i] < np.inf:
                if split[i] > most:
                    most, most_load = split[i], load[i]
                gain = max(gain, split[i] - price * load[i])
            if last[i]:
                whole += most
                total += most_load
                value += gain
                most, most_load, gain = 0.0, 0.0, 0.0
        value, low, high = min(value, whole), 0.0, 0.0
        if total > 1.0:
            # At a price of all that is there to win, what is still worth it takes at most 1.
            high = whole
            middle = price if 0.0 < price < whole else whole / 2
            while high - low > _PRECISION * high and value > best:
                bound, used = middle, 0.0
                gain, gain_load = 0.0, 0.0
                for i in range(tasks):
                    if split[i] - middle * load[i] > gain:
                        gain, gain_load = split[i] - middle * load[i], load[i]
                    if last[i]:
                        bound += gain
                        used += gain_load
                        gain, gain_load = 0.0, 0.0
                value = min(value, bound)
                if used > 1.0:
                    low = middle
                else:
                    high = middle
                middle = (low + high) / 2
        if value <= best:
            continue
        best, price = value, high
        # What is taken at the high price, and so much of what is at the low one that it is full.
        used_high, used_low = 0.0, 0.0
        high_gain, high_point, low_gain, low_point = 0.0, -1, 0.0, -1
        for i in range(tasks):
            at_high[i], at_low[i] = False, False
            if split[i] - high * load[i] > high_gain:
                high_gain, high_point = split[i] - high * load[i], i
            if load[i] < np.inf and split[i] - low * load[i] > low_gain:
                low_gain, low_point = split[i] - low * load[i], i
            if last[i]:
                if high_point >= 0:
                    at_high[high_point] = True
                    used_high += load[high_point]
                if low_point >= 0:
                    at_low[low_point] = True
                    used_low += load[low_point]
                high_gain, high_point, low_gain, low_point = 0.0, -1, 0.0, -1
        part = min(1.0, (1.0 - used_high) / (used_low - used_high)) if used_low > used_high else 0.0
        for i in range(tasks):
            taken[i] = (1.0 - part) * at_high[i] + part * at_low[i]
    return best, taken
