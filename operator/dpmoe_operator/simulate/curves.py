"""Rényi curves of mechanisms that published workloads are made of.

They are floats in ε on float64[A] orders, and become budget units where a workload is built. The
curve of a training run is in `privacy.mechanisms`; the others are needed only to replay workloads.
"""

import math
from collections.abc import Callable

import numpy as np

from dpmoe_operator.scheduling.round import Floats

PUBLISHED_ORDERS = np.array([1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 16, 32, 64])
"""The orders of DPack and of the Alibaba-DP workload."""


def gaussian(sigma: float, orders: Floats) -> Floats:
    """α/2σ², sensitivity 1 (Mironov 2017, Proposition 7).

    >>> gaussian(2.0, np.array([2.0, 8.0])).tolist()
    [0.25, 1.0]
    """
    return orders / (2 * sigma**2)


def laplace(scale: float, orders: Floats) -> Floats:
    """Laplace noise of a scale λ, sensitivity 1 (Mironov 2017, Proposition 6).

    1/(α−1) · ln[ α/(2α−1) · e^{(α−1)/λ} + (α−1)/(2α−1) · e^{−α/λ} ], in logarithms throughout.
    """
    towards = np.log(orders / (2 * orders - 1)) + (orders - 1) / scale
    away = np.log((orders - 1) / (2 * orders - 1)) - orders / scale
    return np.logaddexp(towards, away) / (orders - 1)


def subsampled_laplace(scale: float, rate: float, steps: float, orders: Floats) -> Floats:
    """`steps` Laplace steps, each on a Poisson sample of rate q.

    At whole orders the exact moment of Zhu and Wang, "Poisson subsampled Rényi differential
    privacy" (ICML 2019, Theorem 5); (α−1)·ε(α) is interpolated between them, as autodp does for
    the workloads of DPack.
    """

    def moment(order: int) -> float:
        """(α−1)·ε(α) of one step at a whole order α; the sum over how often a unit is sampled."""
        if order == 1:
            return 0.0
        sampled = np.arange(2.0, order + 1)
        ways = np.array([math.log(math.comb(order, count)) for count in range(2, order + 1)])
        terms = ways + sampled * math.log(rate) + (order - sampled) * math.log1p(-rate)
        terms += (sampled - 1) * laplace(scale, sampled)
        at_most_once = (order - 1) * math.log1p(-rate) + math.log1p((order - 1) * rate)
        return float(np.logaddexp.reduce([*terms, at_most_once]))

    return steps * _between_whole_orders(moment, orders) / (orders - 1)


def _between_whole_orders(moment: Callable[[int], float], orders: Floats) -> Floats:
    below, above = np.floor(orders), np.ceil(orders)
    part = orders - below
    at_below = np.array([moment(int(order)) for order in below])
    at_above = np.array([moment(int(order)) for order in above])
    between: Floats = (1 - part) * at_below + part * at_above
    return between
