"""Who may fit after a round's unlocking, without looking at everyone who waits.

A waiting task doesn't fit at least one of its rows. It *watches* one such row, as a clause of a
SAT solver watches a literal (Moskewicz et al., "Chaff", DAC 2001), and is looked at again only
when that row gained budget and it would fit there. Each row also keeps, for every order, a lower
bound of what its watchers ask, so a gain that helps none of them costs nothing a watcher.
"""

import numpy as np

from dpmoe_operator.scheduling.compiled import compiled
from dpmoe_operator.scheduling.round import Ints
from dpmoe_operator.simulate.workload import Workload

_NOBODY = -1
_UNREACHABLE = np.iinfo(np.int64).max


class Waiting:
    """The tasks that wait, each in the list of the row that it watches."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._first = np.full(len(workload.capacity), _NOBODY, dtype=np.int64)
        self._next = np.full(workload.tasks, _NOBODY, dtype=np.int64)
        self._least = np.full(workload.capacity.shape, _UNREACHABLE)

    def wake(self, rows: Ints, available: Ints) -> Ints:
        """The watchers of some rows that now fit there; they stop watching.

        Args:
            rows: Rows that gained budget.
            available: int64[B, A], what every row has left.
        """
        return _wake(rows, available, self._workload.demand, self._first, self._next, self._least)

    def settle(self, tasks: Ints, available: Ints) -> Ints:
        """Sort tasks out: those that fit all their rows are returned, the others watch one."""
        w = self._workload
        return _settle(
            tasks, available, w.indptr, w.indices, w.demand, self._first, self._next, self._least
        )


class Queue:
    """As `Waiting`, but everybody who waits is looked at in every round."""

    def wake(self, _rows: Ints, _available: Ints) -> Ints:
        """Nobody sleeps."""
        return np.zeros(0, dtype=np.int64)

    def settle(self, tasks: Ints, _available: Ints) -> Ints:
        """All of them, whether they fit or not."""
        return tasks


@compiled
def _wake(
    rows: Ints, available: Ints, demand: Ints, first: Ints, following: Ints, least: Ints
) -> Ints:
    woken = np.empty(64, dtype=np.int64)
    count = 0
    for row in rows:
        promising = False
        for order in range(demand.shape[1]):
            if least[row, order] <= available[row, order]:
                promising = True
                break
        if not promising:
            continue
        least[row, :] = _UNREACHABLE
        task = first[row]
        first[row] = _NOBODY
        while task != _NOBODY:
            after = following[task]
            fits = False
            for order in range(demand.shape[1]):
                if demand[task, order] <= available[row, order]:
                    fits = True
                    break
            if fits:
                if count == len(woken):
                    larger = np.empty(2 * count, dtype=np.int64)
                    larger[:count] = woken
                    woken = larger
                woken[count] = task
                count += 1
            else:
                following[task] = first[row]
                first[row] = task
                for order in range(demand.shape[1]):
                    least[row, order] = min(least[row, order], demand[task, order])
            task = after
    return woken[:count].copy()


@compiled
def _settle(
    tasks: Ints,
    available: Ints,
    indptr: Ints,
    indices: Ints,
    demand: Ints,
    first: Ints,
    following: Ints,
    least: Ints,
) -> Ints:
    ready = np.empty(len(tasks), dtype=np.int64)
    count = 0
    for task in tasks:
        lacking = _NOBODY
        for pair in range(indptr[task], indptr[task + 1]):
            fits = False
            for order in range(demand.shape[1]):
                if demand[task, order] <= available[indices[pair], order]:
                    fits = True
                    break
            if not fits:
                lacking = indices[pair]
                break
        if lacking == _NOBODY:
            ready[count] = task
            count += 1
        else:
            following[task] = first[lacking]
            first[lacking] = task
            for order in range(demand.shape[1]):
                least[lacking, order] = min(least[lacking, order], demand[task, order])
    return ready[:count].copy()
