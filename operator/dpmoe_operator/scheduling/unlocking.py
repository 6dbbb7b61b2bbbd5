"""Unlocking: a block releases its budget step by step, so that early tasks can't take it all.

Luo et al., OSDI 2021: DPF-N releases one fair share c/N with each of the first N tasks that ask for
the block (Algorithm 1); DPF-T releases evenly over the data's lifetime (Algorithm 2). Unlocking is
a matter of fairness, not of privacy: whatever is unlocked, the filter bounds what is granted.

Only positive capacities are released bit by bit. Nothing fits at a negative one, so it stays.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from dpmoe_operator.scheduling.round import Ints


@dataclass(frozen=True)
class Immediate:
    """The whole budget is released from the start."""


@dataclass(frozen=True)
class ByArrivals:
    """DPF-N: `arrivals` of the `fair_shares` tasks that release the budget have asked so far."""

    fair_shares: int
    arrivals: int

    def __post_init__(self) -> None:
        if self.fair_shares < 1 or self.arrivals < 0:
            raise ValueError(f"unlocking: {self} needs at least 1 fair share and 0 arrivals.")


@dataclass(frozen=True)
class ByTime:
    """DPF-T: released evenly over `lifetime` seconds from `opened` (seconds on any one clock).

    In so many equal `steps`, or continuously if None.
    """

    opened: float
    lifetime: float
    steps: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.opened) and math.isfinite(self.lifetime) and self.lifetime > 0):
            raise ValueError(f"unlocking: {self} needs a finite start and a lifetime above 0.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"unlocking: {self} needs at least 1 step.")


Unlocking = Immediate | ByArrivals | ByTime


def fraction(unlocking: Unlocking, now: float) -> Fraction:
    """The released part of a budget at `now`, in [0, 1], exactly."""
    match unlocking:
        case Immediate():
            return Fraction(1)
        case ByArrivals(fair_shares, arrivals):
            return min(Fraction(1), Fraction(arrivals, fair_shares))
        case ByTime(opened, lifetime, steps):
            elapsed = (Fraction(now) - Fraction(opened)) / Fraction(lifetime)
            elapsed = min(Fraction(1), max(Fraction(0), elapsed))
            return elapsed if steps is None else Fraction(math.floor(elapsed * steps), steps)


def unlocked(capacity: NDArray[np.int64], released: Fraction) -> Ints:
    """int64[A]: the released part of a capacity row, rounded down; negative amounts stay.

    Args:
        capacity: int64[A], initial capacity of one block.
        released: Fraction in [0, 1].
    """
    return np.array(
        [
            amount * released.numerator // released.denominator if amount > 0 else amount
            for amount in capacity.tolist()
        ],
        dtype=np.int64,
    )


def when_unlocked(rule: ByTime, needed: int, capacity: int) -> float:
    """When `needed` of a positive `capacity` will be released.

    Args:
        rule: The block's rule.
        needed: Units that must be released, at most `capacity`.
        capacity: Initial capacity in units, at one order.

    Returns:
        Seconds on the clock of `ByTime.opened`, to the precision of a float.
    """
    part = needed / capacity
    if rule.steps is not None:
        part = -(-needed * rule.steps // capacity) / rule.steps
    return rule.opened + rule.lifetime * part


def arrivals_missing(rule: ByArrivals, needed: int, capacity: int) -> int:
    """How many more tasks must ask for the block until `needed` of `capacity` is released.

    Arguments as for `when_unlocked`.
    """
    shares = -(-needed * rule.fair_shares // capacity)
    return max(0, shares - rule.arrivals)
