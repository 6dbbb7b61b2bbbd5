"""One round of a very large queue: how long a policy takes where it matters."""

import numpy as np

from dpmoe_operator.privacy.capacity import capacity
from dpmoe_operator.scheduling.round import Floats
from dpmoe_operator.simulate.amounts import spend_units
from dpmoe_operator.simulate.curves import gaussian, laplace
from dpmoe_operator.simulate.workload import Workload, make_workload

ORDERS: Floats = np.array([2.5, 3, 3.5, 4, 4.5, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 128])
MOST_BLOCKS = 19
"""Tasks ask for 1 to 19 blocks, ten on average."""

_KINDS = 500


def large(seed: int, *, tasks: int = 100_000, blocks: int = 1000) -> Workload:
    """Gaussian and Laplace tasks of many sizes, each on a run of neighbouring blocks."""
    rng = np.random.default_rng(seed)
    noises = np.geomspace(1.5, 40, _KINDS)
    curves = np.array([f(noise, ORDERS) for f in (gaussian, laplace) for noise in noises])
    counts = np.minimum(rng.integers(1, MOST_BLOCKS + 1, tasks), blocks)
    starts = rng.integers(0, blocks - counts + 1)
    room = capacity("10", "1e-7", ORDERS.tolist(), "classic")
    return make_workload(
        f"{tasks} tasks, {blocks} blocks",
        orders=ORDERS,
        capacity=np.tile(np.array(room, dtype=np.int64), (blocks, 1)),
        opened=np.zeros(blocks),
        demand=spend_units(curves)[rng.integers(0, len(curves), tasks)],
        asked=[
            np.arange(start, start + count)
            for start, count in zip(starts.tolist(), counts.tolist(), strict=True)
        ],
        arrival=np.zeros(tasks),
    )
