"""Points of elastic jobs, ranked: the cheap one first, and what a better one costs beyond it.

An elastic job offers several points, of which it is granted at most one: a multiple-choice
knapsack. Its greedy (Sinha and Zoltners, "The multiple-choice knapsack problem", 1979) looks at the
lower convex hull of a job's points over (weight, cost), starting from (0, 0). The first point on it
is the one that costs least for its weight; each further one is an upgrade, which costs

    (c_next − c_now) / (w_next − w_now)

for the weight that it adds, ever more. All points of all jobs are tried by that number, and an
upgrade takes its point's place if it fits (see `filling`). Points off the hull are never worth it,
but may fit where those on it don't: they are tried last.

A job with one point costs c/w, as if there were no elastic jobs. So every policy that ranks by a
cost for the weight ranks elastic jobs, too, whatever its cost is.
"""

import numpy as np
from numpy.typing import NDArray

from dpmoe_operator.scheduling.compiled import compiled
from dpmoe_operator.scheduling.round import Floats, Ints, Round


def increments(
    round: Round, cost: Floats, counts: NDArray[np.bool_] | None = None
) -> tuple[Floats, NDArray[np.bool_]]:
    """What each task costs for the weight that it adds to the point of its job before it.

    Args:
        round: The round.
        cost: float64[T], ≥ 0, by any measure.
        counts: bool[T], which points may be on a hull; all if None.

    Returns:
        float64[T], increments, and of points off the hull all of c/w; bool[T], who is off the hull.
        Without elastic jobs nobody is.
    """
    whole = cost / round.weight
    if round.group is None:
        return whole, np.zeros(round.tasks, dtype=bool)
    on_hull = np.isfinite(cost) if counts is None else np.isfinite(cost) & counts
    first = np.append(np.flatnonzero(np.diff(round.job_of_task, prepend=-1)), round.tasks)
    key, late = whole.copy(), np.ones(round.tasks, dtype=bool)
    _hulls(first, cost, round.weight, on_hull, key, late)
    return key, late


def best_weights(round: Round, counts: NDArray[np.bool_] | None = None) -> Floats:
    """float64[J]: the largest weight of each job, among its points that count; 0 if none does."""
    best = np.zeros(round.jobs)
    weight = round.weight if counts is None else np.where(counts, round.weight, 0.0)
    np.maximum.at(best, round.job_of_task, weight)
    return best


@compiled
def _hulls(
    first: Ints,
    cost: Floats,
    weight: Floats,
    counts: NDArray[np.bool_],
    key: Floats,
    late: NDArray[np.bool_],
) -> None:
    """Write the slopes of each job's lower hull into `key`, and who is on it into `late`."""
    for job in range(len(first) - 1):
        cost_now, weight_now = 0.0, 0.0
        while True:
            best, least = -1, np.inf
            for task in range(first[job], first[job + 1]):
                if counts[task] and weight[task] > weight_now:
                    slope = (cost[task] - cost_now) / (weight[task] - weight_now)
                    if slope < least or (slope == least and weight[task] > weight[best]):
                        best, least = task, slope
            if best < 0:
                break
            key[best], late[best] = least, False
            cost_now, weight_now = cost[best], weight[best]
