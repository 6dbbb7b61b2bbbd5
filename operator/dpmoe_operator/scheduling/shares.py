"""A task's shares: what it asks of each block, over what the block had at first.

Shares are taken of *initial* capacity, so that they don't change while a task waits, and only at
orders where that is positive; elsewhere nothing is ever granted. DPF looks at the largest of them
(Luo et al., OSDI 2021, Algorithm 3), greedy area at their sum.
"""

import numpy as np
from numpy.typing import NDArray

from dpmoe_operator.scheduling.compiled import compiled
from dpmoe_operator.scheduling.round import Floats, Ints, Round


def largest_and_summed(round: Round) -> tuple[Floats, Floats]:
    """Over a task's blocks j and usable orders α, max and Σ of d_iα / c_jα: float64[T] each.

    Both are 0 where no order is usable.
    """
    return _largest_and_summed(round.indptr, round.indices, round.demand, round.capacity)


def all_shares(round: Round, task: int) -> Floats:
    """Every positive share of a task, the largest first."""
    capacity = round.capacity[round.blocks_of(task)]
    shares = np.divide(
        round.demand[task], capacity, out=np.zeros(capacity.shape), where=capacity > 0
    )
    return np.sort(shares[shares > 0])[::-1]


def fair_demands(round: Round) -> NDArray[np.bool_]:
    """bool[T]: whether a task asks at most its fair share, c_jα/N_j, of all it asks for.

    The fair pipelines of Luo et al., OSDI 2021, Section 4: those that DPF's guarantees are about.
    N_j is the row's `fair_shares`, or the number of jobs that wait for it where nobody set one.
    """
    asking = round.indices
    if round.group is not None:
        pairs = np.unique(round.job_of_task[round.task_of_pair] * round.blocks + round.indices)
        asking = pairs % round.blocks
    waiting = np.bincount(asking, minlength=round.blocks)
    given = np.zeros_like(waiting) if round.fair_shares is None else round.fair_shares
    shares = np.where(given > 0, given, waiting).astype(np.int64)
    return _fair(round.indptr, round.indices, round.demand, round.capacity, shares)


def fair_jobs(round: Round) -> NDArray[np.bool_]:
    """bool[J]: which jobs ask at most their fair share, an elastic one with any of its points."""
    fair = np.zeros(round.jobs, dtype=bool)
    fair[round.job_of_task[fair_demands(round)]] = True
    return fair


def parts_asked(round: Round, picks: Ints) -> Floats:
    """float64[nnz]: d/a, what each task asks of each of its blocks, at the block's pick.

    0 where a block has nothing at its pick: what fits there asks nothing, or fits elsewhere.
    """
    pick = picks[round.indices]
    asked = round.demand[round.task_of_pair, pick]
    available = round.available[round.indices, pick]
    return np.divide(asked, available, out=np.zeros(len(pick)), where=available > 0)


@compiled
def _largest_and_summed(
    indptr: Ints, indices: Ints, demand: Ints, capacity: Ints
) -> tuple[Floats, Floats]:
    # Amounts below 2⁵³ are exact as floats, so each quotient is the one that is nearest.
    largest, total = np.zeros(len(demand)), np.zeros(len(demand))
    for task in range(len(demand)):
        asked = demand[task]
        for pair in range(indptr[task], indptr[task + 1]):
            whole = capacity[indices[pair]]
            for order in range(len(asked)):
                if whole[order] > 0:
                    share = asked[order] / whole[order]
                    largest[task] = max(largest[task], share)
                    total[task] += share
    return largest, total


@compiled
def _fair(
    indptr: Ints, indices: Ints, demand: Ints, capacity: Ints, shares: Ints
) -> NDArray[np.bool_]:
    fair = np.ones(len(demand), dtype=np.bool_)
    for task in range(len(demand)):
        asked = demand[task]
        for pair in range(indptr[task], indptr[task + 1]):
            whole, parts = capacity[indices[pair]], shares[indices[pair]]
            for order in range(len(asked)):
                if whole[order] > 0 and asked[order] > whole[order] // parts:
                    fair[task] = False
                    break
            if not fair[task]:
                break
    return fair
