"""DPF, dominant private-block fairness: who asks for the smallest largest share goes first.

Luo, Pan, Tholoniat, Cidon, Geambasu, Lécuyer: "Privacy budget scheduling", OSDI 2021, Algorithms
1 (basic), 2 (unlocking by time) and 3 (Rényi). The dominant share of task i is

    share_i = max over its blocks j and orders α with capacity c_jα > 0 of d_iα / c_jα,

against *initial* capacity, so that it doesn't change while a task waits; a task of weight w counts
with share/w. Ties go to the smaller next-largest share, and so on over all (block, order) pairs,
then to the earlier arrival. Unlocking, which makes it fair, is in `unlocking`.

For tasks that ask at most their fair share c/N, the paper proves a sharing incentive,
strategy-proofness, dynamic envy-freeness and Pareto efficiency.

An elastic job enters with the point of the smallest share for its weight; each better point has the
place of what it adds to the share (`points`), after everybody who asks for less.
"""

from collections.abc import Callable, Iterator

import numpy as np

from dpmoe_operator.scheduling.points import increments
from dpmoe_operator.scheduling.round import Floats, Ints, Round
from dpmoe_operator.scheduling.shares import all_shares, largest_and_summed


def order(round: Round) -> Ints:
    """int64[T]: all tasks, the smallest dominant share first."""
    dominant, late = increments(round, largest_and_summed(round)[0])
    ordered = np.lexsort((round.arrival, dominant, late)).astype(np.int64)
    vector = _vectors(round)
    for run in _ties(dominant[ordered]):
        vectors = {task: vector(task) for task in ordered[run].tolist()}
        # Equal vectors share one rank, and sorting is stable: arrivals decide among them.
        rank = {found: i for i, found in enumerate(sorted(set(vectors.values())))}
        ordered[run] = sorted(vectors, key=lambda task: rank[vectors[task]])
    return ordered


def _vectors(round: Round) -> Callable[[int], bytes]:
    """Of each task, all its positive shares, the largest first, as bytes that compare likewise.

    Positive floats compare like their big-endian bytes, and a missing share like a zero. Tasks
    that ask the same of blocks with the same capacities, often thousands, share one computation.
    """
    _, kind = np.unique(round.capacity, axis=0, return_inverse=True)
    known: dict[tuple[bytes, bytes, float], bytes] = {}

    def vector(task: int) -> bytes:
        kinds = np.sort(kind.ravel()[round.blocks_of(task)])
        key = round.demand[task].tobytes(), kinds.tobytes(), float(round.weight[task])
        if key not in known:
            known[key] = (all_shares(round, task) / round.weight[task]).astype(">f8").tobytes()
        return known[key]

    return vector


def _ties(sorted_shares: Floats) -> Iterator[slice]:
    """Runs of at least two equal dominant shares."""
    ends = np.append(np.flatnonzero(np.diff(sorted_shares)) + 1, len(sorted_shares)).tolist()
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        if end - start > 1:
            yield slice(start, end)
