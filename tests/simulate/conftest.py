"""Small random workloads with every kind of oddity, and Hypothesis without randomness."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings

from dpmoe_operator.scheduling.round import ABSENT
from dpmoe_operator.simulate.workload import NEVER, Workload, make_workload

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def random_workload() -> Callable[[int], Workload]:
    """`random_workload(seed)`."""
    return at_random


def at_random(seed: int, tasks: int = 60, blocks: int = 6, orders: int = 3) -> Workload:
    """Small numbers, so that ties and exact fits happen; blocks open late, tasks leave early."""
    rng = np.random.default_rng(seed)
    opened = np.sort(rng.integers(0, 25, blocks)).astype(np.float64)
    opened[0] = 0.0
    capacity = rng.integers(-10, 60, (blocks, orders))
    capacity[rng.random((blocks, orders)) < 0.15] = ABSENT
    capacity[(capacity == ABSENT).all(axis=1), 0] = 40
    arrival = np.sort(rng.integers(0, 40, tasks)).astype(np.float64)
    kinds = rng.integers(0, 25, (15, orders))
    asked = []
    for time in arrival:
        there = int((opened <= time).sum())
        asked.append(rng.choice(there, rng.integers(1, there + 1), replace=False))
    # The last row is a cap on the first block, for a third of the tasks that ask for it.
    capped = [
        np.append(rows, blocks) if 0 in rows and rng.random() < 0.33 else rows for rows in asked
    ]
    return make_workload(
        f"random {seed}",
        orders=np.arange(2, orders + 2, dtype=np.float64),
        capacity=np.vstack([capacity, np.full(orders, 30)]),
        opened=np.append(opened, 0.0),
        is_cap=np.arange(blocks + 1) == blocks,
        demand=kinds[rng.integers(0, len(kinds), tasks)],
        asked=capped,
        arrival=arrival,
        weight=rng.choice([0.5, 1.0, 3.0], tasks),
        priority=rng.choice([0, 0, 0, 1], tasks).astype(np.int64),
        timeout=rng.choice([3.0, 12.0, NEVER], tasks),
    )
