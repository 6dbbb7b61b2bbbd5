"""Arrays of amounts become the same integers as single amounts do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpmoe_operator.privacy import units
from dpmoe_operator.simulate.amounts import capacity_units, spend_units

finite = st.floats(allow_nan=False, allow_infinity=False)
near_whole_units = st.integers(0, 10**16).map(lambda count: count / 10**9)


@given(st.lists(st.floats(min_value=0) | near_whole_units, min_size=1))
def test_spends_are_rounded_as_single_ones(amounts: list[float]) -> None:
    assert spend_units(np.array(amounts)).tolist() == [units.spend_units(a) for a in amounts]


@given(st.lists(finite | near_whole_units | near_whole_units.map(lambda a: -a), min_size=1))
def test_capacities_are_rounded_as_single_ones(amounts: list[float]) -> None:
    assert capacity_units(np.array(amounts)).tolist() == [units.capacity_units(a) for a in amounts]


def test_products_that_a_float_would_round_to_the_wrong_side() -> None:
    """0.1 is a little more than a tenth, 0.3 a little less; their products with 10⁹ hide it."""
    assert 0.1 * 1e9 == 1e8
    assert spend_units(np.array([0.1])).tolist() == [100_000_001]
    assert 0.3 * 1e9 == 3e8
    assert capacity_units(np.array([0.3])).tolist() == [299_999_999]


def test_what_is_no_amount_is_refused() -> None:
    with pytest.raises(ValueError, match="can't be negative: -1"):
        spend_units(np.array([0.0, -1.0]))
    with pytest.raises(ValueError, match="not NaN"):
        capacity_units(np.array([np.nan]))
