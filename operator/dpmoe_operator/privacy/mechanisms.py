"""The Rényi curve of what a training run releases: Poisson-sampled Gaussian steps.

One step samples each privacy unit with probability q, sums clipped contributions and adds
Gaussian noise of standard deviation σ·C. Its curve on the orders is evaluated by dp-accounting
(Mironov, Talwar, Zhang, "Rényi differential privacy of the sampled Gaussian mechanism", 2019)
under add-or-remove-one adjacency, and steps compose by adding up. What holds:

- Curves are upper bounds, and linear in the number of steps: T steps cost T times one step.
- A fractional order costs no more than the next integer order.
- dp-accounting's series for fractional orders adds up absolute values of alternating terms. With
  much noise that overstates the cost (6,000-fold at α = 1.1, q = 0.01, σ = 1000), and with q near
  1/2 it doesn't converge and answers infinity. But (α−1)·ε(α) is a cumulant generating
  function, so convex, and 0 at α = 1: the chord between the neighbouring integer orders is an
  upper bound as well. The smaller of both counts.
"""

import logging
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from numpy.typing import NDArray

from dpmoe_operator.privacy.orders import Order, as_floats
from dpmoe_operator.privacy.units import spend_units

# Rounding errors of dp-accounting's integer orders, against 40-digit arithmetic, stay below
# 10⁻¹⁵ + 10⁻¹² r a step; they are paid for, so that no rounding makes a step free.
_ABSOLUTE_ERROR = 1e-15
_RELATIVE_ERROR = 1e-12

# Below, a step's cost overflows, and no bound is known; above, noise can only help.
_LEAST_SIGMA, _MOST_SIGMA = 1e-6, 1e6

MAX_STEPS = 10**12

# A fractional order that doesn't converge is bounded here by its chord, so nobody has to be told.
logging.getLogger("absl").addFilter(
    lambda record: "_compute_log_a_frac failed to converge" not in str(record.msg)
)


def subsampled_gaussian_rdp(
    noise_multiplier: float, sampling_rate: float, steps: int, orders: Sequence[Order]
) -> NDArray[np.float64]:
    """Rényi divergence bound of `steps` Poisson-sampled Gaussian steps, at each order.

    Args:
        noise_multiplier: σ, noise standard deviation over clipping norm; > 0.
        sampling_rate: q, probability that a privacy unit is in a step's batch; in (0, 1].
        steps: Number of steps T in [0, 10¹²].
        orders: Rényi orders α in (1, 1024].

    Returns:
        float64[A], in ε; infinite where no bound is known.

    >>> subsampled_gaussian_rdp(2.0, 1.0, 10, [2.0, 4.0]).round(6).tolist()
    [2.5, 5.0]

    Raises:
        ValueError: An argument is out of range.
    """
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        raise ValueError(f"noise multiplier: {noise_multiplier} must be finite and above 0.")
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"sampling rate: {sampling_rate} must lie in (0, 1].")
    if not 0 <= steps <= MAX_STEPS or steps != int(steps):
        raise ValueError(f"steps: {steps} must be a whole number in [0, {MAX_STEPS}].")
    alphas = as_floats(orders)
    if steps == 0:  # Apart, since 0 · ∞ is not a number.
        return np.zeros(len(alphas))
    return steps * np.array(_cached_step(float(noise_multiplier), float(sampling_rate), alphas))


def demand(
    noise_multiplier: float, sampling_rate: float, steps: int, orders: Sequence[Order]
) -> tuple[int, ...]:
    """`subsampled_gaussian_rdp` in budget units, rounded up; saturated where infinite."""
    curve = subsampled_gaussian_rdp(noise_multiplier, sampling_rate, steps, orders)
    return tuple(spend_units(float(epsilon)) for epsilon in curve)


def step_rdp(sigma: float, q: float, alphas: tuple[float, ...]) -> tuple[float, ...]:
    """The curve of one step, its rounding errors paid for; arguments as checked above."""
    if sigma < _LEAST_SIGMA:
        return (math.inf,) * len(alphas)
    sigma = min(sigma, _MOST_SIGMA)
    neighbours = {float(side) for a in alphas for side in (math.floor(a), math.ceil(a))}
    evaluated = tuple(sorted({*alphas, *neighbours} - {1.0}))
    rdp = dict(zip(evaluated, _dp_accounting_rdp(sigma, q, evaluated), strict=True))
    bounds = [min(rdp[a], _chord(a, rdp)) for a in alphas]
    return tuple(max(r, 0.0) * (1 + _RELATIVE_ERROR) + _ABSOLUTE_ERROR for r in bounds)


_cached_step = lru_cache(maxsize=4096)(step_rdp)


def _dp_accounting_rdp(sigma: float, q: float, alphas: tuple[float, ...]) -> list[float]:
    accountant = RdpAccountant(alphas)
    accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)))
    curve: list[float] = accountant._rdp.tolist()  # Its only way to hand out the whole curve.
    return curve


def _chord(alpha: float, rdp: dict[float, float]) -> float:
    """Bound at a fractional order by the chord of (α−1)·ε(α) between neighbouring integers."""
    below, above = math.floor(alpha), math.ceil(alpha)
    if below == above:
        return rdp[alpha]
    at_below = (below - 1) * rdp[below] if below > 1 else 0.0
    at_above = (above - 1) * rdp[above]
    weight = alpha - below
    return ((1 - weight) * at_below + weight * at_above) / (alpha - 1)
