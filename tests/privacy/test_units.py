"""Rounding directions of budget amounts, checked against exact rationals."""

import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpmoe_operator.privacy.units import (
    MAX_UNITS,
    NANO,
    capacity_units,
    format_epsilon,
    saturate,
    spend_units,
    to_epsilon,
)

spends = st.one_of(
    st.floats(0, 8e6, allow_nan=False),
    st.decimals(0, 8 * 10**6, allow_nan=False, allow_infinity=False),
    st.decimals(0, 1, allow_nan=False, places=60),
)
capacities = st.one_of(
    st.floats(-8e6, 8e6, allow_nan=False),
    st.decimals(-8 * 10**6, 8 * 10**6, allow_nan=False, allow_infinity=False),
    st.decimals(-1, 1, allow_nan=False, places=60),
)


@given(spends)
def test_spends_round_up_to_the_next_unit(epsilon: float | Decimal) -> None:
    units, exact = spend_units(epsilon), Fraction(epsilon) * NANO
    assert exact <= units < exact + 1


@given(capacities)
def test_capacities_round_down_to_the_unit_below(epsilon: float | Decimal) -> None:
    units, exact = capacity_units(epsilon), Fraction(epsilon) * NANO
    assert exact - 1 < units <= exact


@given(st.integers(-MAX_UNITS + 1, MAX_UNITS - 1))
def test_whole_units_survive_the_round_trip(units: int) -> None:
    assert capacity_units(to_epsilon(units)) == units
    if units >= 0:
        assert spend_units(to_epsilon(units)) == units


@pytest.mark.parametrize(
    "doubtful",
    [math.inf, math.nan, 9e6, 1e300, Decimal("Infinity"), Decimal("NaN")],
)
def test_doubtful_spends_saturate(doubtful: float | Decimal) -> None:
    assert spend_units(doubtful) == MAX_UNITS


@pytest.mark.parametrize("tiny", [5e-324, Decimal("1e-999999"), 1e-10])
def test_a_tiny_spend_costs_one_unit(tiny: float | Decimal) -> None:
    assert spend_units(tiny) == 1


@pytest.mark.parametrize("negative", [-1e-300, -1.0, Decimal("-0.1"), -math.inf])
def test_a_negative_spend_is_an_error(negative: float | Decimal) -> None:
    with pytest.raises(ValueError, match="can't be negative"):
        spend_units(negative)


def test_nothing_spent_is_nothing() -> None:
    assert spend_units(0.0) == spend_units(-0.0) == spend_units(Decimal(0)) == 0


def test_no_capacity_reaches_saturation() -> None:
    assert capacity_units(math.inf) == capacity_units(1e30) == MAX_UNITS - 1
    assert capacity_units(-math.inf) == capacity_units(Decimal("-1e30")) == -MAX_UNITS
    assert spend_units(math.inf) > capacity_units(math.inf)


def test_a_capacity_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="NaN"):
        capacity_units(math.nan)


def test_sums_saturate() -> None:
    assert saturate(5) == 5
    assert saturate(3 * MAX_UNITS) == MAX_UNITS
    with pytest.raises(ValueError, match="can't be negative"):
        saturate(-1)


@pytest.mark.parametrize(
    ("units", "text"),
    [
        (0, "0"),
        (7, "0.000000007"),
        (1_000_000_000, "1"),
        (99_995_000, "0.1"),
        (2_899_999_999, "2.9"),
        (1_234_567_891, "1.235"),
        (-16_118_095_651, "-16.12"),
        (999_951_000_000, "1000"),
        (123_456_000_000_000, "123456"),
        (MAX_UNITS, "∞"),
        (-MAX_UNITS, "-∞"),
    ],
)
def test_amounts_for_people(units: int, text: str) -> None:
    assert format_epsilon(units) == text
