"""A workload as arrays: blocks that arrive over time, and tasks that ask for them.

Which blocks a task asks for doesn't depend on who was granted before, so generators resolve "the
latest 10" or "any 3" when they make the workload, and every policy sees the same tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dpmoe_operator.scheduling.round import Floats, Ints, Round

NEVER = np.inf
"""A timeout that is never over."""


@dataclass(frozen=True, eq=False)
class Workload:
    """Blocks and tasks, each sorted by when they arrive.

    Shapes: T tasks, B rows of budget, A Rényi orders, nnz (task, row) pairs. A row is a block, or a
    namespace's cap on one, as in `Round`.

    Attributes:
        name: What tables and plots call it.
        orders: float64[A], Rényi orders.
        capacity: int64[B, A], initial capacity in 10⁻⁹ ε.
        opened: float64[B], seconds at which a row's budget begins to unlock.
        is_cap: bool[B], whether a row is a cap, which is open from the start.
        demand: int64[T, A], what a task asks of each of its rows.
        indptr: int64[T+1], compressed sparse rows, as in `Round`.
        indices: int64[nnz], rows.
        arrival: float64[T], seconds, not decreasing.
        weight: float64[T], > 0.
        priority: int64[T], higher first.
        timeout: float64[T], seconds after which a waiting task leaves; `NEVER` allowed.
        group: int64[T], the jobs whose points tasks are, as in `Round`; None if none is elastic.

    Raises:
        ValueError: A task arrives before a block that it asks for, arrivals decrease, or the
            arrays are no valid `Round`.
    """

    name: str
    orders: Floats
    capacity: Ints
    opened: Floats
    is_cap: NDArray[np.bool_]
    demand: Ints
    indptr: Ints
    indices: Ints
    arrival: Floats
    weight: Floats
    priority: Ints
    timeout: Floats
    group: Ints | None = None

    def __post_init__(self) -> None:
        everything = self.whole  # Checks shapes and values, as every round would.
        if (np.diff(self.arrival) < 0).any():
            raise ValueError("arrival: tasks must be sorted by arrival.")
        if not (self.timeout > 0).all():
            raise ValueError("timeout: must be above 0.")
        early = np.flatnonzero(self.opened[self.indices] > self.arrival[everything.task_of_pair])
        if len(early):
            task = everything.task_of_pair[early[0]]
            raise ValueError(
                f"tasks: the task that arrives at {self.arrival[task]:g} asks for a block that"
                f" opens at {self.opened[self.indices[early[0]]]:g}; let it ask for earlier blocks."
            )

    @property
    def tasks(self) -> int:
        """T."""
        return len(self.arrival)

    @property
    def jobs(self) -> int:
        """How many jobs the tasks belong to: T, unless some are elastic."""
        return self.whole.jobs

    @property
    def blocks(self) -> int:
        """Rows that are blocks."""
        return len(self.capacity) - int(self.is_cap.sum())

    @cached_property
    def whole(self) -> Round:
        """All tasks and rows as one round with the whole budget unlocked: the offline problem."""
        nothing = np.zeros_like(self.capacity)
        return Round(
            orders=self.orders,
            demand=self.demand,
            indptr=self.indptr,
            indices=self.indices,
            capacity=self.capacity,
            consumed=nothing,
            reserved=nothing,
            unlocked=self.capacity,
            arrival=self.arrival,
            weight=self.weight,
            priority=self.priority,
            group=self.group,
        )


def make_workload(
    name: str,
    *,
    orders: Floats,
    capacity: Ints,
    opened: Floats,
    demand: Ints,
    asked: Sequence[Ints],
    arrival: Floats,
    weight: Floats | None = None,
    priority: Ints | None = None,
    timeout: Floats | None = None,
    is_cap: NDArray[np.bool_] | None = None,
    group: Ints | None = None,
) -> Workload:
    """A workload from tasks in any order; what is left out is 1, 0, never, no cap, and no group.

    Args:
        name: As in `Workload`, like all that isn't named here.
        orders: float64[A].
        capacity: int64[B, A].
        opened: float64[B].
        demand: int64[T, A].
        asked: For each task, the rows that it asks for.
        arrival: float64[T].
        weight: float64[T].
        priority: int64[T].
        timeout: float64[T].
        is_cap: bool[B].
        group: int64[T]; the tasks of one group arrive together and follow each other.
    """
    tasks = len(arrival)
    first = np.argsort(arrival, kind="stable")
    rows = [asked[task] for task in first.tolist()]
    return Workload(
        name=name,
        orders=orders,
        capacity=capacity,
        opened=opened,
        is_cap=np.zeros(len(capacity), dtype=bool) if is_cap is None else is_cap,
        demand=np.ascontiguousarray(demand[first]),
        indptr=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        indices=np.concatenate([np.zeros(0, np.int64), *rows]).astype(np.int64),
        arrival=arrival[first],
        weight=np.ones(tasks) if weight is None else weight[first],
        priority=np.zeros(tasks, dtype=np.int64) if priority is None else priority[first],
        timeout=np.full(tasks, NEVER) if timeout is None else timeout[first],
        group=None if group is None else _numbered(group[first]),
    )


def _numbered(group: Ints) -> Ints:
    """The same groups, numbered in the order in which they come."""
    return np.cumsum(np.append(0, np.diff(group) != 0)).astype(np.int64)
