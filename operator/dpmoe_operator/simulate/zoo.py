"""The 620 curves that DPack's heterogeneity experiments draw their tasks from.

Tholoniat et al., EuroSys 2025, Section 6.2. The rules are those of the authors' published
generator: which mechanisms, how their curves are shifted and bent, and how often each is drawn.
Demands are *normalised*: over the capacity of a block of (10, 10⁻⁷), at the orders where that is
positive. The *best order* of a curve is the one of its smallest normalised demand.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from dpmoe_operator.privacy.mechanisms import subsampled_gaussian_rdp
from dpmoe_operator.scheduling.round import Floats, Ints
from dpmoe_operator.simulate.curves import (
    PUBLISHED_ORDERS,
    gaussian,
    laplace,
    subsampled_laplace,
)

EPSILON, DELTA = 10.0, 1e-7

_CLASSIC = EPSILON - np.log(1 / DELTA) / (PUBLISHED_ORDERS - 1)
ORDERS: Floats = PUBLISHED_ORDERS[_CLASSIC > 0]
"""Orders at which such a block has capacity: 3 to 64."""
CAPACITY: Floats = _CLASSIC[_CLASSIC > 0]

_CENTRE = 5.0
"""The best order from which the order knob counts."""
_FLAT = np.isin(ORDERS, (4.0, 5.0, 6.0, 8.0))
"""Orders between which a curve's flatness is measured."""
_LEAST_FREQUENCY = 1e-9


@dataclass(frozen=True, eq=False)
class Zoo:
    """A set of curves, with how often each is drawn.

    Attributes:
        normalised: float64[C, A], demands over capacity at `ORDERS`.
        frequency: float64[C], adding up to 1.
    """

    normalised: Floats
    frequency: Floats

    @property
    def best_order(self) -> Floats:
        """float64[C]: where each curve's normalised demand is smallest."""
        best: Floats = ORDERS[self.normalised.argmin(axis=1)]
        return best


@cache
def all_curves() -> Floats:
    """float64[620, A]: normalised curves of all mechanisms of the published zoo."""
    noises = np.geomspace(0.01, 10, 100)
    scales = (0.05, 0.1, 0.5, 1, 2, 3, 4, 5)
    curves = [gaussian(sigma, ORDERS) for sigma in noises]
    # A DP-FTRL run releases one Gaussian a level of a tree over the data.
    curves += [
        gaussian(sigma, ORDERS) * np.ceil(np.log(size))
        for sigma in np.geomspace(0.01, 10, 10)
        for size in np.geomspace(1e3, 1e8, 10)
    ]
    curves += [laplace(scale, ORDERS) for scale in noises]
    for one, other in product(scales, scales):
        curves.append(laplace(one, ORDERS) + gaussian(other, ORDERS))
        curves.append(laplace(one, ORDERS) + laplace(other, ORDERS))
    rates, multipliers = (0.001, 0.01, 0.05, 0.1, 0.2, 0.5), (0.1, 0.5, 1, 2)
    for epochs, rate, noise in product((1, 10, 100, 200), rates, multipliers):
        steps = round(epochs / rate)
        curves.append(subsampled_gaussian_rdp(noise, rate, steps, ORDERS.tolist()))
        curves.append(subsampled_laplace(noise, rate, steps, ORDERS))
    return np.array(curves) / CAPACITY


def build_zoo(
    *,
    least_demand: float,
    smallest: float,
    order_spread: float,
    flatness: tuple[float, float] | None,
) -> Zoo:
    """The zoo, normalised as the experiments do.

    Args:
        least_demand: Only curves whose smallest normalised demand lies between this and 1.
        smallest: Each curve is shifted so that this is its smallest normalised demand.
        order_spread: The knob for best orders; 0 draws those of best order 5 only. Larger values
            weigh a curve by exp(+k²/2σ²), k places from 5, as the published generator does: with
            σ of 0.5 or 1 nearly all are of best order 64, and from 1.5 on the mix evens out.
        flatness: Mean and spread of the curves' range between orders 4 and 8; as it is if None.
    """
    curves = all_curves()
    floor = curves.min(axis=1)
    kept = curves[(floor > least_demand) & (floor < 1)]
    shifted = kept - kept.min(axis=1, keepdims=True) + smallest
    if flatness is not None:
        shifted = _bent(shifted, *flatness)
    floor = shifted.min(axis=1)
    final = shifted[(floor > 1e-10) & (floor < 1)]
    frequency = _frequencies(final.argmin(axis=1), order_spread)
    drawn = frequency > _LEAST_FREQUENCY
    return Zoo(final[drawn], frequency[drawn] / frequency[drawn].sum())


def _bent(curves: Floats, mean: float, spread: float) -> Floats:
    """Scale each curve above its minimum, so that ranges have a mean and spread by best order."""
    best = curves.argmin(axis=1)
    ranges = np.ptp(curves[:, _FLAT], axis=1)
    wanted = np.empty(len(curves))
    for order in np.unique(best):
        group = best == order
        deviation = ranges[group] - ranges[group].mean()
        # One curve alone has no spread to be measured in; the published generator drops it.
        usual = ranges[group].std(ddof=1) if group.sum() > 1 else np.nan
        wanted[group] = mean + spread * deviation / usual
    kept = np.isfinite(wanted)
    floor = curves[kept].min(axis=1, keepdims=True)
    bent: Floats = floor + (wanted / ranges)[kept, None] * (curves[kept] - floor)
    return bent


def _frequencies(best: Ints, spread: float) -> Floats:
    """A bin of best orders by its distance from the centre, then a curve of it uniformly."""
    centre = int(np.flatnonzero(ORDERS == _CENTRE)[0])
    weight: Floats
    if spread == 0:
        weight = (best == centre).astype(np.float64)
    else:
        weight = np.exp((best - centre) ** 2 / (2 * spread**2))
        weight /= np.bincount(best)[best]
    weight /= weight.sum()
    return weight
