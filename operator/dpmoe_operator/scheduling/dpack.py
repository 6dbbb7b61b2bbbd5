"""DPack: who asks for the least of what is scarce goes first, at each block's best order.

Tholoniat, Kostopoulou, Chowdhury, Cidon, Geambasu, Lécuyer, Yang: "DPack: efficiency-oriented
privacy budget scheduling", EuroSys 2025, Section 4. With a_jα, what block j has available at order
α, the best order of a block is the one at which a knapsack of that block alone would hold most:

    α_j = argmax over α with a_jα > 0 of max { Σ w_i x_i : Σ d_iα x_i ≤ a_jα, x_i ∈ {0, 1} },

the efficiency of a task is its weight over its normalised demand at those orders,

    e_i = w_i / Σ over its blocks j of d_i(α_j) / a_j(α_j),

and tasks are granted by falling efficiency while they fit at any order.

The one-block knapsack is solved by density, smallest d/w first: exactly if all weights are equal
(count until full), else by the fractional knapsack, which is at most one task's weight above it.

Three details in which the authors' artifact differs matter more than they look. Orders often tie:
it keeps *all* tied orders and sums their costs (`published_ties`); here one order wins, the one of
the smallest total load Σ_i d_iα / a_jα, which grants up to 15 % more. Its one-block knapsacks count
tasks, whatever they weigh (`counting`); here weights count, as in the paper. And it recomputes
orders and efficiencies after every `period` grants; without a period, as in its offline
experiments, they are computed once. Its weights are numbers of any kind and only enter e_i.

So set, and given all who wait, also those who can't be granted, it grants the same tasks in the
same rounds as the artifact's own scheduler (columbia/dpack@706b990) on a trace like Alibaba-DP.

Of an elastic job, a block's knapsack counts the point that asks least there for its weight.
"""

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dpmoe_operator.scheduling.compiled import compiled
from dpmoe_operator.scheduling.filling import fill, tasks_that_fit
from dpmoe_operator.scheduling.points import increments
from dpmoe_operator.scheduling.round import Floats, Ints, Round


def order(
    round: Round,
    *,
    published_ties: bool = False,
    counting: bool = False,
    period: int | None = None,
) -> Ints:
    """int64[T]: all tasks, the most efficient first; ties by arrival.

    Args:
        round: The round.
        published_ties: Whether all tied best orders of a block count, as in the artifact.
        counting: Whether the one-block knapsacks count tasks instead of weights, as in the
            artifact.
        period: After how many grants efficiencies are computed anew; never if None.
    """
    if period is None:
        return _static(round, published_ties, counting)
    granted, waiting = np.zeros(0, np.int64), np.arange(round.tasks)
    better: list[Ints] = []  # Other points of who is granted; they come last.
    while True:
        rest = round.after(granted, waiting)
        ranking = _static(rest, published_ties, counting)
        next_ones = fill(rest, ranking)[:period]
        if len(next_ones) < period:
            return np.concatenate([granted, waiting[ranking], *better])
        granted = np.concatenate([granted, waiting[next_ones]])
        settled = rest.siblings(next_ones)
        settled[next_ones] = False
        better.append(waiting[settled])
        waiting = waiting[~rest.siblings(next_ones)]


def _static(round: Round, published_ties: bool, counting: bool) -> Ints:
    value, load = knapsacks(replace(round, weight=np.ones(round.tasks)) if counting else round)
    if published_ties:
        return by_cost(round, all_tied(value))
    return by_cost(round, only(round, best_orders(round, value, load)))


def best_orders(round: Round, value: Floats, load: Floats) -> Ints:
    """int64[B]: the place in `orders` of each block's best order; ties to the least loaded.

    A block that has nothing available at any order gets the order at which it lacks least.

    Args:
        round: The round.
        value: float64[B, A], and
        load: float64[B, A], as `knapsacks` returns them.
    """
    load = np.where(value == value.max(axis=1, keepdims=True), load, np.inf)
    empty = (round.available <= 0).all(axis=1)
    best: Ints = np.where(empty, round.available.argmax(axis=1), load.argmin(axis=1))
    return best


def only(round: Round, picks: Ints) -> NDArray[np.bool_]:
    """bool[B, A]: one order a block, its pick."""
    counted: NDArray[np.bool_] = np.arange(len(round.orders)) == picks[:, np.newaxis]
    return counted


def all_tied(value: Floats) -> NDArray[np.bool_]:
    """bool[B, A]: all of a block's best orders, by the values that `knapsacks` returns."""
    counted: NDArray[np.bool_] = value == value.max(axis=1, keepdims=True)
    return counted


def knapsacks(round: Round) -> tuple[Floats, Floats]:
    """What each block alone could grant at each order, and how much is asked of it there.

    Returns:
        float64[B, A] values in weight, −1 where nothing is available; float64[B, A] loads, the sum
        of what all tasks ask over what is available, infinite where nothing is.
    """
    usable = round.available > 0
    value = np.full(usable.shape, -1.0)
    fractional = bool((round.weight != round.weight[:1]).any())
    # With equal weights, ties ask the same, and it makes no difference who is first.
    kind: Literal["stable"] | None = "stable" if fractional else None
    for order in np.flatnonzero(usable.any(axis=0)).tolist():
        asked = np.ascontiguousarray(round.demand[:, order])
        tries = np.argsort(asked / round.weight, kind=kind)
        if round.group is not None:
            _, first = np.unique(round.group[tries], return_index=True)
            tries = tries[np.sort(first)]
        value[:, order] = _knapsacks(
            round.indptr,
            round.indices,
            asked,
            round.weight,
            tries,
            round.available[:, order].copy(),
            fractional,
        )
    asked_in_all = _loads(round.indptr, round.indices, round.demand, round.blocks)
    load = np.divide(asked_in_all, round.available, out=np.full(usable.shape, np.inf), where=usable)
    return np.where(usable, value, -1.0), load


def by_cost(round: Round, counted: NDArray[np.bool_]) -> Ints:
    """int64[T]: all tasks, the cheapest for its weight first; those that don't fit now come last.

    Args:
        round: The round.
        counted: bool[B, A]. A task costs Σ d_iα/a_jα over its blocks j and the orders α that count
            there and have something available.
    """
    cost = _costs(round.indptr, round.indices, round.demand, round.available, counted)
    fitting = tasks_that_fit(round, round.available)
    key, late = increments(round, cost, fitting)
    return np.lexsort((round.arrival, np.where(fitting, key, np.inf), late)).astype(np.int64)


@compiled
def _knapsacks(
    indptr: Ints,
    indices: Ints,
    asked: Ints,
    weight: Floats,
    tries: Ints,
    room: Ints,
    fractional: bool,
) -> Floats:
    """One order: fill every block on its own, in the order of `tries`, up to the first misfit."""
    value = np.zeros(len(room))
    open_ = room > 0
    still_open = open_.sum()
    for task in tries:
        ask, worth = asked[task], weight[task]
        for block in indices[indptr[task] : indptr[task + 1]]:
            if not open_[block]:
                continue
            if ask <= room[block]:
                room[block] -= ask
                value[block] += worth
            else:
                open_[block] = False
                still_open -= 1
                if fractional:
                    value[block] += worth * room[block] / ask
        if still_open == 0:
            break
    return value


@compiled
def _loads(indptr: Ints, indices: Ints, demand: Ints, blocks: int) -> Floats:
    """float64[B, A]: what all tasks together ask of each block."""
    load = np.zeros((blocks, demand.shape[1]))
    for task in range(len(demand)):
        asked = demand[task]
        for pair in range(indptr[task], indptr[task + 1]):
            total = load[indices[pair]]
            for order in range(len(asked)):
                total[order] += asked[order]
    return load


@compiled
def _costs(
    indptr: Ints, indices: Ints, demand: Ints, available: Ints, counted: NDArray[np.bool_]
) -> Floats:
    cost = np.zeros(len(demand))
    for task in range(len(demand)):
        asked = demand[task]
        for pair in range(indptr[task], indptr[task + 1]):
            counts, room = counted[indices[pair]], available[indices[pair]]
            for order in range(len(asked)):
                if counts[order] and room[order] > 0:
                    cost[task] += asked[order] / room[order]
    return cost
