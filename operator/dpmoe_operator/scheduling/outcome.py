"""What a round came to: the grants, the order they came in, and how good they are."""

from dataclasses import dataclass

import numpy as np

from dpmoe_operator.scheduling.round import Floats, Ints


@dataclass(frozen=True)
class Prices:
    """What a policy learnt about the rows of a round, and may start from in the next.

    Attributes:
        price: float64[B], ≥ 0: the weight that all that a row has available could buy elsewhere.
        pick: int64[B], the place in `orders` of the order at which the row is priced.
    """

    price: Floats
    pick: Ints

    def on(self, rows: Ints) -> "Prices":
        """The same prices on the rows of another round.

        Args:
            rows: int64[B′], for each row of that round its row in this one, −1 if it is new. A new
                row starts at the mean price.
        """
        known = rows >= 0
        mean = float(self.price.mean()) if len(self.price) else 0.0
        price, pick = np.full(len(rows), mean), np.zeros(len(rows), dtype=np.int64)
        price[known], pick[known] = self.price[rows[known]], self.pick[rows[known]]
        return Prices(price, pick)


@dataclass(frozen=True)
class Ranking:
    """How a policy ranks the tasks of a round.

    Attributes:
        order: int64[T], all tasks, most deserving first. They are granted in this order while they
            fit, so the order decides everything.
        bound: No set of tasks that fits weighs more; None if the policy bounds nothing.
        prices: What the policy would like to start from in the next round.
        paid: float64[T], what each task pays at the prices, in weight: it is worth its price if its
            weight is not below. None if the policy has no prices.
    """

    order: Ints
    bound: float | None = None
    prices: Prices | None = None
    paid: Floats | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of a round.

    Attributes:
        granted: int64[G], the tasks that get budget, in the order of their grants; of an elastic
            job, the point that was chosen.
        planned: int64[P], the tasks for which budget is kept, whether it is unlocked already or
            not, and whether they are granted already or not: the granted ones, unless the round
            looks ahead.
        order: int64[T], all tasks, the most deserving first: what a rank is read from.
        weight: The weight of the granted tasks together.
        bound: An upper bound on the weight of any set of tasks that fits, whatever orders the
            blocks hold at; None if the policy bounds nothing.
        fair: How many jobs asked at most their fair share (`shares.fair_jobs`).
        fair_granted: How many of those were granted.
        prices: To hand to the next round's `grant`; None if the policy has none.
    """

    granted: Ints
    planned: Ints
    order: Ints
    weight: float
    bound: float | None
    fair: int
    fair_granted: int
    prices: Prices | None
