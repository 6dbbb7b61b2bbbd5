"""Granting in a given order, and the filter that no grant may break.

The filter of a block (Rogers et al. 2016; Lécuyer 2021; PrivateKube's CANRUN, Luo et al., OSDI
2021, Algorithm 3): the sum of everything granted stays within capacity at *some* order. Each block
may hold at another order, and the others may go negative. All of it is integer arithmetic.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from dpmoe_operator.scheduling.compiled import compiled
from dpmoe_operator.scheduling.round import ABSENT, Floats, Ints, Round


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
    return _pairs_that_fit(round.indptr, round.indices, round.demand, budget)


def tasks_that_fit(round: Round, budget: Ints) -> NDArray[np.bool_]:
    """bool[T]: for each task, whether every one of its blocks has room in `budget`."""
    if round.tasks == 0:
        return np.zeros(0, dtype=bool)
    return np.logical_and.reduceat(pairs_that_fit(round, budget), round.indptr[:-1])


def fill(round: Round, order: Ints, budget: Ints | None = None) -> Ints:
    """Grant tasks in the given order, each wholly or not at all.

    Best effort: a task that doesn't fit doesn't hold up those behind it. What remains fits none
    of the tasks in `order` that were not granted, since budget only shrinks meanwhile.

    Of an elastic job, the first point that fits is granted, and gives way to one that is worth
    more once that one's turn comes, if it fits in its place. What another point gave back may let
    a task in that was refused before, so the order is gone through until nothing changes: then no
    job is without budget that would fit, and no point is held where a better one would fit.

    Args:
        round: The round.
        order: int64[≤ T], tasks, the first to be tried first.
        budget: int64[B, A], what may be granted at most; all that is available if None.

    Returns:
        int64[G], the granted tasks, in the order of their grants.
    """
    return filled(round, order, budget)[0]


def filled(round: Round, order: Ints, budget: Ints | None = None) -> tuple[Ints, Ints]:
    """As `fill`, and what is left of the budget then: int64[G], int64[B, A]."""
    left = (round.available if budget is None else budget).copy()
    if round.group is not None and len(order) > 0:
        _, job = np.unique(round.group[order], return_inverse=True)
        return _fill_points(
            round.indptr, round.indices, round.demand, round.weight, order, job.ravel(), left
        ), left
    return _fill(round.indptr, round.indices, round.demand, order, left), left


def left_after(round: Round, granted: Ints) -> Ints:
    """int64[B, A]: what is available once `granted` hold their demand."""
    left = round.available.copy()
    _take(round.indptr, round.indices, round.demand, granted, left)
    return left


def check_grants(round: Round, granted: Iterable[int]) -> None:
    """Verify a set of grants once more, exactly, before it is committed.

    Shares no code with `fill` on purpose: it is the last line before budget is spent for ever.
    Sums of amounts could leave 64 bits, so their high and low halves are summed apart.

    Raises:
        AssertionError: A task is unknown or granted twice, two points of one job are granted, or a
            block's filter would break. It is raised as an exception, so that running Python with -O
            doesn't remove it.
    """
    tasks = np.array([int(task) for task in granted], dtype=np.int64)
    if len(np.unique(tasks)) != len(tasks):
        raise AssertionError("a task is granted twice")
    for unknown in tasks[(tasks < 0) | (tasks >= round.tasks)].tolist():
        raise AssertionError(f"task {unknown} is not in the round")
    if len(tasks) == 0:
        return
    if round.group is not None:
        groups, times = np.unique(round.group[tasks], return_counts=True)
        for group in groups[times > 1].tolist():
            raise AssertionError(f"two points of the elastic job {group} are granted")
    asked_of = [round.blocks_of(task) for task in tasks.tolist()]
    blocks = np.concatenate(asked_of)
    by_block = np.argsort(blocks, kind="stable")
    asked, starts = np.unique(blocks[by_block], return_index=True)
    task_of = np.repeat(tasks, [len(blocks) for blocks in asked_of])[by_block]
    holds = np.zeros(len(asked), dtype=bool)
    for order in range(len(round.orders)):
        demand = round.demand[task_of, order]
        high = np.add.reduceat(demand >> _HALF, starts)
        low = np.add.reduceat(demand & _LOW_BITS, starts)
        high, low = high + (low >> _HALF), low & _LOW_BITS
        held = round.consumed[asked, order] + round.reserved[asked, order]
        room = round.unlocked[asked, order] - held
        room_high, room_low = room >> _HALF, room & _LOW_BITS
        holds |= (high < room_high) | ((high == room_high) & (low <= room_low))
    for block in asked[~holds].tolist():
        raise AssertionError(f"block row {block} would be overdrawn at every order")


_HALF = 31
_LOW_BITS = (1 << _HALF) - 1


@compiled
def _pairs_that_fit(indptr: Ints, indices: Ints, demand: Ints, budget: Ints) -> NDArray[np.bool_]:
    fitting = np.zeros(len(indices), dtype=np.bool_)
    for task in range(len(demand)):
        asked = demand[task]
        for pair in range(indptr[task], indptr[task + 1]):
            room = budget[indices[pair]]
            for order in range(len(asked)):
                if asked[order] <= room[order]:
                    fitting[pair] = True
                    break
    return fitting


@compiled
def _fill(indptr: Ints, indices: Ints, demand: Ints, tries: Ints, left: Ints) -> Ints:
    """Grant in the order of `tries` while it fits; `left` is what remains afterwards."""
    granted = np.empty(len(tries), dtype=np.int64)
    count = 0
    for task in tries:
        asked = demand[task]
        fits_everywhere = True
        for pair in range(indptr[task], indptr[task + 1]):
            room, fits_here = left[indices[pair]], False
            for order in range(len(asked)):
                if asked[order] <= room[order]:
                    fits_here = True
                    break
            if not fits_here:
                fits_everywhere = False
                break
        if fits_everywhere:
            granted[count] = task
            count += 1
            for pair in range(indptr[task], indptr[task + 1]):
                room = left[indices[pair]]
                for order in range(len(asked)):
                    # Stop at ABSENT, where nothing fits anyway.
                    room[order] = max(room[order] - asked[order], ABSENT)
    return granted[:count].copy()


@compiled
def _fill_points(
    indptr: Ints,
    indices: Ints,
    demand: Ints,
    weight: Floats,
    tries: Ints,
    job: Ints,
    left: Ints,
) -> Ints:
    """As `_fill`, at most one task a job; `job` numbers the jobs of `tries` from 0."""
    place = np.full(job.max() + 1, -1)
    granted = np.empty(len(tries), dtype=np.int64)
    count, upgraded = 0, True
    while upgraded:
        upgraded = False
        for i in range(len(tries)):
            task, mine = tries[i], place[job[i]]
            held = granted[mine] if mine >= 0 else -1
            if held >= 0:
                if weight[task] <= weight[held]:
                    continue
                for pair in range(indptr[held], indptr[held + 1]):
                    room = left[indices[pair]]
                    for order in range(demand.shape[1]):
                        # What has saturated stays there: who gives back can't know from how far.
                        if room[order] > ABSENT:
                            room[order] += demand[held, order]
            fits_everywhere = True
            for pair in range(indptr[task], indptr[task + 1]):
                room, fits_here = left[indices[pair]], False
                for order in range(demand.shape[1]):
                    if demand[task, order] <= room[order]:
                        fits_here = True
                        break
                if not fits_here:
                    fits_everywhere = False
                    break
            taken = task if fits_everywhere else held
            if taken >= 0:
                for pair in range(indptr[taken], indptr[taken + 1]):
                    room = left[indices[pair]]
                    for order in range(demand.shape[1]):
                        room[order] = max(room[order] - demand[taken, order], ABSENT)
            if fits_everywhere:
                if mine < 0:
                    place[job[i]] = mine = count
                    count += 1
                granted[mine] = task
                upgraded = upgraded or held >= 0
    return granted[:count].copy()


@compiled
def _take(indptr: Ints, indices: Ints, demand: Ints, tasks: Ints, left: Ints) -> None:
    """Subtract the demands of tasks, at every order, whether they fit or not."""
    for task in tasks:
        asked = demand[task]
        for pair in range(indptr[task], indptr[task + 1]):
            room = left[indices[pair]]
            for order in range(len(asked)):
                room[order] = max(room[order] - asked[order], ABSENT)
