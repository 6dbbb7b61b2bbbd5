"""Playing a workload through a policy, round by round.

A round holds the tasks that wait and what every block has unlocked and not yet granted, as the
operator's does. What keeps millions of them cheap:

- Tasks that don't fit before a round can't be granted in it, and are left out of it. With
  foresight, those that won't fit soon either. DPack's artifact looks at them, too, when it picks
  orders; `whole_queue` is for replaying that.
- A task that fits alone is granted: no policy refuses what fits when it has granted the rest.
- The orders of FCFS, DPF and greedy area don't depend on who else waits. Such a policy is asked
  once, about all tasks, and then rounds are filled in that order.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpmoe_operator.scheduling.filling import fill
from dpmoe_operator.scheduling.outcome import Prices
from dpmoe_operator.scheduling.policies import Policy
from dpmoe_operator.scheduling.round import Floats, Ints, Round
from dpmoe_operator.simulate.budgets import Budgets
from dpmoe_operator.simulate.rules import Rules
from dpmoe_operator.simulate.waiting import Queue, Waiting
from dpmoe_operator.simulate.workload import Workload

FIXED_ORDER = frozenset({"area", "dpf", "fcfs"})
"""Policies that compare two tasks without looking at any other."""

Pick = Callable[[Ints, Budgets], Ints]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Played:
    """What became of a workload.

    Attributes:
        workload: What was played.
        rules: By which rules.
        policy: By which policy.
        granted_at: float64[T], when a task got budget; NaN if never. Of an elastic job, only the
            point that was granted has a time.
        unlocked: int64[B, A], at the end.
        spent: int64[B, A], at the end.
        rounds: How many rounds there were.
        seconds: How long all of it took.
        decided: How much of that the policy took.
    """

    workload: Workload
    rules: Rules
    policy: str
    granted_at: Floats
    unlocked: Ints
    spent: Ints
    rounds: int
    seconds: float
    decided: float

    @property
    def granted_jobs(self) -> NDArray[np.bool_]:
        """bool[J]: which jobs got budget, at whichever of their points."""
        served = np.zeros(self.workload.jobs, dtype=bool)
        served[self.workload.whole.job_of_task[self.granted]] = True
        return served

    @property
    def granted(self) -> NDArray[np.bool_]:
        """bool[T]: who got budget."""
        return ~np.isnan(self.granted_at)


def play(
    workload: Workload,
    policy: Policy,
    rules: Rules,
    *,
    fairness: float = 0.0,
    whole_queue: bool = False,
    progress: Progress | None = None,
) -> Played:
    """Play a workload.

    Args:
        workload: Blocks and tasks.
        policy: Who gets budget.
        rules: When rounds happen, and how budget unlocks.
        fairness: In [0, 1], as in `Policy.grant`.
        whole_queue: Whether rounds hold all who wait, even those who can't be granted in them.
        progress: Called after every round with how many of how many tasks have arrived.

    Raises:
        ValueError: `fairness` is not in [0, 1].
    """
    policy.warm_up()
    begin = time.perf_counter()
    rounds_at = list(_rounds(workload.arrival, rules))
    end = rounds_at[-1][0] if rounds_at else 0.0
    budgets = Budgets(workload, rules.unlock, foresight=rules.foresight, end=end)
    waiting = Queue() if whole_queue else Waiting(workload)
    looks_ahead = rules.foresight > 0
    if policy.name in FIXED_ORDER and fairness == 0 and not looks_ahead:
        pick = _in_fixed_order(workload, policy)
    else:
        pick = _Asking(workload, policy, rules, fairness)
    decided = time.perf_counter() - begin
    granted_at = np.full(workload.tasks, np.nan)
    hurried = bool(np.isfinite(workload.timeout).any())
    job, served = workload.whole.job_of_task, np.zeros(workload.jobs, dtype=bool)
    everyone, lingering = np.arange(workload.tasks), np.zeros(0, dtype=np.int64)
    arrived, rounds = 0, 0
    for now, seen in rounds_at:
        gained = budgets.release(now, arrived, seen)
        woken = waiting.wake(gained, budgets.ahead)
        candidates = everyone[arrived:seen]
        if len(woken) or len(lingering):
            candidates = np.concatenate((lingering, woken, candidates))
        if workload.group is not None:
            candidates = candidates[~served[job[candidates]]]
        if hurried:
            waited = now - workload.arrival[candidates]
            candidates = candidates[waited <= workload.timeout[candidates]]
        lingering = ready = waiting.settle(candidates, budgets.ahead)
        if len(ready):
            asked = time.perf_counter()
            alone = len(ready) == 1 and not looks_ahead and not whole_queue
            chosen = ready if alone else pick(ready, budgets)
            decided += time.perf_counter() - asked
            budgets.spend(chosen)
            granted_at[chosen] = now
            served[job[chosen]] = True
            refused = ready[~served[job[ready]]]
            lingering = waiting.settle(refused, budgets.ahead)
        arrived, rounds = seen, rounds + 1
        if progress is not None:
            progress(arrived, workload.tasks)
    return Played(
        workload=workload,
        rules=rules,
        policy=policy.name,
        granted_at=granted_at,
        unlocked=budgets.unlocked,
        spent=budgets.spent(np.arange(len(workload.capacity))),
        rounds=rounds,
        seconds=time.perf_counter() - begin,
        decided=decided,
    )


def _rounds(arrival: Floats, rules: Rules) -> Iterator[tuple[float, int]]:
    """When rounds happen, and how many tasks have arrived until then."""
    last = float(arrival[-1]) if len(arrival) else 0.0
    times: Floats
    if rules.period is None:
        until = last if rules.until is None else rules.until
        times = np.unique(arrival[arrival <= until])
        if rules.until is not None:
            times = np.union1d(times, [rules.until])
    else:
        enough = max(1, math.ceil(last / rules.period))
        count = enough if rules.until is None else int(rules.until // rules.period)
        times = np.arange(1.0, count + 1) * rules.period
    seen = np.searchsorted(arrival, times, side="right")
    yield from zip(times.tolist(), seen.tolist(), strict=True)


def _in_fixed_order(workload: Workload, policy: Policy) -> Pick:
    """Fill in the policy's order of all tasks."""
    rank = np.empty(workload.tasks, dtype=np.int64)
    rank[policy.order(workload.whole)] = np.arange(workload.tasks)

    def pick(ready: Ints, budgets: Budgets) -> Ints:
        return fill(workload.whole, ready[np.argsort(rank[ready])], budgets.available)

    return pick


class _Asking:
    """Ask the policy about the ready tasks and their rows; remember its prices for the next time.

    A row without a price starts from the mean of those that have one, and from their commonest
    order.
    """

    def __init__(self, workload: Workload, policy: Policy, rules: Rules, fairness: float) -> None:
        self._workload, self._policy = workload, policy
        self._rules, self._fairness = rules, fairness
        self._price = np.full(len(workload.capacity), np.nan)
        self._pick = np.zeros(len(workload.capacity), dtype=np.int64)

    def __call__(self, ready: Ints, budgets: Budgets) -> Ints:
        tasks = np.sort(ready)
        pairs = self._workload.whole.pairs_of(tasks)
        rows, indices = np.unique(self._workload.indices[pairs], return_inverse=True)
        round = self._round(tasks, rows, indices.astype(np.int64), budgets)
        outcome = self._policy.grant(round, prices=self._known(rows), fairness=self._fairness)
        if outcome.prices is not None:
            self._price[rows], self._pick[rows] = outcome.prices.price, outcome.prices.pick
        return tasks[outcome.granted]

    def _known(self, rows: Ints) -> Prices | None:
        known = ~np.isnan(self._price)
        if not known.any():
            return None
        usual = np.bincount(self._pick[known]).argmax()
        return Prices(
            np.where(known, self._price, self._price[known].mean())[rows],
            np.where(known, self._pick, usual)[rows],
        )

    def _round(self, tasks: Ints, rows: Ints, indices: Ints, budgets: Budgets) -> Round:
        w = self._workload
        shares = None
        if self._rules.unlock.fair_shares is not None:
            shares = np.full(len(rows), self._rules.unlock.fair_shares, dtype=np.int64)
        return Round(
            orders=w.orders,
            demand=w.demand[tasks],
            indptr=np.append(0, np.cumsum(np.diff(w.indptr)[tasks])),
            indices=indices,
            capacity=w.capacity[rows],
            consumed=budgets.spent(rows),
            reserved=np.zeros((len(rows), len(w.orders)), dtype=np.int64),
            unlocked=budgets.unlocked[rows],
            arrival=w.arrival[tasks],
            weight=w.weight[tasks],
            priority=w.priority[tasks],
            fair_shares=shares,
            group=None if w.group is None else w.group[tasks],
            soon=budgets.soon[rows] if self._rules.foresight > 0 else None,
        )
