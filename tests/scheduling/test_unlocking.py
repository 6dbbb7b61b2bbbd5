"""Unlocking: how much is released, and when enough will be."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpmoe_operator.privacy.units import MAX_UNITS
from dpmoe_operator.scheduling.round import ABSENT
from dpmoe_operator.scheduling.unlocking import (
    ByArrivals,
    ByTime,
    Immediate,
    Unlocking,
    arrivals_missing,
    fraction,
    unlocked,
    when_unlocked,
)


@pytest.mark.parametrize(
    ("unlocking", "now", "expected"),
    [
        (Immediate(), 0, Fraction(1)),
        (ByArrivals(fair_shares=4, arrivals=0), 0, Fraction(0)),
        (ByArrivals(fair_shares=4, arrivals=3), 0, Fraction(3, 4)),
        (ByArrivals(fair_shares=4, arrivals=9), 0, Fraction(1)),
        (ByTime(opened=100, lifetime=60), 90, Fraction(0)),
        (ByTime(opened=100, lifetime=60), 115, Fraction(1, 4)),
        (ByTime(opened=100, lifetime=60), 1000, Fraction(1)),
    ],
)
def test_the_released_fraction(unlocking: Unlocking, now: float, expected: Fraction) -> None:
    assert fraction(unlocking, now) == expected


def test_released_amounts_round_down_and_negative_ones_stay() -> None:
    capacity = np.array([10, 1, 0, -7, ABSENT, MAX_UNITS - 1])
    third = unlocked(capacity, Fraction(1, 3)).tolist()
    assert third == [3, 0, 0, -7, ABSENT, (MAX_UNITS - 1) // 3]
    assert unlocked(capacity, Fraction(1)).tolist() == capacity.tolist()
    assert unlocked(capacity, Fraction(0)).tolist() == [0, 0, 0, -7, ABSENT, 0]


@given(st.integers(1, MAX_UNITS - 1), st.data(), st.integers(1, 10**6))
def test_the_missing_arrivals_are_just_enough(
    capacity: int, data: st.DataObject, fair_shares: int
) -> None:
    needed = data.draw(st.integers(1, capacity))
    arrivals = data.draw(st.integers(0, fair_shares))
    missing = arrivals_missing(ByArrivals(fair_shares, arrivals), needed, capacity)

    def released(count: int) -> int:
        part = fraction(ByArrivals(fair_shares, arrivals + count), 0)
        return int(unlocked(np.array([capacity]), part)[0])

    assert released(missing) >= needed
    assert missing == 0 or released(missing - 1) < needed


@given(st.integers(1, 10**12), st.data(), st.floats(0, 2e9), st.floats(1, 3e9))
def test_the_time_of_unlocking_is_right(
    capacity: int, data: st.DataObject, opened: float, lifetime: float
) -> None:
    needed = data.draw(st.integers(1, capacity))
    rule = ByTime(opened, lifetime)
    moment = when_unlocked(rule, needed, capacity)

    def released(now: float) -> int:
        return int(unlocked(np.array([capacity]), fraction(rule, now))[0])

    slack = 1e-5 + 1e-9 * lifetime
    assert released(moment + slack) >= needed
    assert released(moment - slack - lifetime / capacity) < needed


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        (ByArrivals, (0, 0)),
        (ByArrivals, (1, -1)),
        (ByTime, (0.0, 0.0)),
        (ByTime, (math.nan, 1.0)),
        (ByTime, (0.0, math.inf)),
    ],
)
def test_bad_rules_are_refused(rule: type[ByArrivals | ByTime], values: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="unlocking"):
        rule(*values)
