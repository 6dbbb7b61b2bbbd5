"""Rényi orders: what is accepted, and that the default ones are worth their place."""

import math
from decimal import Decimal

import numpy as np
import pytest
from numpy.typing import NDArray

from dpmoe_operator.privacy.capacity import conversion_cost
from dpmoe_operator.privacy.orders import (
    DEFAULT_ORDERS,
    MAX_ORDERS,
    as_decimals,
    as_floats,
    parse_orders,
)

PRIVATEKUBE_ORDERS = ("1.5", "1.75", "2", "2.5", "3", "4", "5", "6", "8", "16", "32", "64")


def test_the_default_orders_are_valid() -> None:
    assert [str(order) for order in parse_orders(DEFAULT_ORDERS)] == list(DEFAULT_ORDERS)
    assert len(DEFAULT_ORDERS) <= 32


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ([], "list of 1 to 64"),
        ("64", "list of 1 to 64"),
        ([str(order) for order in range(2, MAX_ORDERS + 3)], "list of 1 to 64"),
        (["2", "two"], "'two' is not a decimal"),
        (["2", 3], "3 is not a decimal"),
        (["NaN"], "'NaN' is not a decimal"),
        (["1e3"], "'1e3' is not a decimal"),
        (["٣"], "is not a decimal"),
        (["1"], r"1 is outside \(1, 1024\]"),
        (["0.5"], r"0.5 is outside \(1, 1024\]"),
        (["2", "1025"], r"1025 is outside \(1, 1024\]"),
        (["3", "2"], "2 follows 3"),
        (["2", "2.0"], "2.0 follows 2"),
    ],
)
def test_bad_orders_are_named(orders: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_orders(orders)


def test_every_form_of_an_order_means_the_same() -> None:
    assert as_decimals(["2.1", 2.1, Decimal("2.1")]) == (Decimal("2.1"),) * 3
    assert as_floats(["2.1", 2.1, Decimal("2.1")]) == (2.1,) * 3


@pytest.mark.parametrize("order", [1.0, math.inf, 1e9, Decimal("0.9"), "1"])
def test_orders_out_of_range_are_refused_in_every_form(order: float | Decimal | str) -> None:
    with pytest.raises(ValueError, match="orders"):
        as_floats([order])


def test_the_default_orders_waste_little_budget() -> None:
    """How many identical jobs fit a block, on the default orders against a dense grid."""
    dense = np.concatenate([np.arange(1.5, 16, 0.25), np.arange(16, 66, 2), np.arange(72, 513, 8)])
    mechanisms = [(0.001, 0.6), (0.001, 1.0), (0.01, 0.8), (0.01, 1.5), (0.05, 1.5), (0.2, 5.0)]
    budgets = [(e, d) for e in (0.1, 0.5, 1, 3, 10) for d in ("1e-5", "1e-7", "1e-9")]

    def waste(orders: tuple[str, ...]) -> float:
        chosen = np.array(as_floats(orders))
        jobs = []
        for q, sigma in mechanisms:
            curve, full = rdp(q, sigma, chosen), rdp(q, sigma, dense)
            for epsilon, delta in budgets:
                possible = (room(epsilon, delta, dense) / full).max()
                jobs.append(max(0.0, (room(epsilon, delta, chosen) / curve).max() / possible))
        return float(1 - np.minimum(jobs, 1).mean())

    assert waste(DEFAULT_ORDERS) < 0.03
    assert waste(PRIVATEKUBE_ORDERS) > 0.15


def room(epsilon: float, delta: str, orders: NDArray[np.float64]) -> NDArray[np.float64]:
    costs = [conversion_cost(Decimal(str(order)), Decimal(delta), "tight") for order in orders]
    return epsilon - np.array([float(cost) for cost in costs])


def rdp(q: float, sigma: float, orders: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sampled Gaussian's curve by the trapezoidal rule: independent of dp-accounting."""
    curve = []
    for order in orders:
        z = np.linspace(-12 * sigma, order + 12 * sigma, 2001)
        ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * z - 1) / (2 * sigma**2))
        terms = order * ratio - z**2 / (2 * sigma**2)
        log_integral = terms.max() + math.log(np.exp(terms - terms.max()).sum() * (z[1] - z[0]))
        curve.append((log_integral - math.log(sigma * math.sqrt(2 * math.pi))) / (order - 1))
    return np.array(curve)
