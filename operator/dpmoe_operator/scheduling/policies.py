"""The policies by name. A policy is one module that ranks the tasks of a round, registered here.

A policy never decides whether something fits: its ranking is granted through `filling`, and the
operator re-verifies every round with `filling.check_grants` before it commits. Priorities, the
fairness share and foresight hold for all policies alike, so they are here and no policy knows of
them.

*Foresight*: a block that unlocks bit by bit never has enough for a large task if small ones take
each bit at once. When unlocks are known ahead, the policy shares out what will be there a while
from now. Who has a place in that plan and fits already is granted; who has none waits, although it
might fit now, since its budget is kept for tasks that are worth more. Once all is unlocked the plan
is the round, so nobody waits for ever.

Who will come before then is not known, but it is known that somebody will, so today's prices are
low. With a policy that has prices, a task is granted ahead of the last unlock only if it is worth
`_CLEARLY` times its price; else it keeps its place in the plan until somebody better comes, or all
of its budget is unlocked. Thresholds on prices that are learnt from what asked so far are how
online packing is done (Buchbinder and Naor 2009; for privacy budgets, HPBA, IEEE TSC 2024).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from dpmoe_operator.scheduling import area, dpack, dpf, dual, fcfs, optimal
from dpmoe_operator.scheduling.filling import fill
from dpmoe_operator.scheduling.outcome import Outcome, Prices, Ranking
from dpmoe_operator.scheduling.round import Floats, Ints, Round
from dpmoe_operator.scheduling.shares import fair_jobs

Rank = Callable[[Round, Prices | None], Ranking]

_CLEARLY = 2.0
"""How many times its price a task must be worth to be granted before all is unlocked. From 1.4 on,
weights that differ gain most of what there is to gain; the larger it is, the longer all wait."""


@dataclass(frozen=True)
class Policy:
    """How a round's budget is shared out.

    Attributes:
        name: Its name in settings, metrics and on the command line.
        rank: Ranks the tasks of a round whose priorities are all equal. It may start from the
            prices of an earlier round, laid out on this round's rows.
    """

    name: str
    rank: Rank

    @classmethod
    def of_order(cls, name: str, order: Callable[[Round], Ints]) -> "Policy":
        """A policy that only orders tasks: it bounds nothing and remembers nothing."""
        return cls(name, lambda round, _prices: Ranking(order(round)))

    def grant(
        self, round: Round, *, prices: Prices | None = None, fairness: float = 0.0
    ) -> Outcome:
        """Share out a round.

        Args:
            round: The round.
            prices: What the round before came to, laid out on this round's rows.
            fairness: In [0, 1], the share of each row's available budget that is granted in the
                order of DPF first; the policy ranks the others for all that is left then. At 0 the
                policy decides alone, at 1 DPF does.

        Raises:
            ValueError: `fairness` is not in [0, 1].
        """
        if not 0 <= fairness <= 1:
            raise ValueError(f"fairness: {fairness} must lie in [0, 1].")
        ahead = round.ahead
        ranking = self.rank(ahead, prices)
        order = ranking.order
        alone = fairness == 0 and len(np.unique(round.priority)) <= 1
        if not alone:
            order = self._by_priority(ahead, ranking.prices, fairness)
        granted = planned = fill(ahead, order)
        if round.soon is not None:
            now = order[np.isin(order, planned)]
            if alone and ranking.paid is not None:
                now = now[_is_settled(round, ranking.paid)[now]]
            granted = fill(round, now)
        fair = fair_jobs(round)
        return Outcome(
            granted=granted,
            planned=planned,
            order=order,
            weight=float(round.weight[granted].sum()),
            bound=ranking.bound,
            fair=int(fair.sum()),
            fair_granted=int(fair[round.job_of_task[granted]].sum()),
            prices=ranking.prices,
        )

    def warm_up(self) -> None:
        """Load or compile what the policy needs, so that the first jobs do not wait for it."""
        one, two = np.ones((1, 1), np.int64), np.array([0, 1], np.int64)
        only = Round(
            orders=np.array([2.0]),
            demand=one,
            indptr=two,
            indices=two[:1],
            capacity=one,
            consumed=0 * one,
            reserved=0 * one,
            unlocked=one,
            arrival=np.zeros(1),
            weight=np.ones(1),
            priority=two[:1],
        )
        self.grant(only)
        self.grant(replace(only, group=two[:1]))

    def order(self, round: Round) -> Ints:
        """int64[T]: all tasks of a round, the most deserving first."""
        return self.grant(round).order

    def _by_priority(self, round: Round, prices: Prices | None, fairness: float) -> Ints:
        """Rank the tasks of the highest priority, then the next on what those leave, and so on."""
        order = granted = np.zeros(0, np.int64)
        for priority in np.unique(round.priority)[::-1]:
            tasks = np.flatnonzero(round.priority == priority)
            rest = round.after(granted, tasks)
            ranked = self._fairly(rest, prices, fairness)
            order = np.concatenate([order, tasks[ranked]])
            granted = np.concatenate([granted, tasks[fill(rest, ranked)]])
        return order

    def _fairly(self, round: Round, prices: Prices | None, fairness: float) -> Ints:
        """Who fits into the reserved share in DPF's order, then the others as the policy ranks."""
        if fairness == 0:
            return self.rank(round, prices).order
        budget = np.where(round.available > 0, round.available * fairness, round.available)
        first = fill(round, dpf.order(round), budget.astype(np.int64))
        siblings = round.siblings(first)
        others = np.flatnonzero(~siblings)
        rest = round.after(first, others)
        # Better points of who is in come last: they may have what nobody else wanted.
        siblings[first] = False
        better = np.flatnonzero(siblings)
        return np.concatenate([first, others[self.rank(rest, prices).order], better])


def _is_settled(round: Round, paid: Floats) -> NDArray[np.bool_]:
    """bool[T]: who need not fear those that come later, by its price or as all is unlocked."""
    still_locked: NDArray[np.bool_] = np.any(round.ahead.unlocked > round.unlocked, axis=1)
    waits: NDArray[np.bool_] = np.logical_or.reduceat(
        still_locked[round.indices], round.indptr[:-1]
    )
    return ~waits | (_CLEARLY * paid <= round.weight)


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            Policy.of_order("area", area.order),
            Policy.of_order("dpack", dpack.order),
            Policy.of_order("dpf", dpf.order),
            Policy("dual", dual.rank),
            Policy.of_order("fcfs", fcfs.order),
            Policy("optimal", optimal.rank),
        )
    }
)


def policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ValueError: There is none; the message names those that exist.
    """
    if name not in POLICIES:
        raise ValueError(
            f"policy: {name!r} is unknown; choose one of {', '.join(sorted(POLICIES))}."
        )
    return POLICIES[name]
