"""A round refuses arrays that don't belong together."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dpmoe_operator.privacy.units import MAX_UNITS
from dpmoe_operator.scheduling.round import ABSENT, Round

MakeRound = Callable[..., Round]


@pytest.fixture
def good(make_round: MakeRound) -> Round:
    return make_round(
        [[-5, 10], [ABSENT, 20]],
        [{"demand": [1, 2], "blocks": [0, 1]}, {"demand": [3, MAX_UNITS], "blocks": [1]}],
        consumed=[[1, 2], [0, 3]],
        reserved=[[0, 1], [0, 2]],
        unlocked=[[-5, 4], [ABSENT, 20]],
    )


def test_what_is_available(good: Round) -> None:
    assert (good.tasks, good.blocks) == (2, 2)
    assert good.available.tolist() == [[-6, 1], [ABSENT, 15]]
    assert good.task_of_pair.tolist() == [0, 0, 1]
    assert [good.blocks_of(task).tolist() for task in range(2)] == [[0, 1], [1]]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("orders", [1.0, 2.0], "orders: must increase, above 1"),
        ("orders", [3.0, 2.0], "orders: must increase"),
        ("orders", [2.0, np.inf], "orders: must be finite"),
        ("demand", [[-1, 2], [3, 4]], "demand: must lie in"),
        ("demand", [[MAX_UNITS + 1, 2], [3, 4]], "demand: must lie in"),
        ("demand", [[1.0, 2.0], [3.0, 4.0]], "demand: float64"),
        ("demand", [[1, 2]], "demand: int64"),
        ("consumed", [[-1, 0], [0, 0]], "consumed: must lie in"),
        ("reserved", [[0, MAX_UNITS + 1], [0, 0]], "reserved: must lie in"),
        ("capacity", [[-5, MAX_UNITS], [ABSENT, 20]], "capacity: must lie in"),
        ("capacity", [[-MAX_UNITS - 1, 10], [ABSENT, 20]], "capacity: must lie in"),
        ("capacity", [[ABSENT, ABSENT], [ABSENT, 20]], "at least one order"),
        ("unlocked", [[-5, 11], [ABSENT, 20]], "unlocked: must lie between"),
        ("unlocked", [[-5, -1], [ABSENT, 20]], "unlocked: must lie between"),
        ("unlocked", [[-6, 4], [ABSENT, 20]], "unlocked: must lie between"),
        ("unlocked", [[0, 4], [ABSENT, 20]], "unlocked: must lie between"),
        ("arrival", [0.0, np.nan], "arrival: must be finite"),
        ("weight", [1.0, 0.0], "weight: must be above 0"),
        ("weight", [1.0, np.inf], "weight: must be above 0"),
        ("priority", [0, -(2**63)], "priority: must lie within"),
        ("fair_shares", [-1, 0], "fair_shares: must be at least 0"),
        ("fair_shares", [1], "fair_shares: int64"),
        ("indptr", [0, 2, 2], "indptr: must rise"),
        ("indptr", [0, 0, 3], "indptr: must rise"),
        ("indptr", [1, 2, 3], "indptr: must rise"),
        ("indptr", [0, 3], "indptr: int64"),
        ("indices", [0, 1, 2], r"indices: block rows must lie in \[0, 2\)"),
        ("indices", [0, -1, 1], "indices: block rows"),
        ("indices", [1, 1, 1], "indices: a task asks for a block twice"),
    ],
)
def test_bad_arrays_are_named(good: Round, field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(good, **{field: np.array(value)})


def test_a_round_may_be_empty(make_round: MakeRound) -> None:
    assert make_round([[1, 2]], []).tasks == 0


def test_blocks_may_be_asked_for_in_any_order(good: Round) -> None:
    swapped = replace(good, indices=np.array([1, 0, 1]))
    assert swapped.blocks_of(0).tolist() == [1, 0]
    assert swapped.pairs_of(np.array([1, 0])).tolist() == [2, 0, 1]


def test_what_is_left_of_a_round(make_round: MakeRound) -> None:
    round = make_round(
        [[10, 20], [30, 40]],
        [
            {"demand": [1, 2], "blocks": [0, 1]},
            {"demand": [3, 4], "blocks": [1]},
            {"demand": [5, 6], "blocks": [0], "weight": 7, "priority": 8, "arrival": 9},
        ],
        reserved=[[1, 1], [1, 1]],
    )
    rest = round.after(np.array([0]), np.array([2, 1]))
    assert rest.available.tolist() == [[8, 17], [28, 37]]
    assert rest.demand.tolist() == [[5, 6], [3, 4]]
    assert [rest.blocks_of(task).tolist() for task in range(2)] == [[0], [1]]
    assert (rest.weight[0], rest.priority[0], rest.arrival[0]) == (7, 8, 9)


def test_what_is_held_saturates(make_round: MakeRound) -> None:
    """Thousands of saturated demands at one order leave nothing there, and the truth elsewhere."""
    round = make_round([[MAX_UNITS - 1, 5000]], [{"demand": [MAX_UNITS, 1], "blocks": [0]}] * 4000)
    rest = round.after(np.arange(3999), np.array([3999]))
    assert rest.reserved.tolist() == [[MAX_UNITS, 3999]]
    assert rest.available.tolist() == [[-1, 1001]]
