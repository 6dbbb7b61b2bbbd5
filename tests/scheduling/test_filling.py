"""Filling and the filter: exact fits, any order, all or nothing, and the last check."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from dpmoe_operator.privacy.units import MAX_UNITS
from dpmoe_operator.scheduling.filling import (
    check_grants,
    fill,
    fits,
    left_after,
    tasks_that_fit,
)
from dpmoe_operator.scheduling.policies import POLICIES
from dpmoe_operator.scheduling.round import ABSENT, Round

MakeRound = Callable[..., Round]
sizes = {"seed": st.integers(0, 2**32), "tasks": st.integers(0, 30), "blocks": st.integers(1, 5)}


def granted(round: Round, *order: int) -> list[int]:
    return [int(task) for task in fill(round, np.array(order or range(round.tasks), np.int64))]


@pytest.mark.parametrize(
    ("demand", "available", "expected"),
    [
        ([5, 9], [[5, 0]], True),  # an exact fit at the first order
        ([6, 9], [[5, 8]], False),
        ([5, 9], [[5, 0], [0, 9]], True),  # another order on another block
        ([5, 9], [[5, 0], [4, 8]], False),
        ([0, 0], [[-1, 0]], True),
        ([0, 0], [[-1, -1]], False),  # overdrawn everywhere: not even nothing fits
        ([0, 5], [[ABSENT, 4]], False),
    ],
)
def test_fits(demand: list[int], available: list[list[int]], expected: bool) -> None:
    assert fits(np.array(demand), np.array(available)) is expected


def test_one_order_is_enough_and_others_may_go_negative(make_round: MakeRound) -> None:
    """Two tasks overdraw order 2 but hold at order 3."""
    round = make_round([[10, 10]], [{"demand": [9, 4], "blocks": [0]}] * 3)
    assert granted(round) == [0, 1]
    assert left_after(round, np.array([0, 1])).tolist() == [[-8, 2]]


def test_tasks_that_prefer_different_orders_exclude_each_other(make_round: MakeRound) -> None:
    """Each fits alone; together they break both orders."""
    round = make_round(
        [[10, 10]], [{"demand": [9, 2], "blocks": [0]}, {"demand": [2, 9], "blocks": [0]}]
    )
    assert granted(round) == [0]
    assert granted(round, 1, 0) == [1]


def test_all_or_nothing_over_blocks(make_round: MakeRound) -> None:
    """Task 0 fails on block 1, and takes nothing of block 0."""
    round = make_round(
        [[10], [3]],
        [{"demand": [4], "blocks": [0, 1]}, {"demand": [10], "blocks": [0]}],
    )
    assert granted(round) == [1]


def test_a_blocked_task_holds_up_nobody(make_round: MakeRound) -> None:
    round = make_round([[10]], [{"demand": [d], "blocks": [0]} for d in (6, 5, 4)])
    assert granted(round) == [0, 2]


def test_held_and_locked_budget_is_not_granted(make_round: MakeRound) -> None:
    round = make_round(
        [[10]],
        [{"demand": [d], "blocks": [0]} for d in (3, 2)],
        consumed=[[1]],
        reserved=[[2]],
        unlocked=[[5]],
    )
    assert granted(round) == [1]


def test_a_saturated_demand_never_fits_but_may_accompany_one_that_does(
    make_round: MakeRound,
) -> None:
    """Thousands of saturated amounts at one order neither fit nor overflow."""
    round = make_round([[MAX_UNITS - 1, 5000]], [{"demand": [MAX_UNITS, 1], "blocks": [0]}] * 4000)
    done = fill(round, np.arange(4000))
    assert len(done) == 4000
    assert left_after(round, done).tolist() == [[ABSENT, 1000]]
    check_grants(round, done)
    assert granted(make_round([[MAX_UNITS - 1]], [{"demand": [MAX_UNITS], "blocks": [0]}])) == []


def test_a_partial_order_grants_no_others(make_round: MakeRound) -> None:
    round = make_round([[10]], [{"demand": [1], "blocks": [0]}] * 3)
    assert granted(round, 2, 0) == [2, 0]


def test_an_empty_round_grants_nothing(make_round: MakeRound) -> None:
    assert granted(make_round([[10]], [])) == []


@given(**sizes, orders=st.integers(1, 4))
@budget(max_examples=50)
def test_no_policy_breaks_a_filter(
    random_round: MakeRound, seed: int, tasks: int, blocks: int, orders: int
) -> None:
    """In exact integers, by the definition: every block holds at some order."""
    round = random_round(seed, tasks, blocks, orders)
    for policy in POLICIES.values():
        done = policy.grant(round).granted.tolist()
        assert len(set(done)) == len(done)
        check_grants(round, done)
        for block in {int(b) for task in done for b in round.blocks_of(task)}:
            sharers = [task for task in done if block in round.blocks_of(task)]
            assert any(
                int(round.consumed[block, a])
                + int(round.reserved[block, a])
                + sum(int(round.demand[task, a]) for task in sharers)
                <= int(round.unlocked[block, a])
                for a in range(orders)
            )


@given(**sizes, orders=st.integers(1, 4))
@budget(max_examples=50)
def test_every_policy_conserves_work(
    random_round: MakeRound, seed: int, tasks: int, blocks: int, orders: int
) -> None:
    """No task that still waits would fit in what is left."""
    round = random_round(seed, tasks, blocks, orders)
    for policy in POLICIES.values():
        done = policy.grant(round).granted
        left = left_after(round, done)
        waiting = np.setdiff1d(np.arange(tasks), done)
        assert not tasks_that_fit(round, left)[waiting].any()
        assert not any(fits(round.demand[t], left[round.blocks_of(t)]) for t in waiting)


@given(**sizes, orders=st.integers(1, 4))
def test_the_check_agrees_with_filling(
    random_round: MakeRound, seed: int, tasks: int, blocks: int, orders: int
) -> None:
    """Adding any one waiting task to what was granted is refused."""
    round = random_round(seed, tasks, blocks, orders)
    done = POLICIES["fcfs"].grant(round).granted.tolist()
    for waiting in set(range(tasks)) - set(done):
        with pytest.raises(AssertionError, match="overdrawn"):
            check_grants(round, [*done, waiting])


def test_the_check_refuses_nonsense(make_round: MakeRound) -> None:
    round = make_round([[10]], [{"demand": [1], "blocks": [0]}])
    check_grants(round, [])
    check_grants(round, np.array([0]))
    with pytest.raises(AssertionError, match="twice"):
        check_grants(round, [0, 0])
    with pytest.raises(AssertionError, match="not in the round"):
        check_grants(round, [1])
    with pytest.raises(AssertionError, match="not in the round"):
        check_grants(round, [-1])


@pytest.mark.parametrize("more", [0, 1])
def test_the_check_is_exact_beyond_64_bits(make_round: MakeRound, more: int) -> None:
    """At the first order the sum wraps around in 64 bits, to less than nothing, and must not hold.

    At the second one it is the capacity to the unit, or one unit more.
    """
    huge, tasks, each = MAX_UNITS, 2**13, MAX_UNITS // 2**13 - 1
    demands = [[huge, each]] * (tasks - 1) + [[huge, each + more]]
    round = make_round(
        [[huge - 1, tasks * each]], [{"demand": demand, "blocks": [0]} for demand in demands]
    )
    if more:
        with pytest.raises(AssertionError, match="overdrawn"):
            check_grants(round, range(tasks))
    else:
        check_grants(round, range(tasks))
    assert len(fill(round, np.arange(tasks))) == tasks - more


def test_the_check_counts_what_is_held_and_locked(make_round: MakeRound) -> None:
    tasks = [{"demand": [4], "blocks": [0]}]
    check_grants(make_round([[10]], tasks, consumed=[[3]], reserved=[[3]]), [0])
    for fields in (
        {"consumed": [[4]], "reserved": [[3]]},
        {"consumed": [[3]], "reserved": [[4]]},
        {"consumed": [[3]], "reserved": [[3]], "unlocked": [[9]]},
    ):
        with pytest.raises(AssertionError, match="block row 0 would be overdrawn"):
            check_grants(make_round([[10]], tasks, **fields), [0])
