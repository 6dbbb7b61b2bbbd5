"""DPF, dominant private-block fairness: who asks for the smallest largest share goes first.

Luo, Pan, Tholoniat, Cidon, Geambasu, Lécuyer: "Privacy budget scheduling", OSDI 2021, Algorithms
1 (basic), 2 (unlocking by time) and 3 (Rényi). The dominant share of task i is

    share_i = max over its blocks j and orders α with capacity c_jα > 0 of d_iα / c_jα,

against *initial* capacity, so that it doesn't change while a task waits; a task of weight w counts
with share/w. Ties go to the smaller next-largest share, and so on over all (block, order) pairs,
then to the earlier arrival. Unlocking, which makes it fair, is in `unlocking`.

For tasks that ask at most their fair share c/N, the paper proves a sharing incentive,
strategy-proofness, dynamic envy-freeness and Pareto efficiency.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dpmoe_operator.scheduling.filling import fill
from dpmoe_operator.scheduling.round import Floats, Ints, Round


def dominant_shares(round: Round) -> Floats:
    """float64[T]: the largest share of each task, over its weight; 0 where no order is usable."""
    if round.tasks == 0:
        return np.zeros(0)
    largest = np.zeros(len(round.indices))
    for order in range(len(round.orders)):
        asked = round.demand[round.task_of_pair, order]
        np.maximum(largest, _shares(asked, round.capacity[round.indices, order]), out=largest)
    shares: Floats = np.maximum.reduceat(largest, round.indptr[:-1]) / round.weight
    return shares


def order(round: Round) -> Ints:
    """int64[T]: all tasks, the smallest dominant share first."""
    dominant = dominant_shares(round)
    ordered = np.lexsort((round.arrival, dominant, -round.priority)).astype(np.int64)
    for run in _ties(ordered, dominant, round.priority):
        vectors = {task: _all_shares(round, task) for task in ordered[run].tolist()}
        # Equal vectors share one rank, and sorting is stable: arrivals decide among them.
        rank = {vector: i for i, vector in enumerate(sorted(set(vectors.values())))}
        ordered[run] = sorted(vectors, key=lambda task: rank[vectors[task]])
    return ordered


def grant(round: Round) -> Ints:
    """int64[G]: the granted tasks, in the order of their grants."""
    return fill(round, order(round))


def _shares(asked: Ints, capacity: Ints) -> Floats:
    """d/c where there is capacity, 0 elsewhere. Amounts below 2⁵³ are exact as floats."""
    return np.divide(asked, capacity, out=np.zeros(asked.shape), where=capacity > 0)


def _all_shares(round: Round, task: int) -> tuple[float, ...]:
    """Every positive share of a task, the largest first; a missing one counts as zero."""
    capacity = round.capacity[round.blocks_of(task)]
    shares = _shares(np.broadcast_to(round.demand[task], capacity.shape), capacity)
    positive = shares[shares > 0] / round.weight[task]
    return tuple(np.sort(positive)[::-1].tolist())


def _ties(ordered: Ints, dominant: Floats, priority: Ints) -> Iterator[slice]:
    """Runs of at least two tasks with the same priority and dominant share."""
    differs: NDArray[np.bool_] = (np.diff(dominant[ordered]) != 0) | (
        np.diff(priority[ordered]) != 0
    )
    ends = np.append(np.flatnonzero(differs) + 1, len(ordered)).tolist()
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        if end - start > 1:
            yield slice(start, end)
