"""Budget amounts are integers, in units of 10⁻⁹ ε, so that the ledger is exact.

A float that is compared against a budget decides differently on another machine, and sums of
floats depend on their order. So amounts cross into integers once, here, and always against the
spender: spends round up, capacities round down. What holds:

- `spend_units(x) * 1e-9 >= x` and `capacity_units(x) * 1e-9 <= x`, exactly.
- An amount at or above `MAX_UNITS` means "more than any budget". No capacity reaches it, so it
  never fits; every doubtful spend (infinite, not a number, huge) becomes it.
- Sums of a few hundred amounts stay within a 64-bit integer.
"""

from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal

NANO = 10**9
"""Units in one ε."""

MAX_UNITS = 9 * 10**15
"""Saturation: nine million ε. An amount at or above it never fits. Exact in a float64, too."""

_MAX_EPSILON = Decimal(MAX_UNITS) / NANO
_UP = Context(prec=60, rounding=ROUND_CEILING)
_DOWN = Context(prec=60, rounding=ROUND_FLOOR)
_SIGNIFICANT_DIGITS = 4


def spend_units(epsilon: Decimal | float) -> int:
    """Units of a spend, rounded up; infinite, NaN and huge spends saturate to `MAX_UNITS`.

    >>> spend_units(0.1), spend_units(Decimal("0.1")), spend_units(float("inf"))
    (100000001, 100000000, 9000000000000000)

    Raises:
        ValueError: The spend is negative: budget never comes back as a spend.
    """
    amount = Decimal(epsilon)
    if amount.is_nan():
        return MAX_UNITS
    if amount < 0:
        raise ValueError(f"A privacy spend can't be negative: {epsilon}.")
    if amount >= _MAX_EPSILON:
        return MAX_UNITS
    # Rounding the product up to 60 digits first can't change where its ceiling lies.
    return int(_UP.multiply(amount, Decimal(NANO)).to_integral_value(ROUND_CEILING))


def capacity_units(epsilon: Decimal | float) -> int:
    """Units of a capacity, rounded down and kept within ±`MAX_UNITS` (exclusive above).

    Capacities at small Rényi orders are often negative: nothing fits there.

    >>> capacity_units(Decimal("1.9999999999")), capacity_units(-0.5)
    (1999999999, -500000000)

    Raises:
        ValueError: The capacity is not a number.
    """
    amount = Decimal(epsilon)
    if amount.is_nan():
        raise ValueError("A privacy capacity must be a number, not NaN.")
    if amount >= _MAX_EPSILON:
        return MAX_UNITS - 1
    if amount <= -_MAX_EPSILON:
        return -MAX_UNITS
    return int(_DOWN.multiply(amount, Decimal(NANO)).to_integral_value(ROUND_FLOOR))


def saturate(units: int) -> int:
    """A sum of spends as the arrays of a round hold it: never above `MAX_UNITS`.

    A sum that reaches `MAX_UNITS` is above every capacity, so how far above decides nothing.
    """
    if units < 0:
        raise ValueError(f"A sum of privacy spends can't be negative: {units} units.")
    return min(units, MAX_UNITS)


def to_epsilon(units: int) -> Decimal:
    """The exact ε of an amount.

    >>> to_epsilon(1_500_000_000)
    Decimal('1.5')
    """
    return Decimal(units) / NANO


def format_epsilon(units: int) -> str:
    """An amount for people: four significant digits, every digit before the point, no exponent.

    >>> [format_epsilon(u) for u in (0, 1, 1_234_567_891, -500_000_000, 12_345_678_900_000)]
    ['0', '0.000000001', '1.235', '-0.5', '12346']
    >>> format_epsilon(MAX_UNITS)
    '∞'
    """
    if abs(units) >= MAX_UNITS:
        return "∞" if units > 0 else "-∞"
    epsilon = to_epsilon(units)
    decimals = max(0, _SIGNIFICANT_DIGITS - 1 - epsilon.adjusted())
    rounded = epsilon.quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_HALF_EVEN)
    text = f"{rounded:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
