"""First come, first served: by priority, then by arrival. Best effort, as PrivateKube's baseline.

It serves whoever is early, so one large task takes what a hundred small ones could have used. It
is the policy to compare with, and the one that is easiest to explain to a team.
"""

import numpy as np

from dpmoe_operator.scheduling.filling import fill
from dpmoe_operator.scheduling.round import Ints, Round


def order(round: Round) -> Ints:
    """int64[T]: all tasks, the first to be served first; equal arrivals by their place."""
    return np.lexsort((round.arrival, -round.priority)).astype(np.int64)


def grant(round: Round) -> Ints:
    """int64[G]: the granted tasks, in the order of their grants."""
    return fill(round, order(round))
