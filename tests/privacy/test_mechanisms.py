"""The sampled Gaussian's curve against closed forms, quadrature, Opacus and dp-accounting."""

import logging
import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis import rdp as opacus_rdp

from dpmoe_operator.privacy.mechanisms import demand, subsampled_gaussian_rdp
from dpmoe_operator.privacy.orders import DEFAULT_ORDERS, as_floats
from dpmoe_operator.privacy.units import MAX_UNITS, NANO

ORDERS = as_floats(DEFAULT_ORDERS)
INTEGERS = tuple(order for order in ORDERS if order.is_integer())
FRACTIONS = (1.25, 1.5, 1.75, 2.5, 3.5, 5.5)
MECHANISMS = [(1.0, 0.01), (0.6, 0.001), (5.0, 0.1), (2.0, 0.5), (1.0, 0.9), (30.0, 0.01)]


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
def test_without_sampling_it_is_the_gaussian(sigma: float) -> None:
    """Mironov 2017, Corollary 3: α/(2σ²)."""
    curve = subsampled_gaussian_rdp(sigma, 1.0, 7, ORDERS)
    assert curve == pytest.approx([7 * order / (2 * sigma**2) for order in ORDERS], rel=1e-9)


@pytest.mark.parametrize(("sigma", "q"), MECHANISMS)
def test_integer_orders_equal_the_binomial_sum(sigma: float, q: float) -> None:
    """Mironov, Talwar, Zhang 2019, Section 3.3, Equation 4 for integer α."""
    for order in (2, 3, 8, 16):
        terms = [
            math.comb(order, i)
            * (1 - q) ** (order - i)
            * q**i
            * math.exp((i * i - i) / 2 / sigma**2)
            for i in range(order + 1)
        ]
        exact = math.log(math.fsum(terms)) / (order - 1)
        assert subsampled_gaussian_rdp(sigma, q, 1, [order])[0] == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize(("sigma", "q"), MECHANISMS)
def test_integer_orders_agree_with_opacus(sigma: float, q: float) -> None:
    theirs = opacus_rdp.compute_rdp(q=q, noise_multiplier=sigma, steps=100, orders=INTEGERS)
    ours = subsampled_gaussian_rdp(sigma, q, 100, INTEGERS)
    assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(("sigma", "q"), MECHANISMS)
def test_fractional_orders_bound_the_true_divergence(sigma: float, q: float) -> None:
    ours = subsampled_gaussian_rdp(sigma, q, 1, FRACTIONS)
    exact = np.array([quadrature(sigma, q, order) for order in FRACTIONS])
    assert (ours >= exact * (1 - 1e-9)).all()
    assert (ours <= exact * 2).all()


@pytest.mark.parametrize(("sigma", "q"), MECHANISMS)
def test_fractional_orders_are_never_looser_than_dp_accounting(sigma: float, q: float) -> None:
    accountant = RdpAccountant(FRACTIONS)
    accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)))
    assert (
        subsampled_gaussian_rdp(sigma, q, 1, FRACTIONS) <= accountant._rdp * (1 + 1e-9) + 2e-15
    ).all()


@pytest.mark.parametrize("order", [1.5, 2.5, 3.5])
def test_a_fractional_order_costs_no_more_than_the_next_integer(order: float) -> None:
    """dp-accounting alone says 3,000 times more at order 1.5."""
    low, high = subsampled_gaussian_rdp(1000.0, 0.01, 1, [order, math.ceil(order)])
    assert low <= high


def test_orders_where_the_series_diverges_are_bounded_without_noise_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        curve = subsampled_gaussian_rdp(2.0, 0.5, 1, [1.5])
    assert curve[0] == pytest.approx(quadrature(2.0, 0.5, 1.5), rel=0.4)
    assert not caplog.records


@settings(max_examples=25)
@given(st.floats(0.3, 50), st.floats(1e-6, 1), st.integers(0, 10**6), st.integers(0, 10**6))
def test_steps_add_up(sigma: float, q: float, first: int, second: int) -> None:
    orders = [2.0, 3.5, 8.0]
    one = subsampled_gaussian_rdp(sigma, q, 1, orders)
    assert (subsampled_gaussian_rdp(sigma, q, first, orders) == first * one).all()
    separate = zip(demand(sigma, q, first, orders), demand(sigma, q, second, orders), strict=True)
    together = demand(sigma, q, first + second, orders)
    for (a, b), both in zip(separate, together, strict=True):
        assert max(a, b) <= both <= min(a + b + 1, MAX_UNITS)


@pytest.mark.parametrize(("sigma", "q"), MECHANISMS)
def test_demands_round_up(sigma: float, q: float) -> None:
    curve = subsampled_gaussian_rdp(sigma, q, 123, DEFAULT_ORDERS)
    for units, epsilon in zip(demand(sigma, q, 123, DEFAULT_ORDERS), curve, strict=True):
        assert 0 <= units - epsilon * NANO <= 1 + 1e-6 * units


def test_a_step_is_never_free() -> None:
    assert min(demand(1000.0, 1e-9, 1, DEFAULT_ORDERS)) == 1


def test_no_steps_cost_nothing() -> None:
    assert demand(1.0, 0.01, 0, ["2", "4"]) == (0, 0)


def test_hopeless_noise_saturates() -> None:
    for sigma in (1e-6, 1e-7, 1e-200):
        assert demand(sigma, 0.5, 1000, ["2", "64"]) == (MAX_UNITS, MAX_UNITS)


def test_huge_noise_costs_almost_nothing() -> None:
    assert demand(1e200, 0.5, 1, ["1.5", "2", "64"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "orders", "message"),
    [
        (0.0, 0.1, 1, [2], "noise multiplier: 0.0"),
        (math.inf, 0.1, 1, [2], "noise multiplier: inf"),
        (math.nan, 0.1, 1, [2], "noise multiplier: nan"),
        (1.0, 0.0, 1, [2], "sampling rate: 0.0"),
        (1.0, 1.1, 1, [2], "sampling rate: 1.1"),
        (1.0, math.nan, 1, [2], "sampling rate: nan"),
        (1.0, 0.1, -1, [2], "steps: -1"),
        (1.0, 0.1, 10**13, [2], "steps: 10000000000000"),
        (1.0, 0.1, 1, [1], "orders: 1"),
        (1.0, 0.1, 1, [2048], "orders: 2048"),
    ],
)
def test_bad_arguments_are_named(
    sigma: float, q: float, steps: int, orders: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        subsampled_gaussian_rdp(sigma, q, steps, orders)


def quadrature(sigma: float, q: float, order: float) -> float:
    """E over N(0, σ²) of the likelihood ratio's power, by the trapezoidal rule.

    Integrates (1+x)^α − 1 − αx with E[x] = 0, which is not negative: nothing cancels.
    """
    z = np.linspace(-14 * sigma, order + 14 * sigma, 20001)
    x = q * np.expm1((2 * z - 1) / (2 * sigma**2))
    density = np.exp(-(z**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    excess = (
        np.expm1(order * np.log1p(x)) - order * x if q < 1 else (1 + x) ** order - 1 - order * x
    )
    return math.log1p(float((density * excess).sum() * (z[1] - z[0]))) / (order - 1)
