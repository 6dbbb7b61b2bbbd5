"""What a policy learnt about budgets in the rounds before, kept between rounds.

Prices are hints: a round that starts from those of the round before balances them in a few steps.
They decide nothing that must be right, so they live in memory only, and a restarted operator begins
afresh. A row is known by what it means, an account or a namespace's cap on one, since rows change
their places from round to round.
"""

from collections.abc import Sequence

import numpy as np

from dpmoe_operator.scheduling.outcome import Prices

Row = tuple[str, str | None]
"""An account, and the namespace if the row is that namespace's cap on it."""


class Market:
    """The prices of the last round that had any."""

    def __init__(self) -> None:
        self._prices: Prices | None = None
        self._orders: tuple[str, ...] = ()
        self._place: dict[Row, int] = {}

    def quote(self, rows: Sequence[Row], orders: tuple[str, ...]) -> Prices | None:
        """The known prices on the rows of a round, or None.

        Args:
            rows: what the round's rows mean.
            orders: the round's orders; prices of a round with others say nothing about this one.
        """
        if self._prices is None or orders != self._orders:
            return None
        places = [self._place.get(row, -1) for row in rows]
        return self._prices.on(np.array(places, dtype=np.int64))

    def learn(self, rows: Sequence[Row], orders: tuple[str, ...], prices: Prices | None) -> None:
        """Remember what a round came to."""
        if prices is not None:
            self._prices, self._orders = prices, orders
            self._place = {row: place for place, row in enumerate(rows)}
