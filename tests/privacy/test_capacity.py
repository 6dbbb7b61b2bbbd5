"""Capacities and the way back: the published numbers, rounding, and the filter's soundness."""

import math
from decimal import Decimal
from typing import Literal

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis.rdp import compute_rdp

from dpmoe_operator.privacy.capacity import capacity, conversion_cost, epsilon_of
from dpmoe_operator.privacy.mechanisms import demand
from dpmoe_operator.privacy.orders import DEFAULT_ORDERS, as_floats
from dpmoe_operator.privacy.units import MAX_UNITS, NANO

Conversion = Literal["classic", "tight"]
CONVERSIONS: tuple[Conversion, ...] = ("classic", "tight")
ORDERS = as_floats(DEFAULT_ORDERS)
epsilons = st.decimals("0.01", 50, places=9, allow_nan=False)
deltas = st.floats(1e-12, 1e-3).map(lambda delta: Decimal(repr(delta)))


@pytest.mark.parametrize(
    ("order", "expected"),
    [(3, 1.94), (4, 4.63), (5, 5.97), (6, 6.78), (8, 7.70), (16, 8.93), (32, 9.48), (64, 9.74)],
)
def test_classic_capacities_are_those_of_privatekube(order: float, expected: float) -> None:
    """Luo et al., OSDI 2021: ε_G = 10, δ_G = 10⁻⁷."""
    (units,) = capacity(Decimal(10), Decimal("1e-7"), [order], "classic")
    assert units / NANO == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(("order", "expected"), [(3, 2.90), (8, 8.13)])
def test_tight_capacities(order: float, expected: float) -> None:
    (units,) = capacity(Decimal(10), Decimal("1e-7"), [order], "tight")
    assert units / NANO == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
@pytest.mark.parametrize("order", [1.5, 2.0, 8.0, 64.0, 1024.0])
def test_costs_are_the_published_formulas(order: float, delta: float) -> None:
    cost = {c: float(conversion_cost(Decimal(order), Decimal(delta), c)) for c in CONVERSIONS}
    classic = math.log(1 / delta) / (order - 1)
    tight = math.log((order - 1) / order) - (math.log(delta) + math.log(order)) / (order - 1)
    assert cost["classic"] == pytest.approx(classic, rel=1e-9)
    assert cost["tight"] == pytest.approx(tight, rel=1e-9)
    assert cost["tight"] < cost["classic"]


@given(epsilons, deltas, st.sampled_from(CONVERSIONS))
def test_a_full_block_shows_its_own_epsilon(
    epsilon: Decimal, delta: Decimal, conversion: Conversion
) -> None:
    """Spending exactly the capacity at an order guarantees ε_G: never more, and not much less."""
    capacities = capacity(epsilon, delta, DEFAULT_ORDERS, conversion)
    for index, units in enumerate(capacities):
        if units > 0:
            curve = [MAX_UNITS] * len(capacities)
            curve[index] = units
            shown = epsilon_of(curve, delta, DEFAULT_ORDERS, conversion)
            assert shown is not None
            assert epsilon - Decimal("2e-9") <= shown <= epsilon


@settings(max_examples=40)
@given(
    epsilon=st.decimals("0.3", 20, places=2),
    delta=deltas,
    conversion=st.sampled_from(CONVERSIONS),
    jobs=st.lists(
        st.tuples(st.sampled_from([0.7, 1.0, 2.0, 8.0]), st.sampled_from([0.001, 0.01, 0.2, 1.0])),
        min_size=1,
        max_size=4,
    ),
    order=st.integers(0, len(ORDERS) - 1),
)
def test_whatever_fits_is_private_by_independent_accounting(
    epsilon: Decimal,
    delta: Decimal,
    conversion: Conversion,
    jobs: list[tuple[float, float]],
    order: int,
) -> None:
    """Fill a block to the brim at one order; Opacus' curve and dp-accounting's conversion agree."""
    room = capacity(epsilon, delta, DEFAULT_ORDERS, conversion)[order]
    spent = 0.0
    for sigma, q in jobs:
        share = room // len(jobs)
        (step,) = demand(sigma, q, 1, [ORDERS[order]])
        steps = share // step  # Rounding each step up makes this an undercount, so it fits.
        if steps > 0:
            assert demand(sigma, q, steps, [ORDERS[order]])[0] <= share
            spent += compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=ORDERS[order])
    assert spent <= max(0, room) / NANO
    if spent > 0:
        assert compute_epsilon([ORDERS[order]], [spent], float(delta))[0] <= float(epsilon) + 1e-9


def test_the_brim_is_reached() -> None:
    """The soundness above is no accident of refusing everything: a full block spends ε_G."""
    room = capacity(Decimal(3), Decimal("1e-6"), [8], "tight")[0]
    steps = room // demand(1.0, 0.01, 1, [8])[0]
    accountant = RdpAccountant([8])
    accountant.compose(
        SelfComposedDpEvent(PoissonSampledDpEvent(0.01, GaussianDpEvent(1.0)), steps)
    )
    assert 2.99 < accountant.get_epsilon(1e-6) <= 3


def test_spend_is_shown_at_its_best_order_rounded_up() -> None:
    curve = [1_000_000_000, 1_200_000_000, 9_000_000_000]
    costs = [conversion_cost(Decimal(o), Decimal("1e-6"), "tight") for o in (4, 16, 64)]
    expected = min(Decimal(u) / NANO + c for u, c in zip(curve, costs, strict=True))
    shown = epsilon_of(curve, Decimal("1e-6"), ["4", "16", "64"])
    assert shown is not None
    assert 0 <= shown - expected < Decimal("1e-9")
    assert shown == shown.quantize(Decimal("1e-9"))


def test_nothing_spent_shows_zero() -> None:
    assert epsilon_of([0, 0], Decimal("1e-6"), ["4", "16"]) == 0


def test_a_negative_guarantee_shows_zero() -> None:
    """With δ > 1/α the conversion pays part of the spend."""
    assert epsilon_of([1, 1], Decimal("0.5"), ["4", "16"]) == 0


def test_saturated_orders_guarantee_nothing() -> None:
    assert epsilon_of([MAX_UNITS, MAX_UNITS], Decimal("1e-6"), ["4", "16"]) is None
    only = epsilon_of([MAX_UNITS, NANO], Decimal("1e-6"), ["4", "16"])
    assert only == epsilon_of([NANO], Decimal("1e-6"), ["16"])


@pytest.mark.parametrize(
    ("epsilon", "delta", "conversion", "message"),
    [
        ("-1", "1e-6", "tight", "epsilon: -1"),
        ("Infinity", "1e-6", "tight", "epsilon: Infinity"),
        ("NaN", "1e-6", "tight", "epsilon: NaN"),
        ("1", "0", "tight", "delta: 0"),
        ("1", "1", "classic", "delta: 1"),
        ("1", "1e-6", "loose", "conversion: 'loose'"),
    ],
)
def test_bad_budgets_are_named(
    epsilon: str, delta: str, conversion: Conversion, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        capacity(Decimal(epsilon), Decimal(delta), ["2"], conversion)


def test_bad_curves_are_named() -> None:
    with pytest.raises(ValueError, match="1 amounts for 2 orders"):
        epsilon_of([1], Decimal("1e-6"), ["2", "4"])
    with pytest.raises(ValueError, match="can't be negative"):
        epsilon_of([-1], Decimal("1e-6"), ["2"])
