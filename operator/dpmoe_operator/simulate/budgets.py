"""What each row of budget has unlocked, and what of it is left.

The amounts are those that `scheduling.unlocking` gives, as 64-bit integers. What is spent is
subtracted at every order, and stops at `ABSENT`, where nothing fits anyway.
"""

from fractions import Fraction

import numpy as np

from dpmoe_operator.privacy.units import MAX_UNITS
from dpmoe_operator.scheduling import unlocking
from dpmoe_operator.scheduling.compiled import compiled
from dpmoe_operator.scheduling.round import ABSENT, Ints
from dpmoe_operator.simulate.rules import Unlock
from dpmoe_operator.simulate.workload import Workload

_NOTHING = np.zeros(0, dtype=np.int64)


class Budgets:
    """The rows of a workload over time.

    Attributes:
        unlocked: int64[B, A], released so far; as in `Round`.
        available: int64[B, A], of that, what nobody holds; may be negative.
        soon: int64[B, A], what will be released within the foresight; `unlocked` without one.
    """

    def __init__(
        self, workload: Workload, unlock: Unlock, *, foresight: float = 0.0, end: float = 0.0
    ) -> None:
        capacity = workload.capacity
        self._workload, self._unlock = workload, unlock
        at_once = workload.is_cap | (unlock.fair_shares is None and unlock.lifetime is None)
        self.unlocked: Ints = np.where(at_once[:, None], capacity, np.minimum(capacity, 0))
        self.available: Ints = self.unlocked.copy()
        self._foresight, self._end = foresight, end
        self.soon: Ints = self.unlocked.copy() if foresight > 0 else self.unlocked
        self._arrivals = np.zeros(len(capacity), dtype=np.int64)
        if unlock.fair_shares is not None:
            self._arrivals[at_once] = unlock.fair_shares
        # Rows that time still unlocks, the first to open first.
        locked = np.flatnonzero(~at_once) if unlock.lifetime is not None else _NOTHING
        self._locked: list[int] = locked[np.argsort(workload.opened[locked])].tolist()
        self._released: dict[int, Fraction] = {}

    @property
    def ahead(self) -> Ints:
        """int64[B, A]: of `soon`, what nobody holds."""
        if self._foresight == 0:
            return self.available
        return self.available + (self.soon - self.unlocked)

    def spent(self, rows: Ints) -> Ints:
        """int64[n, A]: what is held of some rows, saturated."""
        spent: Ints = np.minimum(self.unlocked[rows] - self.available[rows], MAX_UNITS)
        return spent

    def spend(self, tasks: Ints) -> None:
        """Subtract what tasks ask for."""
        w = self._workload
        _subtract(w.indptr, w.indices, w.demand, tasks, self.available)

    def release(self, now: float, first: int, last: int) -> Ints:
        """Unlock what is due when tasks first … last−1 arrive at `now`; the rows that gained."""
        if self._unlock.fair_shares is not None:
            return self._arrive(first, last)
        return self._elapse(now) if self._locked else _NOTHING

    def _arrive(self, first: int, last: int) -> Ints:
        w = self._workload
        assert self._unlock.fair_shares is not None
        return _release_shares(
            self._asked(first, last),
            self._unlock.fair_shares,
            w.capacity,
            self._arrivals,
            self.unlocked,
            self.available,
        )

    def _asked(self, first: int, last: int) -> Ints:
        """The rows that arriving tasks ask for; a row once for an elastic job."""
        w = self._workload
        pairs = slice(w.indptr[first], w.indptr[last])
        if w.group is None:
            return w.indices[pairs]
        rows = len(w.capacity)
        job = w.group[w.whole.task_of_pair[pairs]]
        asked: Ints = np.unique(job * rows + w.indices[pairs]) % rows
        return asked

    def _elapse(self, now: float) -> Ints:
        gained = []
        for row in list(self._locked):
            if self._workload.opened[row] > now:
                break
            released = self._fraction(row, now)
            capacity = self._workload.capacity[row]
            if self._foresight > 0:
                later = max(now, min(now + self._foresight, self._end))
                soon = unlocking.unlocked(capacity, self._fraction(row, later))
                if (soon > self.soon[row]).any():
                    self.soon[row] = soon
                    gained.append(row)
            if released > self._released.get(row, 0):
                self._released[row] = released
                unlocked = unlocking.unlocked(capacity, released)
                self.available[row] += unlocked - self.unlocked[row]
                self.unlocked[row] = unlocked
                if self._foresight == 0:
                    gained.append(row)
            if released == 1:
                self._locked.remove(row)
        return np.array(gained, dtype=np.int64)

    def _fraction(self, row: int, now: float) -> Fraction:
        """The released part of a row that time unlocks."""
        assert self._unlock.lifetime is not None
        opened = float(self._workload.opened[row])
        rule = unlocking.ByTime(opened, self._unlock.lifetime, self._unlock.steps)
        return unlocking.fraction(rule, now)


@compiled
def _release_shares(
    asked: Ints, shares: int, capacity: Ints, arrivals: Ints, unlocked: Ints, available: Ints
) -> Ints:
    """One fair share c/N of each asked row, while it has any; the rows that gained.

    With q, r = divmod(c, N), the floor of c·k/N is q·k + floor(r·k/N), which doesn't overflow.
    """
    gained = np.empty(len(asked), dtype=np.int64)
    count = 0
    for row in asked:
        if arrivals[row] == shares:
            continue
        arrivals[row] += 1
        gained[count] = row
        count += 1
        for order in range(capacity.shape[1]):
            total = capacity[row, order]
            if total > 0:
                part = total // shares * arrivals[row] + total % shares * arrivals[row] // shares
                available[row, order] += part - unlocked[row, order]
                unlocked[row, order] = part
    return gained[:count].copy()


@compiled
def _subtract(indptr: Ints, indices: Ints, demand: Ints, tasks: Ints, available: Ints) -> None:
    for task in tasks:
        for pair in range(indptr[task], indptr[task + 1]):
            for order in range(demand.shape[1]):
                rest = available[indices[pair], order] - demand[task, order]
                available[indices[pair], order] = max(rest, ABSENT)
