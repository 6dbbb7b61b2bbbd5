"""Dual: tasks pay for what they ask at prices that balance demand and budget. The default.

DPack values one unit of every block alike, but a block that everybody asks for is scarce and
another is idle. With one order α_j fixed for each block, what a round can grant at most is, but
for fractions, a linear program; its dual variables λ_j ≥ 0 are prices of the blocks. They minimise

    Σ_j λ_j + Σ_i max(0, w_i − p_i),   where task i pays p_i = Σ_j λ_j d_i(α_j) / a_j(α_j),

a_jα being what block j has available. Tasks are ranked by p_i / w_i: a task is worth its price if
that is below 1. An elastic job counts with the point whose weight exceeds its price most, or with
none, and its points are ranked by what each adds (`points`). Prices move by a multiplicative
subgradient: a block's price rises by a power of how much the tasks that are worth their price ask
of it, relative to what it has.

Which order to fix is the other half. DPack picks α_j from each block alone, as if tasks asked for
that block only. Here the picks come from whole solutions: fill the round, look at which order each
block has used up least, fix those, price again. The search starts from one order for all blocks,
and from what simple policies use least, as long as there is work to spend. At last it shakes the
best prices: among tasks that are nearly as dear, chance decides which of them fit together. All
chance is from a fixed seed, and all limits are counts, so equal rounds have equal outcomes.

What holds: a round is never granted less weight than DPack (by either tie rule), DPF or greedy
area would grant it, and its bound is valid whatever orders blocks hold at (see `bounds`).
"""

import numpy as np
from numpy.typing import NDArray

from dpmoe_operator.scheduling import dpack, fcfs
from dpmoe_operator.scheduling.bounds import upper_bound
from dpmoe_operator.scheduling.compiled import compiled
from dpmoe_operator.scheduling.filling import filled, tasks_that_fit
from dpmoe_operator.scheduling.outcome import Prices, Ranking
from dpmoe_operator.scheduling.points import increments
from dpmoe_operator.scheduling.round import Floats, Ints, Round
from dpmoe_operator.scheduling.shares import largest_and_summed, parts_asked

_REPICKS = 3
"""How often orders are picked anew from one start."""

_FEWEST_STEPS, _MOST_STEPS = 45, 150
"""Of balancing prices from one start. Small rounds can afford most."""

_WORK = 30_000_000
"""About how many (task, block) pairs balancing may look at before it tries no other start."""

_SMALL = 300_000
"""Of (task, block) pairs. In larger rounds, trying one order for all blocks takes too long."""

_LOWEST = 1e-9
"""The price of a block that nobody competes for; above 0, so that it can rise again."""

_FIRST_POWER, _LATER_POWER, _LAST_POWER = 0.5, 0.15, 0.05
"""A price moves by a power of its block's usage that falls from step to step: from the first one,
or from the later one where prices are near their balance already, to the last one."""

_LEAST_USED, _MOST_USED = 0.25, 4.0
"""A usage beyond these moves a price no further."""

_SHAKES = 60
_NOISES = (0.02, 0.05, 0.1)
"""How much the logarithms of prices are shaken, in turn."""


def rank(round: Round, prices: Prices | None = None) -> Ranking:
    """Rank the tasks of a round.

    Args:
        round: The round.
        prices: Prices and picks of an earlier round, on this round's rows.
    """
    search = _Search(round)
    if not search.hopeful.any():
        return Ranking(fcfs.order(round), 0.0, prices)
    value, load = dpack.knapsacks(round)
    picks = dpack.best_orders(round, value, load)
    shares = largest_and_summed(round)
    simple = [
        search.try_order(order)[1]
        for order in (
            dpack.by_cost(round, dpack.only(round, picks)),
            dpack.by_cost(round, dpack.all_tied(value)),
            # DPF, but for the order of ties, and greedy area.
            *(np.lexsort((round.arrival, *increments(round, share))) for share in shares),
        )
    ]
    used = search.least_used(search.left)
    small = len(round.indices) <= _SMALL
    alike = _climb(search, int(np.bincount(used).argmax())) if small else []
    if prices is not None:
        search.try_prices(prices.price, search.usable(prices.pick), _LATER_POWER)
    for start in (*alike[:1], used, *alike[1:], picks, *map(search.least_used, simple)):
        search.try_prices(search.level, start, _FIRST_POWER)
    search.shake()
    assert search.prices is not None
    return Ranking(
        search.order, upper_bound(round, search.prices), search.prices, paid(round, search.prices)
    )


def paid(round: Round, prices: Prices) -> Floats:
    """float64[T]: what each task pays, p_i."""
    part = parts_asked(round, prices.pick)
    return np.add.reduceat(prices.price[round.indices] * part, round.indptr[:-1])


def _climb(search: "_Search", start: int) -> list[Ints]:
    """Try one order for all blocks, then the next larger or smaller one while that grants more.

    Args:
        search: What was tried so far.
        start: The place in `orders` of the first order.

    Returns:
        Picks, int64[B] each, of the orders that were tried, the best first.
    """
    round = search.round
    usable = np.flatnonzero((round.available >= 0).any(axis=0))
    place = min(int(np.searchsorted(usable, start)), len(usable) - 1)
    tried: dict[int, tuple[float, Ints]] = {}
    while True:
        for near in range(max(0, place - 1), min(len(usable), place + 2)):
            if near not in tried:
                picks = search.usable(np.full(round.blocks, usable[near]))
                order = dpack.by_cost(round, dpack.only(round, picks))
                tried[near] = search.try_order(order)[0], picks
        best_first = sorted(tried, key=lambda near: -tried[near][0])
        if best_first[0] == place:
            return [tried[near][1] for near in best_first]
        place = best_first[0]


class _Search:
    """The best order and the best prices that were tried so far."""

    def __init__(self, round: Round) -> None:
        self.round = round
        self.hopeful = tasks_that_fit(round, round.available)
        self.order = np.arange(round.tasks)
        self.left = round.available
        self.weight = 0.0
        self.prices: Prices | None = None
        self._weight_at_prices = -1.0
        self._tried: set[bytes] = set()
        self._work = 0

    @property
    def level(self) -> Floats:
        """float64[B]: the same price for every block, at which they'd cost what was granted."""
        return np.full(self.round.blocks, self.weight / self.round.blocks)

    def try_order(self, order: Ints) -> tuple[float, Ints]:
        """Fill in an order, and keep it if it grants more than any before.

        Returns:
            The granted weight; int64[B, A], what is left of the blocks.
        """
        granted, left = filled(self.round, order)
        weight = float(self.round.weight[granted].sum())
        if weight > self.weight:
            self.order, self.left, self.weight = order, left, weight
        return weight, left

    def try_prices(self, price: Floats, picks: Ints, power: float) -> None:
        """Balance prices, fill, pick orders anew from what was used, while that leads elsewhere.

        Does nothing once enough work was done, unless simple orders are still ahead of prices.
        """
        if self._work > _WORK and self._weight_at_prices >= self.weight:
            return
        steps = min(max(_WORK // len(self.round.indices), _FEWEST_STEPS), _MOST_STEPS)
        for _ in range(1 + _REPICKS):
            if picks.tobytes() in self._tried:
                return
            self._tried.add(picks.tobytes())
            price, order = self._balanced(price, picks, steps, power)
            weight, left = self.try_order(order)
            if weight > self._weight_at_prices:
                self.prices, self._weight_at_prices = Prices(price, picks), weight
            picks = self.least_used(left)
            power, steps = _LATER_POWER, max(steps // 3, _FEWEST_STEPS // 3)

    def least_used(self, left: Ints) -> Ints:
        """int64[B]: the order at which each block has the largest part of its budget left."""
        available = self.round.available
        part = np.divide(left, available, out=np.full(left.shape, -np.inf), where=available > 0)
        picks: Ints = part.argmax(axis=1)
        return picks

    def usable(self, picks: Ints) -> Ints:
        """int64[B]: the picks, but the least used order where a pick has nothing available."""
        open_ = self.round.available[np.arange(self.round.blocks), picks] > 0
        return np.where(open_, picks, self.least_used(self.left))

    def shake(self) -> None:
        """Try orders near that of the best prices: who is hardly dearer may fit better."""
        assert self.prices is not None
        part = parts_asked(self.round, self.prices.pick)
        random = np.random.default_rng(0)
        for i in range(min(_SHAKES, _WORK // len(part) - self._work // len(part))):
            noise = _NOISES[i % len(_NOISES)] * random.standard_normal(self.round.tasks)
            self.try_order(self._by_price(self.prices.price, part, np.exp(noise)))

    def _balanced(
        self, price: Floats, picks: Ints, steps: int, power: float
    ) -> tuple[Floats, Ints]:
        """Prices that balance the blocks at their picks, and the order that they lead to."""
        round = self.round
        part = parts_asked(round, picks)
        balanced = _balance(
            round.indptr,
            round.indices,
            part,
            round.weight,
            np.diff(round.job_of_task, append=round.jobs) > 0,
            self._holds(part),
            np.maximum(price, _LOWEST),
            steps,
            power,
        )
        self._work += steps * len(part)
        return balanced, self._by_price(balanced, part, np.ones(round.tasks))

    def _by_price(self, price: Floats, part: Floats, factor: Floats) -> Ints:
        """int64[T]: all tasks, by what they pay for their weight, times a factor each."""
        round = self.round
        paid = np.add.reduceat(price[round.indices] * part, round.indptr[:-1])
        holds = self._holds(part)
        key, late = increments(round, paid * factor, holds)
        # A task that breaks a pick may still fit at another order, but not before the others.
        return np.lexsort((round.arrival, key, late, ~holds, ~self.hopeful))

    def _holds(self, part: Floats) -> NDArray[np.bool_]:
        """bool[T]: who fits, and at the picks of all blocks."""
        fitting: NDArray[np.bool_] = np.logical_and.reduceat(part <= 1.0, self.round.indptr[:-1])
        return fitting & self.hopeful


@compiled
def _balance(
    indptr: Ints,
    indices: Ints,
    part: Floats,
    weight: Floats,
    last: NDArray[np.bool_],
    counts: NDArray[np.bool_],
    price: Floats,
    steps: int,
    first_power: float,
) -> Floats:
    """float64[B]: of the prices on the way from the given ones, those with the least dual value.

    `last` says which tasks are the last of their jobs: the best point of each job counts.
    """
    best, lowest = price.copy(), np.inf
    used = np.empty(len(price))
    for step in range(steps):
        used[:] = 0.0
        value = price.sum()
        most, point = 0.0, 0
        for task in range(len(weight)):
            if counts[task]:
                gain = weight[task]
                for pair in range(indptr[task], indptr[task + 1]):
                    gain -= price[indices[pair]] * part[pair]
                if gain > most:
                    most, point = gain, task
            if last[task] and most > 0.0:
                value += most
                for pair in range(indptr[point], indptr[point + 1]):
                    used[indices[pair]] += part[pair]
                most = 0.0
        if value < lowest:
            lowest = value
            best[:] = price
        power = first_power * (_LAST_POWER / first_power) ** (step / steps)
        for block in range(len(price)):
            price[block] *= min(max(used[block], _LEAST_USED), _MOST_USED) ** power
            price[block] = max(price[block], _LOWEST)
    return best
