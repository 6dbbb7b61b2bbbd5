"""Foresight in the simulator: large tasks get their turn, and no budget is ever overdrawn."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from dpmoe_operator.scheduling.filling import check_grants
from dpmoe_operator.scheduling.policies import policy
from dpmoe_operator.simulate.engine import play
from dpmoe_operator.simulate.rules import Rules, Unlock
from dpmoe_operator.simulate.workload import Workload, make_workload

SLOW = Rules(Unlock(lifetime=30.0), period=10.0, until=30.0)


def large_and_small() -> Workload:
    """One block over three rounds: a large task, and small ones that would take every bit."""
    demand = np.array([[70]] + [[33]] * 3, dtype=np.int64)
    return make_workload(
        "large and small",
        orders=np.array([2.0]),
        capacity=np.array([[100]], dtype=np.int64),
        opened=np.zeros(1),
        demand=demand,
        asked=[np.zeros(1, dtype=np.int64)] * 4,
        arrival=np.array([1.0, 2.0, 3.0, 11.0]),
        weight=np.array([10.0, 1.0, 1.0, 1.0]),
    )


def test_large_tasks_get_their_turn() -> None:
    workload = large_and_small()
    blind = play(workload, policy("dual"), SLOW)
    assert workload.weight[blind.granted].sum() == 3
    wise = play(workload, policy("dual"), replace(SLOW, foresight=20.0))
    assert wise.granted_at.tolist()[0] == 30.0
    assert workload.weight[wise.granted].sum() == 10


@pytest.mark.parametrize("name", ["dpack", "dpf", "dual", "fcfs"])
def test_nothing_is_overdrawn_and_the_last_round_keeps_nothing_back(
    random_workload: Callable[[int], Workload], name: str
) -> None:
    rules = Rules(Unlock(lifetime=20.0, steps=4), period=4.0, until=64.0, foresight=9.0)
    for seed in range(3):
        workload = random_workload(seed)
        played = play(workload, policy(name), rules)
        granted = np.flatnonzero(played.granted)
        check_grants(workload.whole, granted)
        assert (played.granted_at[granted] >= workload.arrival[granted]).all()
        patient = np.flatnonzero(~played.granted & np.isinf(workload.timeout))
        rest = workload.whole.after(granted, patient)
        fits = [
            (rest.demand[task] <= rest.available[rest.blocks_of(task)]).any(axis=1).all()
            for task in range(rest.tasks)
        ]
        assert not any(fits)


@pytest.mark.parametrize("foresight", [-1.0, np.inf])
def test_foresight_is_checked(foresight: float) -> None:
    with pytest.raises(ValueError, match="foresight"):
        replace(SLOW, foresight=foresight)
    with pytest.raises(ValueError, match="by time"):
        Rules(foresight=3.0)
