"""A block's (ε, δ) budget as capacities on Rényi orders, and a spent curve as (ε, δ) again.

Turning an (α, r)-Rényi guarantee into (ε, δ) costs some ε that depends on α and δ only. So a
budget (ε_G, δ_G) leaves c(α) = ε_G − cost(α) for Rényi spending, and whatever stays within c at
*one* order is (ε_G, δ_G)-differentially private. Two conversions:

- `classic`: cost(α) = ln(1/δ)/(α−1).
  Mironov, "Rényi differential privacy", CSF 2017, Proposition 3. Used by PrivateKube and DPack.
- `tight` (default): cost(α) = ln((α−1)/α) − (ln δ + ln α)/(α−1).
  Canonne, Kamath, Steinke, "The discrete Gaussian for differential privacy", NeurIPS 2020,
  Proposition 12. Smaller at every order, so the same guarantee grants more jobs.

All of it is decimal arithmetic on 40 digits, so that rounding can be directed: capacities round
down, the ε of a spent curve rounds up. If a curve fits the capacity at some order then
`epsilon_of` is at most ε_G (rounded up to 10⁻⁹).
"""

from collections.abc import Sequence
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Literal

from dpmoe_operator.privacy.orders import Order, as_decimals
from dpmoe_operator.privacy.units import MAX_UNITS, capacity_units, spend_units, to_epsilon

Conversion = Literal["classic", "tight"]

_DIGITS = 40
"""Errors of a logarithm are near 10⁻³⁹, far below the unit of 10⁻⁹ that amounts are rounded to."""


@lru_cache(maxsize=1 << 14)
def conversion_cost(order: Decimal, delta: Decimal, conversion: Conversion) -> Decimal:
    """The ε that it costs to turn a Rényi guarantee at `order` into an (ε, δ) guarantee.

    It can be negative in the tight conversion when δ > 1/α, which is no mistake: part of the
    Rényi guarantee is then paid by δ.

    Raises:
        ValueError: `order` ≤ 1, `delta` outside (0, 1), or an unknown conversion.
    """
    if not order > 1:
        raise ValueError(f"orders: {order} must be above 1.")
    if not 0 < delta < 1:
        raise ValueError(f"delta: {delta} must lie strictly between 0 and 1.")
    with localcontext(prec=_DIGITS):
        if conversion == "classic":
            return -delta.ln() / (order - 1)
        if conversion == "tight":
            return ((order - 1) / order).ln() - (delta.ln() + order.ln()) / (order - 1)
    raise ValueError(f"conversion: {conversion!r} is unknown; choose 'tight' or 'classic'.")


def capacity(
    epsilon: Decimal | str,
    delta: Decimal | str,
    orders: Sequence[Order],
    conversion: Conversion = "tight",
) -> tuple[int, ...]:
    """Units of Rényi budget that (ε, δ) leaves at each order; negative where it leaves none.

    Strings are decimal numbers, as manifests write them.

    >>> budget = "10", "1e-7", ("3", "8")
    >>> [round(units / 1e9, 2) for units in capacity(*budget, "classic")]
    [1.94, 7.7]
    >>> [round(units / 1e9, 2) for units in capacity(*budget, "tight")]
    [2.9, 8.13]

    Raises:
        ValueError: ε is negative or not finite, or δ or an order is out of range.
    """
    total, failure = Decimal(epsilon), Decimal(delta)
    if not (total.is_finite() and total >= 0):
        raise ValueError(f"epsilon: {epsilon} must be a finite number, at least 0.")
    with localcontext(prec=_DIGITS):
        return tuple(
            capacity_units(total - conversion_cost(order, failure, conversion))
            for order in as_decimals(orders)
        )


def epsilon_of(
    curve: Sequence[int],
    delta: Decimal | str,
    orders: Sequence[Order],
    conversion: Conversion = "tight",
) -> Decimal | None:
    """The ε at `delta` that a summed Rényi curve guarantees, at its best order, rounded up.

    Args:
        curve: Units spent at each order.
        delta: The δ of the guarantee.
        orders: The orders of the curve.
        conversion: How a Rényi guarantee becomes an (ε, δ) one.

    Returns:
        ε ≥ 0, a multiple of 10⁻⁹; 0 for a curve that is 0; None if the curve is saturated at
        every order, which guarantees nothing.

    >>> epsilon_of([1_940_000_000, 7_000_000_000], "1e-7", ["3", "8"], "classic")
    Decimal('9.302585093')

    Raises:
        ValueError: Lengths differ, an amount is negative, or δ or an order is out of range.
    """
    if len(curve) != len(orders):
        raise ValueError(f"curve: {len(curve)} amounts for {len(orders)} orders.")
    if any(units < 0 for units in curve):
        raise ValueError("curve: spent amounts can't be negative.")
    if not any(curve):
        return Decimal(0)
    with localcontext(prec=_DIGITS):
        guarantees = [
            to_epsilon(units) + conversion_cost(order, Decimal(delta), conversion)
            for units, order in zip(curve, as_decimals(orders), strict=True)
            if units < MAX_UNITS
        ]
    if not guarantees:
        return None
    return to_epsilon(spend_units(max(min(guarantees), Decimal(0))))
