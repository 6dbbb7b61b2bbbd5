"""Rényi orders: which a block tracks by default, and how strings become orders.

A block keeps one budget an order, and a set of grants fits while it fits at *some* order
(Mironov 2017, Proposition 1 and 3). More orders follow the best one more closely; fewer make
rounds and ledger entries smaller. Orders are written as decimal strings, because they are part
of a custom resource and of ledger entries, where a float would not survive a round trip.
"""

import re
from collections.abc import Sequence
from decimal import Decimal

Order = str | float | Decimal
"""An order α > 1, as a manifest writes it or as arithmetic needs it."""

DEFAULT_ORDERS: tuple[str, ...] = (
    *("2", "2.5", "3", "3.5", "4", "4.5", "5", "5.5", "6", "7", "8", "10"),
    *("12", "14", "16", "20", "24", "32", "48", "64", "80", "96", "144", "256"),
)
"""Orders of a block that names none.

Chosen by how many identical jobs fit a block before it is full, against a dense grid of 300
orders, over 14 mechanisms (the Gaussian, and Poisson-sampled ones with q in [0.001, 0.2] and σ in
[0.6, 5]) and 44 budgets (ε_G from 0.1 to 20, δ_G from 10⁻⁹ to 10⁻⁵), tight conversion. These 24
lose 2.1 % on average; the 12 orders of PrivateKube and DPack (1.5 … 64) lose 18.7 %, because
blocks with ε_G < 1 need orders above 64 and sampled mechanisms need dense ones just below the
order where their curve turns upward. No order is below 2: with δ_G ≤ 10⁻⁵ its capacity is
positive only for ε_G > 10. None is above 256: the cost of a curve grows with its largest order.
"""

MAX_ORDERS = 64
MAX_ORDER = 1024
"""Evaluating a curve at order α takes α terms; the largest order of dp-accounting's default set."""

_DECIMAL = re.compile(r"[0-9]{1,4}(\.[0-9]{1,6})?")


def parse_orders(orders: Sequence[str]) -> tuple[Decimal, ...]:
    """The orders that a manifest states, checked.

    >>> parse_orders(["1.5", "2", "64"])
    (Decimal('1.5'), Decimal('2'), Decimal('64'))

    Raises:
        ValueError: Not 1 to 64 plain decimal numbers in (1, 1024], strictly increasing.
    """
    if isinstance(orders, str) or not 1 <= len(orders) <= MAX_ORDERS:
        raise ValueError(f"orders: expected a list of 1 to {MAX_ORDERS} Rényi orders.")
    parsed: list[Decimal] = []
    for text in orders:
        if not isinstance(text, str) or not _DECIMAL.fullmatch(text):
            raise ValueError(f'orders: {text!r} is not a decimal number as a string, like "2.5".')
        order = Decimal(text)
        _check_range(order)
        if parsed and order <= parsed[-1]:
            raise ValueError(f"orders: {text} follows {parsed[-1]}; sort them, each only once.")
        parsed.append(order)
    return tuple(parsed)


def as_decimals(orders: Sequence[Order]) -> tuple[Decimal, ...]:
    """Orders in any of their forms as decimals; a float means its shortest decimal form.

    Raises:
        ValueError: An order outside (1, 1024].
    """
    decimals = tuple(o if isinstance(o, Decimal) else Decimal(str(o)) for o in orders)
    for order in decimals:
        _check_range(order)
    return decimals


def as_floats(orders: Sequence[Order]) -> tuple[float, ...]:
    """Orders in any of their forms as floats, checked as `as_decimals` does."""
    return tuple(float(order) for order in as_decimals(orders))


def _check_range(order: Decimal) -> None:
    if not 1 < order <= MAX_ORDER:
        raise ValueError(f"orders: {order} is outside (1, {MAX_ORDER}]; choose another order.")
