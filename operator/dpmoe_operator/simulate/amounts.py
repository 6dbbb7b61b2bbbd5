"""Whole arrays of ε in budget units: `privacy.units` at once, and against the spender as there.

A product x·10⁹ in float64 may be rounded to the wrong side of an integer. Dekker's two-product
(Dekker, "A floating-point technique for extending the available precision", 1971) gives the
rounding error exactly, and its sign says on which side the true product lies.
"""

import numpy as np
from numpy.typing import NDArray

from dpmoe_operator.privacy.units import MAX_UNITS, NANO
from dpmoe_operator.scheduling.round import Floats, Ints

_SPLITTER = 2.0**27 + 1
_NEGLIGIBLE = 1e-30


def spend_units(epsilon: NDArray[np.float64]) -> Ints:
    """Units of spends, rounded up; infinite, NaN and huge spends saturate to `MAX_UNITS`.

    >>> spend_units(np.array([0.1, 0.5, np.inf, np.nan])).tolist()
    [100000001, 500000000, 9000000000000000, 9000000000000000]

    Raises:
        ValueError: A spend is negative.
    """
    if (epsilon < 0).any():
        raise ValueError(f"A privacy spend can't be negative: {epsilon[epsilon < 0][0]}.")
    hopeless = ~(epsilon < MAX_UNITS / NANO)
    rounded, error = _times_nano(np.where(hopeless, 0.0, epsilon))
    units = np.ceil(rounded)
    units += (units == rounded) & (error > 0)
    return np.where(hopeless, MAX_UNITS, np.minimum(units, MAX_UNITS)).astype(np.int64)


def capacity_units(epsilon: NDArray[np.float64]) -> Ints:
    """Units of capacities, rounded down and kept within ±`MAX_UNITS` (exclusive above).

    >>> capacity_units(np.array([0.3, -0.5, np.inf])).tolist()
    [299999999, -500000000, 8999999999999999]

    Raises:
        ValueError: A capacity is not a number.
    """
    if np.isnan(epsilon).any():
        raise ValueError("A privacy capacity must be a number, not NaN.")
    limit = MAX_UNITS / NANO
    rounded, error = _times_nano(np.clip(epsilon, -limit, limit))
    units = np.floor(rounded)
    units -= (units == rounded) & (error < 0)
    return np.clip(units, -MAX_UNITS, MAX_UNITS - 1).astype(np.int64)


def _times_nano(x: Floats) -> tuple[Floats, Floats]:
    """x·10⁹ as a rounded product and its rounding error, exactly (for |x| ≥ 10⁻³⁰).

    Smaller ones are moved to that bound: they round to the same integers, and their errors would
    underflow.
    """
    x = np.where((x != 0) & (abs(x) < _NEGLIGIBLE), np.copysign(_NEGLIGIBLE, x), x)
    product = x * NANO
    high, low = _split(x)
    factor_high, factor_low = _split(np.float64(NANO))
    error = ((high * factor_high - product) + high * factor_low + low * factor_high) + (
        low * factor_low
    )
    return product, error


def _split(x: Floats | np.float64) -> tuple[Floats, Floats]:
    """The number as a sum of two that have 26 significant bits each."""
    scaled = x * _SPLITTER
    high = scaled - (scaled - x)
    return np.asarray(high), np.asarray(x - high)
