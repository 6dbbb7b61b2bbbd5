"""First come, first served. Best effort, as PrivateKube's baseline.

It serves whoever is early, so one large task takes what a hundred small ones could have used. It
is the policy to compare with, and the one that is easiest to explain to a team.
"""

import numpy as np

from dpmoe_operator.scheduling.round import Ints, Round


def order(round: Round) -> Ints:
    """int64[T]: all tasks, the first to be served first; equal arrivals by their place.

    An elastic job is served the best of its points that fits.
    """
    return np.lexsort((-round.weight, round.job_of_task, round.arrival)).astype(np.int64)
