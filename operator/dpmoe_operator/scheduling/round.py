"""One scheduling round as arrays: what tasks ask for, and what blocks have left.

Every policy reads a `Round` and nothing else, so a round can be replayed, simulated and tested
without a cluster. Amounts are integers in 10⁻⁹ ε and are compared as integers. Shapes below:

- T: waiting tasks. A task is a job, or one point of an elastic job, which offers several and is
  granted at most one of them
- B: rows of budget. A row is a block, or a namespace's cap on a block: a task that is under a cap
  asks for both rows, and nothing else distinguishes them.
- A: Rényi orders, the union over all blocks
- nnz: (task, block) pairs
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dpmoe_operator.privacy.units import MAX_UNITS

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

ABSENT = -(2**60)
"""Capacity at an order that a block doesn't track. So negative that nothing ever fits there, and
far enough from −2⁶³ that subtracting saturated amounts doesn't overflow."""

_MAX_PRIORITY = 2**53


@dataclass(frozen=True, eq=False)
class Round:
    """The waiting tasks and the budget rows of one round.

    Attributes:
        orders: float64[A], Rényi orders, strictly increasing, above 1.
        demand: int64[T, A], what a task asks of *each* of its blocks; 0 to `MAX_UNITS`.
        indptr: int64[T+1]; task t asks for the blocks `indices[indptr[t]:indptr[t+1]]`, at least
            one, each once (compressed sparse rows).
        indices: int64[nnz], block rows.
        capacity: int64[B, A], initial capacity, below `MAX_UNITS`; may be negative; `ABSENT` at
            orders that a block lacks.
        consumed: int64[B, A], spent for ever; 0 to `MAX_UNITS`.
        reserved: int64[B, A], held for running jobs; 0 to `MAX_UNITS`.
        unlocked: int64[B, A], the part of a positive capacity that unlocking has released so far;
            equal to the capacity where that is not positive.
        arrival: float64[T], seconds.
        weight: float64[T], > 0; a task of weight 2 counts as two.
        priority: int64[T]; higher goes first, before everything else.
        fair_shares: int64[B], the N of each row whose fair share is c/N; 0 where nobody said, and
            None if that holds for all: then N is the number of jobs that wait for the row.
        soon: int64[B, A], what will be unlocked a while from now, at least `unlocked`: for whom it
            is kept is decided now (see `policies`). None to look no further than now.
        group: int64[T], not decreasing: tasks of one number are the points of one elastic job, with
            one arrival and one priority, and weights that say what each is worth. None if every
            task is a job of its own.

    Raises:
        ValueError: A shape, type or range is not as above.
    """

    orders: Floats
    demand: Ints
    indptr: Ints
    indices: Ints
    capacity: Ints
    consumed: Ints
    reserved: Ints
    unlocked: Ints
    arrival: Floats
    weight: Floats
    priority: Ints
    fair_shares: Ints | None = None
    group: Ints | None = None
    soon: Ints | None = None

    def __post_init__(self) -> None:
        self._check_shapes()
        self._check_values()
        self._check_pairs()
        self._check_groups()

    @property
    def tasks(self) -> int:
        """T."""
        return len(self.demand)

    @property
    def blocks(self) -> int:
        """B."""
        return len(self.capacity)

    @cached_property
    def job_of_task(self) -> Ints:
        """int64[T]: the number of each task's job, from 0 on without a gap."""
        if self.group is None:
            return np.arange(self.tasks, dtype=np.int64)
        return np.cumsum(np.append(0, np.diff(self.group) > 0))[: self.tasks].astype(np.int64)

    @property
    def jobs(self) -> int:
        """How many jobs the tasks belong to: T, unless some are elastic."""
        return int(self.job_of_task[-1]) + 1 if self.tasks else 0

    def siblings(self, tasks: Ints) -> NDArray[np.bool_]:
        """bool[T]: who belongs to the job of one of `tasks`, those themselves included."""
        chosen = np.zeros(self.jobs, dtype=bool)
        chosen[self.job_of_task[tasks]] = True
        return chosen[self.job_of_task]

    @cached_property
    def available(self) -> Ints:
        """int64[B, A]: what can be granted now; negative where an order is overdrawn."""
        return self.unlocked - self.reserved - self.consumed

    @property
    def ahead(self) -> "Round":
        """The round as it would be if all that unlocks soon were unlocked now."""
        return self if self.soon is None else replace(self, unlocked=self.soon, soon=None)

    @cached_property
    def task_of_pair(self) -> Ints:
        """int64[nnz]: the task of each (task, block) pair, as `indices` is its block."""
        return np.repeat(np.arange(self.tasks, dtype=np.int64), np.diff(self.indptr))

    def blocks_of(self, task: int) -> Ints:
        """The block rows that a task asks for."""
        return self.indices[self.indptr[task] : self.indptr[task + 1]]

    def after(self, granted: Ints, tasks: Ints) -> "Round":
        """The round that is left: `granted` hold their demand, and only `tasks` still wait.

        No job may be in both, and `tasks` must be in the order of the round where it has groups.
        What is held saturates at `MAX_UNITS`, above every capacity: nothing fits there either way.
        """
        held = np.zeros(self.capacity.shape, dtype=np.int64)
        pairs = self.pairs_of(granted)
        for order in range(len(self.orders)):
            # A float64 counts exactly to 2⁵³, above MAX_UNITS, and beyond that stays above it.
            asked = self.demand[self.task_of_pair[pairs], order].astype(np.float64)
            total = np.bincount(self.indices[pairs], weights=asked, minlength=self.blocks)
            held[:, order] = np.minimum(total, MAX_UNITS).astype(np.int64)
        kept = self.pairs_of(tasks)
        return replace(
            self,
            demand=self.demand[tasks],
            indptr=np.append(0, np.cumsum(np.diff(self.indptr)[tasks])),
            indices=self.indices[kept],
            reserved=np.minimum(self.reserved + held, MAX_UNITS),
            arrival=self.arrival[tasks],
            weight=self.weight[tasks],
            priority=self.priority[tasks],
            group=None if self.group is None else self.group[tasks],
        )

    def pairs_of(self, tasks: Ints) -> Ints:
        """The places in `indices` of all pairs of some tasks, task by task in the given order."""
        starts, counts = self.indptr[tasks], np.diff(self.indptr)[tasks]
        before = np.cumsum(counts) - counts
        return np.repeat(starts - before, counts) + np.arange(counts.sum(), dtype=np.int64)

    def _check_shapes(self) -> None:
        tasks, blocks, orders = len(self.arrival), len(self.capacity), len(self.orders)
        shapes = {
            "orders": (np.float64, (orders,)),
            "demand": (np.int64, (tasks, orders)),
            "indptr": (np.int64, (tasks + 1,)),
            "indices": (np.int64, (len(self.indices),)),
            "capacity": (np.int64, (blocks, orders)),
            "consumed": (np.int64, (blocks, orders)),
            "reserved": (np.int64, (blocks, orders)),
            "unlocked": (np.int64, (blocks, orders)),
            "arrival": (np.float64, (tasks,)),
            "weight": (np.float64, (tasks,)),
            "priority": (np.int64, (tasks,)),
            "fair_shares": (np.int64, (blocks,)),
            "group": (np.int64, (tasks,)),
            "soon": (np.int64, (blocks, orders)),
        }
        for name, (dtype, shape) in shapes.items():
            array = getattr(self, name)
            if array is None and name in ("fair_shares", "group", "soon"):
                continue
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(
                    f"{name}: {array.dtype}{list(array.shape)} must be "
                    f"{np.dtype(dtype)}{list(shape)}."
                )

    def _check_values(self) -> None:
        orders, absent = self.orders, self.capacity == ABSENT
        _require(len(orders) > 0 and bool(np.isfinite(orders).all()), "orders: must be finite")
        _require(orders[0] > 1 and _all(np.diff(orders) > 0), "orders: must increase, above 1")
        for name in ("demand", "consumed", "reserved"):
            amounts = getattr(self, name)
            _require(
                _all((amounts >= 0) & (amounts <= MAX_UNITS)),
                f"{name}: must lie in [0, {MAX_UNITS}]",
            )
        _require(
            _all(absent | (abs(self.capacity) < MAX_UNITS) | (self.capacity == -MAX_UNITS)),
            f"capacity: must lie in [-{MAX_UNITS}, {MAX_UNITS}), or be ABSENT",
        )
        _require(_all((~absent).any(axis=1)), "capacity: every block must track at least one order")
        _require(
            _all(
                (self.unlocked >= np.minimum(self.capacity, 0)) & (self.unlocked <= self.capacity)
            ),
            "unlocked: must lie between 0 and a positive capacity, or equal a negative one",
        )
        if self.soon is not None:
            _require(
                _all((self.soon >= self.unlocked) & (self.soon <= self.capacity)),
                "soon: must lie between what is unlocked and the capacity",
            )
        _require(_all(np.isfinite(self.arrival)), "arrival: must be finite")
        _require(_all(np.isfinite(self.weight) & (self.weight > 0)), "weight: must be above 0")
        if self.fair_shares is not None:
            _require(_all(self.fair_shares >= 0), "fair_shares: must be at least 0")
        _require(
            _all((self.priority >= -_MAX_PRIORITY) & (self.priority <= _MAX_PRIORITY)),
            f"priority: must lie within ±{_MAX_PRIORITY}",
        )

    def _check_pairs(self) -> None:
        indptr, indices = self.indptr, self.indices
        _require(
            indptr[0] == 0 and indptr[-1] == len(indices) and _all(np.diff(indptr) >= 1),
            "indptr: must rise from 0 to len(indices), every task with at least one block",
        )
        _require(
            _all((indices >= 0) & (indices < self.blocks)),
            f"indices: block rows must lie in [0, {self.blocks})",
        )
        pairs = self.task_of_pair * self.blocks + indices
        rising = _all(np.diff(pairs) > 0)  # Usual, and far cheaper to see than uniqueness.
        _require(
            rising or len(np.unique(pairs)) == len(pairs), "indices: a task asks for a block twice"
        )

    def _check_groups(self) -> None:
        if self.group is None:
            return
        steps = np.diff(self.group)
        _require(_all(steps >= 0), "group: must not decrease")
        for name in ("arrival", "priority"):
            changes = np.diff(getattr(self, name)) != 0
            _require(not (changes & (steps == 0)).any(), f"{name}: must be one within a group")


def _all(condition: NDArray[np.bool_]) -> bool:
    return bool(condition.all())


def _require(holds: bool, requirement: str) -> None:
    if not holds:
        raise ValueError(f"{requirement}.")
