"""The microbenchmarks of PrivateKube (Luo et al., OSDI 2021, Section 6.1).

Tasks arrive as a Poisson process. Three quarters of them ("mice") ask for a hundredth of a block's
ε and one quarter ("elephants") for a tenth, each discounted by up to 10⁻⁷ of it at random, so that
no two ask for the same. With many blocks, one opens every ten seconds, and three quarters of the
tasks ask for the latest block and one quarter for the latest ten.

Under basic composition ε adds up. Under Rényi composition each task is a Gaussian mechanism of its
(ε, δ = 10⁻⁹), and blocks have (1, 10⁻⁶), on the orders and with the conversion of the paper's
simulator. Its orders of no capacity (16 is the first usable one) are left out: nothing fits there.
"""

import numpy as np

from dpmoe_operator.scheduling.round import Floats, Ints
from dpmoe_operator.simulate.amounts import capacity_units, spend_units
from dpmoe_operator.simulate.workload import Workload, make_workload

BLOCK_EPSILON, BLOCK_DELTA, TASK_DELTA = 1.0, 1e-6, 1e-9
MOUSE, ELEPHANT, MICE = 0.01, 0.1, 0.75
FEW, MANY = 1, 10
BLOCK_INTERVAL = 10.0
INITIAL_BLOCKS = 12
"""The simulator's `init_amount` of 11, and the one that its loop makes before it first waits."""

BASIC_INTERVAL, RENYI_INTERVAL = 0.078125, 0.004264781
"""Mean seconds between tasks where the many-block experiments are contended."""

RENYI_ORDERS = np.array([16, 32, 64, 128, 256, 512, 1024, 2048, 20480], dtype=np.float64)
BASIC_ORDERS = np.array([2.0])
"""Basic composition is one column of amounts; its order has no meaning."""


def single_block(seed: int, *, interval: float = 1.0, seconds: float = 236.0) -> Workload:
    """One block, basic composition (Figure 6)."""
    rng = np.random.default_rng(seed)
    arrival = _poisson(rng, interval, seconds)
    return make_workload(
        "PrivateKube, one block",
        orders=BASIC_ORDERS,
        capacity=capacity_units(np.full((1, 1), BLOCK_EPSILON)),
        opened=np.zeros(1),
        demand=spend_units(_epsilons(rng, len(arrival)))[:, None],
        asked=[np.zeros(1, dtype=np.int64)] * len(arrival),
        arrival=arrival,
    )


def multi_block(
    seed: int, *, renyi: bool = False, interval: float | None = None, seconds: float = 300.0
) -> Workload:
    """A block every ten seconds; basic composition (Figures 8, 9) or Rényi's (Figure 10).

    Args:
        seed: Of all random draws.
        renyi: Whether amounts are Rényi curves.
        interval: Mean seconds between tasks; the paper's if None.
        seconds: How long tasks arrive.
    """
    rng = np.random.default_rng(seed)
    if interval is None:
        interval = RENYI_INTERVAL if renyi else BASIC_INTERVAL
    arrival = _poisson(rng, interval, seconds)
    epsilons = _epsilons(rng, len(arrival))
    counts = np.where(rng.random(len(arrival)) < MICE, FEW, MANY)
    opened = np.concatenate(
        (np.zeros(INITIAL_BLOCKS), np.arange(BLOCK_INTERVAL, seconds, BLOCK_INTERVAL))
    )
    there = np.searchsorted(opened, arrival, side="right")
    return make_workload(
        f"PrivateKube, many blocks, {'Rényi' if renyi else 'basic'}",
        orders=RENYI_ORDERS if renyi else BASIC_ORDERS,
        capacity=np.tile(_capacity(renyi), (len(opened), 1)),
        opened=opened,
        demand=_gaussian(epsilons) if renyi else spend_units(epsilons)[:, None],
        asked=[
            np.arange(end - count, end)
            for end, count in zip(there.tolist(), counts.tolist(), strict=True)
        ],
        arrival=arrival,
    )


def _poisson(rng: np.random.Generator, interval: float, seconds: float) -> Floats:
    """Arrivals with exponential gaps until `seconds`."""
    expected = seconds / interval
    gaps = rng.exponential(interval, int(expected + 10 * expected**0.5 + 10))
    arrival = np.cumsum(gaps)
    return arrival[arrival < seconds]


def _epsilons(rng: np.random.Generator, tasks: int) -> Floats:
    size = np.where(rng.random(tasks) < MICE, MOUSE, ELEPHANT)
    return size * rng.uniform(1 - 1e-7, 1, tasks)


def _gaussian(epsilons: Floats) -> Ints:
    """Curves α/2σ² with the classical σ = √(2 ln(1.25/δ))/ε (Dwork and Roth 2014, Theorem A.1)."""
    sigma = np.sqrt(2 * np.log(1.25 / TASK_DELTA)) / epsilons
    return spend_units(RENYI_ORDERS / (2 * sigma[:, None] ** 2))


def _capacity(renyi: bool) -> Ints:
    if not renyi:
        return capacity_units(np.array([BLOCK_EPSILON]))
    return capacity_units(BLOCK_EPSILON - np.log(1 / BLOCK_DELTA) / (RENYI_ORDERS - 1))
