"""Explanations: exactly one reason a waiting task, the worst that holds, with true numbers."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.privacy.units import MAX_UNITS
from dpmoe_operator.scheduling.explain import Explanation, explain
from dpmoe_operator.scheduling.filling import fits, left_after
from dpmoe_operator.scheduling.policies import POLICIES, policy
from dpmoe_operator.scheduling.round import ABSENT, Round
from dpmoe_operator.scheduling.unlocking import ByArrivals, ByTime, Immediate, Unlocking, fraction

MakeRound = Callable[..., Round]


def explained(
    round: Round, unlocking: list[Unlocking] | None = None, name: str = "fcfs"
) -> tuple[Explanation, ...]:
    outcome = policy(name).grant(round)
    rules = unlocking or [Immediate()] * round.blocks
    return explain(round, outcome.granted, outcome.order, rules)


@pytest.mark.parametrize(
    ("fields", "reason", "left"),
    [
        ({}, Reason.DEMAND_EXCEEDS_CAPACITY, 5),
        ({"consumed": [[2]]}, Reason.DEMAND_EXCEEDS_CAPACITY, 5),
        ({"capacity": 6, "consumed": [[2]], "reserved": [[2]]}, Reason.BLOCK_EXHAUSTED, 4),
        ({"capacity": 8, "consumed": [[2]], "reserved": [[2]]}, Reason.WAITING_FOR_REFUND, 4),
        ({"capacity": 8, "unlocked": [[5]]}, Reason.WAITING_FOR_UNLOCK, 5),
        ({"capacity": 20, "consumed": [[2]], "reserved": [[2]], "unlocked": [[9]]},
         Reason.WAITING_FOR_UNLOCK, 5),
    ],
)  # fmt: skip
def test_the_ladder(
    make_round: MakeRound, fields: dict[str, Any], reason: Reason, left: int
) -> None:
    fields = dict(fields)
    round = make_round([[fields.pop("capacity", 5)]], [{"demand": [6], "blocks": [0]}], **fields)
    (explanation,) = explained(round)
    assert explanation.reason is reason
    assert (explanation.asked, explanation.left) == (6, left)
    assert (explanation.rank, explanation.of) == (1, 1)


def test_outranked_tasks_know_their_place(make_round: MakeRound) -> None:
    round = make_round([[10]], [{"demand": [d], "blocks": [0]} for d in (7, 4, 3, 5)])
    assert explained(round) == (
        Explanation(1, Reason.OUTRANKED, 0, 2.0, asked=4, left=0, rank=2, of=4),
        Explanation(3, Reason.OUTRANKED, 0, 2.0, asked=5, left=0, rank=4, of=4),
    )


def test_the_binding_block_and_the_closest_order(make_round: MakeRound) -> None:
    """On block 1 the shortfall is larger; there order 3 is closer, order 4 isn't tracked."""
    round = make_round([[-50, 8, 9], [-50, 6, ABSENT]], [{"demand": [1, 10, 10], "blocks": [0, 1]}])
    assert explained(round) == (
        Explanation(
            0, Reason.DEMAND_EXCEEDS_CAPACITY, 1, 3.0, asked=10, left=6, rank=1, of=1, fits_now=0.6
        ),
    )


def test_an_order_that_a_block_lacks_is_never_the_closest(make_round: MakeRound) -> None:
    """Relative to a saturated demand even `ABSENT` would look close."""
    round = make_round([[ABSENT, -500]], [{"demand": [MAX_UNITS, 1], "blocks": [0]}])
    (explanation,) = explained(round)
    assert (explanation.order, explanation.left) == (3.0, -500)


def test_the_worst_block_decides(make_round: MakeRound) -> None:
    round = make_round(
        [[10], [10], [10]],
        [{"demand": [6], "blocks": [0, 1, 2]}],
        consumed=[[0], [5], [0]],
        reserved=[[9], [0], [0]],
        unlocked=[[10], [10], [0]],
    )
    (explanation,) = explained(round)
    assert (explanation.reason, explanation.block) == (Reason.BLOCK_EXHAUSTED, 1)


def test_when_enough_will_be_unlocked(make_round: MakeRound) -> None:
    """9 of 12 must be released at order 2, 8 of 16 at order 3: halfway through the lifetime."""
    round = make_round(
        [[12, 16]],
        [{"demand": [6, 5], "blocks": [0]}],
        consumed=[[3, 3]],
        unlocked=[[3, 4]],
    )
    (explanation,) = explained(round, [ByTime(opened=1000.0, lifetime=60.0)])
    assert explanation.reason is Reason.WAITING_FOR_UNLOCK
    assert (explanation.unlock_at, explanation.arrivals) == (1030.0, None)
    (explanation,) = explained(round, [ByArrivals(fair_shares=10, arrivals=2)])
    assert (explanation.unlock_at, explanation.arrivals) == (None, 3)


def test_the_slowest_block_decides_when(make_round: MakeRound) -> None:
    round = make_round(
        [[10]] * 4, [{"demand": [5], "blocks": [0, 1, 2, 3]}], unlocked=[[1], [1], [1], [5]]
    )
    rules: list[Unlocking] = [
        ByTime(0.0, 60.0),
        ByTime(20.0, 60.0),
        ByArrivals(8, 1),
        ByTime(500.0, 60.0),
    ]
    (explanation,) = explained(round, rules)
    assert (explanation.unlock_at, explanation.arrivals) == (50.0, 3)


def test_nobody_waits(make_round: MakeRound) -> None:
    assert explained(make_round([[10]], [{"demand": [10], "blocks": [0]}])) == ()
    assert explained(make_round([[10]], [])) == ()


@given(
    seed=st.integers(0, 2**32),
    tasks=st.integers(0, 30),
    blocks=st.integers(1, 5),
    orders=st.integers(1, 4),
    name=st.sampled_from(sorted(POLICIES)),
)
def test_every_waiting_task_has_one_true_reason(
    random_round: MakeRound, seed: int, tasks: int, blocks: int, orders: int, name: str
) -> None:
    round = random_round(seed, tasks, blocks, orders)
    outcome = policy(name).grant(round)
    granted, order = outcome.granted, outcome.order.tolist()
    explanations = explained(round, name=name)
    assert [e.task for e in explanations] == sorted(set(range(tasks)) - set(granted.tolist()))
    ladder = {
        Reason.DEMAND_EXCEEDS_CAPACITY: round.capacity,
        Reason.BLOCK_EXHAUSTED: round.capacity - round.consumed,
        Reason.WAITING_FOR_REFUND: round.capacity - round.consumed - round.reserved,
        Reason.WAITING_FOR_UNLOCK: round.available,
        Reason.OUTRANKED: left_after(round, granted),
    }
    for e in explanations:
        blocks_of, demand = round.blocks_of(e.task), round.demand[e.task]
        holding = [r for r, budget in ladder.items() if not fits(demand, budget[blocks_of])]
        assert e.reason is holding[0]
        column = round.orders.tolist().index(e.order)
        assert e.block in blocks_of
        assert e.asked == demand[column]
        assert e.left == ladder[e.reason][e.block, column]
        assert e.asked > e.left
        assert round.capacity[e.block, column] != ABSENT
        assert e.of == tasks
        assert order[e.rank - 1] == e.task


@pytest.mark.parametrize(
    ("demand", "left", "expected"),
    [
        ([10], [5], 0.5),
        ([3], [1], 0.333),
        ([1000], [999], 0.999),
        ([5000], [4999], 0.999),
        ([2000], [1], None),
        ([1], [0], None),
        ([10, 10], [-1, 4], 0.4),
        ([10, 10], [9, ABSENT], 0.9),
        ([0, 7], [-1, -1], None),
        ([MAX_UNITS, MAX_UNITS], [1, MAX_UNITS - 1], 0.999),
    ],
)
def test_the_part_that_would_fit(
    make_round: MakeRound, demand: list[int], left: list[int], expected: float | None
) -> None:
    (explanation,) = explained(make_round([left], [{"demand": demand, "blocks": [0]}]))
    assert explanation.fits_now == expected


@given(
    seed=st.integers(0, 2**32),
    tasks=st.integers(1, 30),
    blocks=st.integers(1, 4),
    orders=st.integers(1, 4),
)
def test_the_part_that_fits_is_the_largest(
    random_round: MakeRound, seed: int, tasks: int, blocks: int, orders: int
) -> None:
    """By trying thousandths: the announced part fits in what is left, one thousandth more not."""
    round = random_round(seed, tasks, blocks, orders)
    left = left_after(round, policy("dpf").grant(round).granted)

    def part_fits(task: int, thousandths: int) -> bool:
        asked = [Fraction(int(d) * thousandths, 1000) for d in round.demand[task]]
        return all(
            any(a <= room for a, room in zip(asked, left[block].tolist(), strict=True))
            for block in round.blocks_of(task).tolist()
        )

    for e in explained(round, name="dpf"):
        thousandths = 0 if e.fits_now is None else int(0.5 + e.fits_now * 1000)
        assert thousandths == 0 or part_fits(e.task, thousandths)
        assert thousandths < 1000
        assert not part_fits(e.task, thousandths + 1)


@given(seed=st.integers(0, 2**32), tasks=st.integers(1, 30), blocks=st.integers(1, 4))
def test_a_task_fits_once_what_it_waits_for_is_unlocked(
    random_round: MakeRound, seed: int, tasks: int, blocks: int
) -> None:
    """Release each block up to the announced time: the task fits then, and not long before."""
    round = random_round(seed, tasks, blocks, 3)
    rules: list[Unlocking] = [ByTime(10.0 * block, 1000.0) for block in range(blocks)]

    def fits_at(now: float, task: int) -> bool:
        parts = [float(fraction(rule, now)) for rule in rules]
        released = np.where(
            round.capacity > 0,
            np.floor(round.capacity * np.array(parts)[:, None]).astype(np.int64),
            round.capacity,
        )
        available = np.maximum(released, round.unlocked) - round.reserved - round.consumed
        return fits(round.demand[task], available[round.blocks_of(task)])

    for e in explained(round, rules):
        if e.reason is Reason.WAITING_FOR_UNLOCK:
            assert e.unlock_at is not None
            assert fits_at(e.unlock_at + 1e-3, e.task)
            assert not fits_at(e.unlock_at - 1e-3, e.task)
        else:
            assert e.unlock_at is None


def test_bad_arguments_are_named(make_round: MakeRound) -> None:
    round = make_round([[1]], [{"demand": [2], "blocks": [0]}] * 2)
    nothing = np.zeros(0, np.int64)
    with pytest.raises(ValueError, match="ranking"):
        explain(round, nothing, np.array([0, 0]), [Immediate()])
    with pytest.raises(ValueError, match="unlocking: 0 rules for 1 block rows"):
        explain(round, nothing, np.array([0, 1]), [])
