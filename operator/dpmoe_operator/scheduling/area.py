"""Greedy area: who asks for the least in all, over all blocks and orders, goes first.

The simplest efficient heuristic that DPack is compared with (Tholoniat et al., EuroSys 2025,
Section 3): a task's efficiency is its weight over the sum of its shares,

    e_i = w_i / Σ over its blocks j and orders α with capacity c_jα > 0 of d_iα / c_jα.

It sees that a wide task costs more than a narrow one, which DPF doesn't, but counts every order,
although a block needs to hold at one order only.
"""

import numpy as np

from dpmoe_operator.scheduling.points import increments
from dpmoe_operator.scheduling.round import Ints, Round
from dpmoe_operator.scheduling.shares import largest_and_summed


def order(round: Round) -> Ints:
    """int64[T]: all tasks, the most efficient first; ties by arrival."""
    _, summed = largest_and_summed(round)
    key, late = increments(round, summed)
    return np.lexsort((round.arrival, key, late)).astype(np.int64)
