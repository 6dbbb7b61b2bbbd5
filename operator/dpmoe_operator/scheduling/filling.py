"""Granting in a given order, and the filter that no grant may break.

The filter of a block (Rogers et al. 2016; Lécuyer 2021; PrivateKube's CANRUN, Luo et al., OSDI
2021, Algorithm 3): the sum of everything granted stays within capacity at *some* order. Each block
may hold at another order, and the others may go negative. All of it is integer arithmetic.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from dpmoe_operator.scheduling.round import ABSENT, Ints, Round


def fits(demand: Ints, available: Ints) -> bool:
    """Whether on every block some order has room.

    Args:
        demand: int64[A], what a task asks of each block.
        available: int64[n, A], what its n blocks have left.
    """
    return bool((demand <= available).any(axis=1).all())


def pairs_that_fit(round: Round, budget: Ints) -> NDArray[np.bool_]:
    """bool[nnz]: for each (task, block) pair, whether some order of `budget` has room.

    Args:
        round: The round.
        budget: int64[B, A], what each block has left.
    """
    fitting = np.zeros(len(round.indices), dtype=bool)
    for order in range(len(round.orders)):  # One order at a time keeps memory at O(nnz).
        asked = round.demand[round.task_of_pair, order]
        fitting |= asked <= budget[round.indices, order]
    return fitting


def tasks_that_fit(round: Round, budget: Ints) -> NDArray[np.bool_]:
    """bool[T]: for each task, whether every one of its blocks has room in `budget`."""
    if round.tasks == 0:
        return np.zeros(0, dtype=bool)
    return np.logical_and.reduceat(pairs_that_fit(round, budget), round.indptr[:-1])


def fill(round: Round, order: Ints) -> Ints:
    """Grant tasks in the given order, each wholly or not at all.

    Best effort: a task that doesn't fit doesn't hold up those behind it. What remains fits none
    of the tasks in `order` that were not granted, since budget only shrinks meanwhile.

    Args:
        round: The round.
        order: int64[≤ T], tasks, the first to be tried first.

    Returns:
        int64[G], the granted tasks, in the order of their grants.
    """
    available = round.available.copy()
    hopeful = order[tasks_that_fit(round, available)[order]]
    granted: list[int] = []
    for task in hopeful.tolist():
        blocks = round.blocks_of(task)
        if fits(round.demand[task], available[blocks]):
            _take(available, blocks, round.demand[task])
            granted.append(task)
    return np.array(granted, dtype=np.int64)


def left_after(round: Round, granted: Ints) -> Ints:
    """int64[B, A]: what is available once `granted` hold their demand."""
    available = round.available.copy()
    for task in granted.tolist():
        _take(available, round.blocks_of(task), round.demand[task])
    return available


def check_grants(round: Round, granted: Iterable[int]) -> None:
    """Verify a set of grants once more, in Python's unbounded integers, before it is committed.

    Shares no code with `fill` on purpose: it is the last line before budget is spent for ever.

    Raises:
        AssertionError: A task is unknown or granted twice, or a block's filter would break. It is
            raised as an exception, so that running Python with -O doesn't remove it.
    """
    tasks = [int(task) for task in granted]
    if len(set(tasks)) != len(tasks):
        raise AssertionError("a task is granted twice")
    asked: dict[int, list[int]] = {}
    for task in tasks:
        if not 0 <= task < round.tasks:
            raise AssertionError(f"task {task} is not in the round")
        demand = round.demand[task].tolist()
        for block in round.blocks_of(task).tolist():
            total = asked.get(block, [0] * len(demand))
            asked[block] = [t + d for t, d in zip(total, demand, strict=True)]
    for block, total in asked.items():
        held = zip(round.consumed[block].tolist(), round.reserved[block].tolist(), strict=True)
        spent = [c + r + t for (c, r), t in zip(held, total, strict=True)]
        unlocked = round.unlocked[block].tolist()
        if not any(s <= u for s, u in zip(spent, unlocked, strict=True)):
            raise AssertionError(f"block row {block} would be overdrawn at every order")


def _take(available: Ints, blocks: Ints, demand: Ints) -> None:
    """Subtract a demand at every order, stopping at `ABSENT`, where nothing fits anyway."""
    available[blocks] = np.maximum(available[blocks] - demand, ABSENT)
