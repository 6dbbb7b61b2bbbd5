"""Builders of rounds: from plain lists, and at random from a seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from dpmoe_operator.scheduling.round import ABSENT, Round

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

MakeRound = Callable[..., Round]


@pytest.fixture(scope="session")
def make_round() -> MakeRound:
    """`make_round(capacity, tasks, **fields)`; a task is (demand, blocks[, weight, priority])."""
    return build


@pytest.fixture(scope="session")
def random_round() -> MakeRound:
    """`random_round(seed, tasks, blocks, orders)`: contended, with every kind of oddity."""
    return at_random


@pytest.fixture(scope="session")
def elastic_round() -> MakeRound:
    """`elastic_round(seed, tasks, blocks, orders)`: as `random_round`, jobs of several points."""
    return elastic_at_random


@pytest.fixture(scope="session")
def best_weight() -> Callable[[Round], float]:
    """`best_weight(round)`: the weight of the best set that fits, by trying all sets."""
    return heaviest


def heaviest(round: Round) -> float:
    """For small amounts and at most a dozen tasks."""
    sets = (np.arange(2**round.tasks)[:, np.newaxis] >> np.arange(round.tasks)) & 1
    feasible = np.ones(len(sets), dtype=bool)
    for job in range(round.jobs):
        feasible &= sets[:, round.job_of_task == job].sum(axis=1) <= 1
    for block in range(round.blocks):
        asking = np.array([block in round.blocks_of(task) for task in range(round.tasks)], bool)
        asked = sets[:, asking] @ round.demand[asking]
        # A block that nobody in the set asks for need not hold: it may be overdrawn already.
        unasked = ~sets[:, asking].any(axis=1)
        feasible &= (asked <= round.available[block]).any(axis=1) | unasked
    return float((sets[feasible] @ round.weight).max())


@pytest.fixture(scope="session")
def curves_round() -> MakeRound:
    """`curves_round(seed, tasks, blocks, asked)`: Gaussian and Laplace curves, random blocks."""
    return of_curves


def of_curves(seed: int, tasks: int, blocks: int, asked: int) -> Round:
    rng = np.random.default_rng(seed)
    alpha = np.array([2.5, 3, 4, 5, 6, 8, 16, 32, 64])
    capacity = 10 - np.log(1e7) / (alpha - 1)
    noise = rng.uniform(1, 12, (tasks, 1))
    bounded = np.minimum(alpha / (2 * noise**2), 1 / noise)
    curve = np.where(rng.random((tasks, 1)) < 0.5, alpha / (2 * noise**2), bounded * 4)
    counts = rng.integers(1, asked + 1, tasks)
    rows = [np.sort(rng.choice(blocks, count, replace=False)) for count in counts]
    total = np.tile(np.floor(capacity * 1e9).astype(np.int64), (blocks, 1))
    return Round(
        orders=alpha,
        demand=np.ceil(curve * 1e9).astype(np.int64),
        indptr=np.append(0, np.cumsum(counts)),
        indices=np.concatenate(rows).astype(np.int64),
        capacity=total,
        consumed=np.zeros_like(total),
        reserved=np.zeros_like(total),
        unlocked=total,
        arrival=np.arange(tasks, dtype=np.float64),
        weight=np.ones(tasks),
        priority=np.zeros(tasks, np.int64),
    )


def elastic_at_random(seed: int, tasks: int, blocks: int, orders: int) -> Round:
    rng = np.random.default_rng(seed + 1)
    round = at_random(seed, tasks, blocks, orders)
    group = np.sort(rng.integers(0, max(1, tasks // 2), tasks)).astype(np.int64)
    first = np.searchsorted(group, group)
    return replace(
        round,
        group=group,
        weight=rng.choice([0.5, 1.0, 1.5, 2.0, 3.0], tasks),
        arrival=round.arrival[first],
        priority=round.priority[first],
    )


def build(
    capacity: Sequence[Sequence[int]],
    tasks: Sequence[Mapping[str, Any]],
    *,
    consumed: Sequence[Sequence[int]] | None = None,
    reserved: Sequence[Sequence[int]] | None = None,
    unlocked: Sequence[Sequence[int]] | None = None,
) -> Round:
    orders = len(capacity[0])
    nothing = [[0] * orders for _ in capacity]
    blocks = [task["blocks"] for task in tasks]
    return Round(
        orders=np.arange(2, orders + 2, dtype=np.float64),
        demand=np.array([task["demand"] for task in tasks], dtype=np.int64).reshape(-1, orders),
        indptr=np.cumsum([0, *map(len, blocks)], dtype=np.int64),
        indices=np.array([block for asked in blocks for block in asked], dtype=np.int64),
        capacity=np.array(capacity, dtype=np.int64),
        consumed=np.array(consumed or nothing, dtype=np.int64),
        reserved=np.array(reserved or nothing, dtype=np.int64),
        unlocked=np.array(unlocked or capacity, dtype=np.int64),
        arrival=np.array([task.get("arrival", i) for i, task in enumerate(tasks)], np.float64),
        weight=np.array([task.get("weight", 1) for task in tasks], np.float64),
        priority=np.array([task.get("priority", 0) for task in tasks], np.int64),
    )


def at_random(seed: int, tasks: int, blocks: int, orders: int) -> Round:
    """Small numbers, so that ties and exact fits happen; some orders negative, some absent."""
    rng = np.random.default_rng(seed)
    capacity = rng.integers(-10, 60, (blocks, orders))
    capacity[rng.random((blocks, orders)) < 0.15] = ABSENT
    lacking = (capacity == ABSENT).all(axis=1)
    capacity[lacking, 0] = 40
    usable = np.maximum(capacity, 0)
    consumed = (usable * rng.choice([0, 0, 0.3, 1.1], (blocks, 1))).astype(np.int64)
    reserved = (usable * rng.choice([0, 0, 0.4], (blocks, 1))).astype(np.int64)
    part = rng.choice([0.25, 0.5, 1.0], (blocks, 1))
    unlocked = np.where(capacity > 0, (usable * part).astype(np.int64), capacity)
    kinds = rng.integers(0, 25, (max(1, tasks // 3), orders))
    kinds[rng.random(len(kinds)) < 0.05] = 1000
    asked = [rng.choice(blocks, rng.integers(1, blocks + 1), replace=False) for _ in range(tasks)]
    return Round(
        orders=np.arange(2, orders + 2, dtype=np.float64),
        demand=kinds[rng.integers(0, len(kinds), tasks)],
        indptr=np.cumsum([0, *map(len, asked)], dtype=np.int64),
        indices=np.concatenate([np.zeros(0, np.int64), *asked]),
        capacity=capacity,
        consumed=consumed,
        reserved=reserved,
        unlocked=unlocked,
        arrival=rng.integers(0, max(1, tasks // 2), tasks).astype(np.float64),
        weight=rng.choice([0.5, 1.0, 2.0], tasks),
        priority=rng.choice([0, 0, 0, 5, -1], tasks),
    )
