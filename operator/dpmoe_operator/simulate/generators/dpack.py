"""The offline microbenchmarks of DPack: heterogeneity as two knobs.

Tholoniat et al., EuroSys 2025, Section 6.2, by the rules of the authors' generator (see `zoo`):

- *Blocks knob*: how much the number of blocks that tasks ask for varies. 20 blocks, 1000 tasks.
- *Orders knob*: how much the best orders of tasks vary. One block, 1000 tasks.

`both` turns both at once, which no published experiment does; it is where a policy that prices
blocks and picks their orders together has most to win.
"""

import numpy as np

from dpmoe_operator.scheduling.round import Floats, Ints
from dpmoe_operator.simulate.amounts import capacity_units, spend_units
from dpmoe_operator.simulate.workload import Workload, make_workload
from dpmoe_operator.simulate.zoo import CAPACITY, ORDERS, Zoo, build_zoo

MEAN_BLOCKS = 10
FLATNESS = (0.05, 0.03)

EXACT_FIT = 1 - 1e-7
"""Demands are this much smaller, so that twenty tasks of a twentieth fit a block although each is
rounded up. The published simulator compares with a tolerance to the same end."""


def blocks_knob(seed: int, spread: float, *, tasks: int = 1000, blocks: int = 20) -> Workload:
    """Tasks of best order 5 that ask for 10 blocks, give or take `spread`."""
    zoo = build_zoo(least_demand=0.01, smallest=0.05, order_spread=0, flatness=None)
    return _drawn(f"DPack, blocks knob {spread:g}", seed, zoo, tasks, blocks, spread)


def orders_knob(seed: int, spread: float, *, smallest: float = 0.01, tasks: int = 1000) -> Workload:
    """Tasks of many best orders that ask for one block, for `smallest` of it at their best."""
    zoo = build_zoo(least_demand=0.05, smallest=smallest, order_spread=spread, flatness=FLATNESS)
    return _drawn(f"DPack, orders knob {spread:g}", seed, zoo, tasks, 1, None)


def both_knobs(
    seed: int,
    *,
    block_spread: float = 4.0,
    order_spread: float = 8.0,
    smallest: float = 0.02,
    tasks: int = 1000,
    blocks: int = 20,
) -> Workload:
    """Tasks of many best orders that ask for many numbers of blocks."""
    zoo = build_zoo(
        least_demand=0.05, smallest=smallest, order_spread=order_spread, flatness=FLATNESS
    )
    return _drawn("DPack, both knobs", seed, zoo, tasks, blocks, block_spread)


def _drawn(
    name: str, seed: int, zoo: Zoo, tasks: int, blocks: int, block_spread: float | None
) -> Workload:
    """Tasks drawn from a zoo, each with random blocks; how many is drawn once for each curve.

    With `block_spread` None, every task asks for one block.
    """
    rng = np.random.default_rng(seed)
    per_curve = np.ones(len(zoo.frequency), dtype=np.int64)
    if block_spread is not None:
        per_curve = _block_counts(rng, len(zoo.frequency), block_spread, blocks)
    drawn = rng.choice(len(zoo.frequency), tasks, p=zoo.frequency)
    curves = spend_units(zoo.normalised * CAPACITY * EXACT_FIT)
    return make_workload(
        name,
        orders=ORDERS,
        capacity=np.tile(capacity_units(CAPACITY), (blocks, 1)),
        opened=np.zeros(blocks),
        demand=curves[drawn],
        asked=[
            np.sort(rng.choice(blocks, count, replace=False)).astype(np.int64)
            for count in per_curve[drawn].tolist()
        ],
        arrival=np.zeros(tasks),
    )


def _block_counts(rng: np.random.Generator, curves: int, spread: float, blocks: int) -> Ints:
    """int64[C] in [1, blocks]: draws from a normal distribution on whole numbers."""
    mean = min(MEAN_BLOCKS, blocks)
    if spread == 0:
        return np.full(curves, mean, dtype=np.int64)
    numbers = np.arange(1, blocks + 1)
    density: Floats = np.exp(-((numbers - mean) ** 2) / (2 * spread**2))
    return rng.choice(numbers, curves, p=density / density.sum()).astype(np.int64)
