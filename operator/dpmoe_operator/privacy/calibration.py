"""From (ε, δ) to the noise multiplier of a run, and back, for one job taken by itself.

Users state either; the operator computes the other and pins σ, q and steps. Accounting here uses
dp-accounting's dense default orders and the tight conversion (Canonne, Kamath, Steinke 2020,
Proposition 12), so a job's own ε is smaller than what its curve on a block's few orders shows.
What holds: `epsilon_for(noise_multiplier_for(ε, …), …) <= ε`, and no noise multiplier that is
smaller by more than one part in 10⁴ would do.

The 156 orders are not all evaluated, since dp-accounting takes milliseconds for a curve. With an
exact curve r(α), (α−1)·(r(α) + cost(α)) is convex in α, hence r(α) + cost(α) is quasi-convex: it
falls, then rises. So the best integer order k is found by binary search, no order outside
(k−1, k+1) can be better, and the fractions on either side of k are searched in the same way.
Where to look, for k and for σ, is found by an estimate at integer orders in numpy. Nothing rests on
it: what is promised is what dp-accounting says at the orders that were chosen.
"""

import math
from collections.abc import Callable, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from functools import lru_cache

import numpy as np
from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS
from numpy.typing import NDArray

from dpmoe_operator.privacy.capacity import conversion_cost
from dpmoe_operator.privacy.mechanisms import MAX_STEPS, step_rdp

MIN_NOISE_MULTIPLIER = 0.01
MAX_NOISE_MULTIPLIER = 1000.0

_RELATIVE_STEP = 5e-5
"""Width of the final bracket; with the rounding below, σ is within 10⁻⁴ of the smallest."""

_MARGIN = 0.01
"""A trial keeps this share off the ends, so that every trial shrinks the bracket."""

_FIRST_BRACKET = 2e-3
"""Relative distance from the estimated σ of the first trial; it doubles until σ is enclosed."""

_TINY = 1e-300
_SIX_DIGITS_UP = Context(prec=6, rounding=ROUND_CEILING)
_INTEGERS = tuple(float(order) for order in DEFAULT_RDP_ORDERS if float(order).is_integer())
_FRACTIONS = tuple(float(order) for order in DEFAULT_RDP_ORDERS if not float(order).is_integer())


class CalibrationError(ValueError):
    """The asked privacy can't be had from the asked run. Names the field, the value, the remedy."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(f"{field}: {value}: {remedy}")


@lru_cache(maxsize=1 << 16)
def epsilon_for(noise_multiplier: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The ε at `delta` of a run: `steps` Poisson-sampled Gaussian steps.

    >>> round(epsilon_for(1.0, 1e-5, 0.01, 1000), 2)
    2.1

    Raises:
        CalibrationError: An argument is out of range.
    """
    _check_run(delta, sampling_rate, steps)
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        remedy = "must be a finite number above 0"
        raise CalibrationError("noise multiplier", noise_multiplier, remedy)
    return _epsilon(noise_multiplier, delta, sampling_rate, steps)


@lru_cache(maxsize=1 << 16)
def noise_multiplier_for(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The smallest noise multiplier with which the run is (ε, δ)-differentially private.

    Args:
        epsilon: Target ε > 0.
        delta: Target δ in (0, 1).
        sampling_rate: q in (0, 1].
        steps: Number of steps ≥ 1.

    Returns:
        σ in [0.01, 1000], rounded up to six significant digits.

    >>> noise_multiplier_for(2.0, 1e-5, 0.01, 1000)
    1.02229

    Raises:
        CalibrationError: An argument is out of range, or no σ in the range gives this ε.
    """
    _check_run(delta, sampling_rate, steps)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise CalibrationError("epsilon", epsilon, "must be a finite number above 0")
    if steps < 1:
        raise CalibrationError("steps", steps, "must be at least 1 to be calibrated")

    def guaranteed(sigma: float) -> float:
        return _epsilon(sigma, delta, sampling_rate, steps)

    def estimated(sigma: float) -> float:
        order = _best_integer(sigma, delta, sampling_rate, steps)
        return max(_estimate(sigma, delta, sampling_rate, steps, order), 0.0)

    guess = _smallest(estimated, epsilon, MIN_NOISE_MULTIPLIER, MAX_NOISE_MULTIPLIER)
    low, high = _bracket(guaranteed, epsilon, guess)
    if guaranteed(high) > epsilon:
        remedy = (
            f"needs a noise multiplier above {MAX_NOISE_MULTIPLIER:g} with delta {delta:g}, "
            f"sampling rate {sampling_rate:g} and {steps} steps; ask for a larger epsilon, "
            "fewer steps or a smaller batch"
        )
        raise CalibrationError("epsilon", epsilon, remedy)
    if guaranteed(low) <= epsilon:
        remedy = (
            f"is met by a noise multiplier below {MIN_NOISE_MULTIPLIER:g}, which protects nobody; "
            "ask for a smaller epsilon"
        )
        raise CalibrationError("epsilon", epsilon, remedy)
    sigma = _smallest(guaranteed, epsilon, low, high)
    rounded = float(_SIX_DIGITS_UP.create_decimal(Decimal(sigma)))
    assert epsilon_for(rounded, delta, sampling_rate, steps) <= epsilon, "ε rose with σ"
    return rounded


def _check_run(delta: float, sampling_rate: float, steps: int) -> None:
    if not 0 < delta < 1:
        raise CalibrationError("delta", delta, "must lie strictly between 0 and 1")
    if not 0 < sampling_rate <= 1:
        raise CalibrationError("sampling rate", sampling_rate, "must lie in (0, 1]")
    if not 0 <= steps <= MAX_STEPS or steps != int(steps):
        raise CalibrationError("steps", steps, f"must be a whole number in [0, {MAX_STEPS}]")


@lru_cache(maxsize=1 << 12)
def _epsilon(sigma: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The smallest ε that one of dp-accounting's default orders certifies."""
    if steps == 0:
        return 0.0

    @lru_cache
    def at(order: float) -> float:
        (rdp,) = step_rdp(sigma, sampling_rate, (order,))
        return steps * rdp + _cost(order, delta)

    order = _best_integer(sigma, delta, sampling_rate, steps)
    best = at(order)
    # An order whose conversion alone costs more needs no evaluation.
    near = [a for a in _FRACTIONS if abs(a - order) < 1 and _cost(a, delta) < best]
    for side in ([a for a in near if a < order], [a for a in near if a > order]):
        if side:
            best = min(best, at(_lowest(at, side)))
    return max(0.0, best)


def _best_integer(sigma: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The integer order that seems to certify the smallest ε."""
    return _lowest(lambda order: _estimate(sigma, delta, sampling_rate, steps, order), _INTEGERS)


def _lowest(value: Callable[[float], float], orders: Sequence[float]) -> float:
    """The order of the lowest value, where values fall and then rise along the orders."""
    low, high = 0, len(orders) - 1
    while low < high:
        middle = (low + high) // 2
        if value(orders[middle]) <= value(orders[middle + 1]):
            high = middle
        else:
            low = middle + 1
    return orders[low]


def _estimate(sigma: float, delta: float, sampling_rate: float, steps: int, order: float) -> float:
    """ε at an integer order α, in floating point.

    One step's divergence is ln Σ_k C(α,k) (1−q)^(α−k) q^k e^{(k²−k)/(2σ²)} / (α−1) (Mironov,
    Talwar, Zhang 2019, section 3.3).
    """
    powers = np.arange(order + 1)
    exponents = (powers * powers - powers) / (2 * sigma**2)
    if sampling_rate < 1:
        exponents += _log_binomials(int(order)) + powers * math.log(sampling_rate)
        exponents += (order - powers) * math.log1p(-sampling_rate)
        largest = exponents.max()
        total = largest + math.log(np.exp(exponents - largest).sum())
    else:
        total = exponents[-1]
    return float(steps * total / (order - 1) + _cost(order, delta))


@lru_cache
def _log_binomials(order: int) -> NDArray[np.float64]:
    """The logarithms of C(α, k) for k from 0 to α."""
    factorials = np.cumsum(np.log(np.maximum(np.arange(order + 1.0), 1)))
    binomials: NDArray[np.float64] = factorials[-1] - factorials - factorials[::-1]
    return binomials


@lru_cache(maxsize=1 << 14)
def _cost(order: float, delta: float) -> float:
    return float(conversion_cost(Decimal(str(order)), Decimal(delta), "tight"))


def _bracket(
    guaranteed: Callable[[float], float], epsilon: float, guess: float
) -> tuple[float, float]:
    """Around a guess, a σ that is too small and one that is not, as far as the range has them."""
    low, high, width = guess, guess, 1 + _FIRST_BRACKET
    while guaranteed(low) <= epsilon and low > MIN_NOISE_MULTIPLIER:
        low, high, width = max(low / width, MIN_NOISE_MULTIPLIER), low, width**2
    while guaranteed(high) > epsilon and high < MAX_NOISE_MULTIPLIER:
        low, high, width = high, min(high * width, MAX_NOISE_MULTIPLIER), width**2
    return low, high


def _smallest(
    guaranteed: Callable[[float], float], epsilon: float, low: float, high: float
) -> float:
    """The smallest σ in (low, high] with `guaranteed(σ)` ≤ ε, to `_RELATIVE_STEP`.

    `guaranteed` falls with σ; it is above ε at `low` and not at `high`. False position on
    logarithms, where the curve is nearly a line, with the Illinois rule (Dowell and Jarratt 1971):
    the excess of an end that stays twice is halved, so that both ends close in.
    """

    def excess(sigma: float) -> float:
        return math.log(max(guaranteed(sigma), _TINY) / epsilon)

    at_low, at_high, stayed = excess(low), excess(high), ""
    while high > low * (1 + _RELATIVE_STEP):
        share = min(max(at_low / (at_low - at_high), _MARGIN), 1 - _MARGIN)
        trial = low * (high / low) ** share
        at_trial = excess(trial)
        if at_trial > 0:
            low, at_low = trial, at_trial
            at_high, stayed = (at_high / 2 if stayed == "high" else at_high), "high"
        else:
            high, at_high = trial, at_trial
            at_low, stayed = (at_low / 2 if stayed == "low" else at_low), "low"
    return high
