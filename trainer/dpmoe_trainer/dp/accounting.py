"""The trainer's own look at the plan's privacy: a second accountant must agree before training.

The operator computes a plan's cost with dp-accounting; here Opacus computes it again from what the
trainer will run, (σ, q, steps). Both convert RDP to (ε, δ) by Canonne, Kamath and Steinke 2020
(arXiv 2004.00010, proposition 12; Opacus cites the same bound from Balle et al. 2020).

On the subsampled Gaussian's RDP they agree to about 10⁻¹² at integer orders. At fractional orders
(1.5, 2.5, …) dp-accounting adds the absolute values of a series whose terms change sign, so its
curve is the higher: by less than 10⁻⁶ above order 10, by percents near order 2, and by tens of
percents, or without a value, below it. Opacus keeps the signs. So on the plan's orders and its own
default ones, which are as dense as those that the operator calibrates on, Opacus' ε can be below
the plan's, which is safe, and is above it only if the plan is wrong.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from opacus.accountants import RDPAccountant

_TOLERANCE = 1e-3


class AccountingMismatch(ValueError):
    """The plan's values do not give the privacy that the plan states."""


def check_plan(
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    epsilon: float,
    delta: float,
    orders: Sequence[float],
) -> None:
    """Checks that a plan costs no more than the ε it states.

    Args:
        noise_multiplier: σ.
        sampling_rate: q.
        steps: How many steps the plan has.
        epsilon: ε that the plan states.
        delta: δ.
        orders: The plan's RDP orders α.

    Raises:
        AccountingMismatch: A value makes no sense, or Opacus' ε at δ, the best over the plan's
            orders and its own, is above the plan's by more than a relative 10⁻³.
    """
    _require_sensible(noise_multiplier, sampling_rate, steps, delta, orders)
    _require(epsilon > 0 and math.isfinite(epsilon), "epsilon", epsilon, "a positive number")
    found = _epsilon(noise_multiplier, sampling_rate, steps, delta, orders)
    if not found <= epsilon * (1 + _TOLERANCE):
        raise AccountingMismatch(
            f"epsilon is {epsilon:g} in the plan, but noise multiplier {noise_multiplier:g}, "
            f"sampling rate {sampling_rate:g} and {steps} steps cost {found:g} at delta "
            f"{delta:g}: raise the noise, take fewer steps, or state the larger epsilon"
        )


def spent(
    noise_multiplier: float, sampling_rate: float, steps: int, delta: float, orders: Sequence[float]
) -> float:
    """The ε at δ that the steps run so far have cost, zero for none.

    The best over the plan's orders and Opacus' own; never above the plan's way of counting.

    Raises:
        AccountingMismatch: A value makes no sense.
    """
    if steps == 0:
        return 0.0
    _require_sensible(noise_multiplier, sampling_rate, steps, delta, orders)
    return _epsilon(noise_multiplier, sampling_rate, steps, delta, orders)


def _epsilon(
    noise_multiplier: float, sampling_rate: float, steps: int, delta: float, orders: Sequence[float]
) -> float:
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sampling_rate, steps)]
    alphas = sorted({*RDPAccountant.DEFAULT_ALPHAS, *orders})
    with warnings.catch_warnings():
        # That the best order is the first or last one is no reason to change the plan's.
        warnings.filterwarnings("ignore", message="Optimal order is the")
        return max(0.0, accountant.get_epsilon(delta, alphas=alphas))


def _require_sensible(
    noise_multiplier: float, sampling_rate: float, steps: int, delta: float, orders: Sequence[float]
) -> None:
    positive = noise_multiplier > 0 and math.isfinite(noise_multiplier)
    _require(positive, "noise_multiplier", noise_multiplier, "a positive number")
    _require(0 < sampling_rate <= 1, "sampling_rate", sampling_rate, "a probability in (0, 1]")
    _require(isinstance(steps, int) and steps > 0, "steps", steps, "a positive whole number")
    _require(0 < delta < 1, "delta", delta, "a probability in (0, 1)")
    good = bool(orders) and all(math.isfinite(order) and order > 1 for order in orders)
    _require(good, "orders", list(orders), "at least one order, all above 1")


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise AccountingMismatch(f"{name} is {value!r}: give {wanted}")
