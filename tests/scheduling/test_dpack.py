"""DPack and greedy area against a plain reading of their definitions, and DPack's small cases."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from dpmoe_operator.scheduling import area, dpack
from dpmoe_operator.scheduling.filling import fill
from dpmoe_operator.scheduling.round import Round

MakeRound = Callable[..., Round]
Left = list[list[int]]


def value_of_block(round: Round, tasks: list[int], room: int, order: int) -> float:
    """The best one-block knapsack: counted until full; fractional if weights differ."""
    equal = len(set(round.weight.tolist())) == 1
    value = 0.0
    for task in sorted(tasks, key=lambda t: int(round.demand[t, order]) / float(round.weight[t])):
        asked, weight = int(round.demand[task, order]), float(round.weight[task])
        if asked > room:
            return value if equal else value + weight * room / asked
        room -= asked
        value += weight
    return value


def efficiency_costs(
    round: Round, waiting: list[int], left: Left, every_tie: bool, counting: bool
) -> list[float]:
    """Cost over weight of each task, at the best order of each block, or at all tied ones."""
    orders = range(len(round.orders))
    valued = replace(round, weight=np.ones(round.tasks)) if counting else round
    chosen: list[list[int]] = []
    for block in range(round.blocks):
        asking = [task for task in waiting if block in round.blocks_of(task)]
        usable = [a for a in orders if left[block][a] > 0]
        values = {a: value_of_block(valued, asking, left[block][a], a) for a in usable}
        tied = [a for a in usable if values[a] == max(values.values())]
        if tied and not every_tie:
            load = {a: sum(int(round.demand[t, a]) for t in asking) / left[block][a] for a in tied}
            tied = [min(tied, key=lambda a: load[a])]
        chosen.append(tied)
    costs = []
    for task in range(round.tasks):
        cost = 0.0
        for block in round.blocks_of(task).tolist():
            for a in chosen[block]:
                cost += int(round.demand[task, a]) / left[block][a]
        costs.append(cost / float(round.weight[task]))
    return costs


def granted_by_definition(
    round: Round, every_tie: bool, period: int | None, counting: bool = False
) -> list[int]:
    left, waiting, granted = round.available.tolist(), list(range(round.tasks)), []
    while True:
        costs = efficiency_costs(round, waiting, left, every_tie, counting)
        found = 0
        for task in sorted(waiting, key=lambda t: (costs[t], round.arrival[t], t)):
            demand, blocks = round.demand[task].tolist(), round.blocks_of(task).tolist()
            if all(any(d <= r for d, r in zip(demand, left[b], strict=True)) for b in blocks):
                for b in blocks:
                    left[b] = [r - d for d, r in zip(demand, left[b], strict=True)]
                waiting.remove(task)
                granted.append(task)
                found += 1
                if found == period:
                    break
        if found != period:
            return granted


@pytest.mark.parametrize("equal_weights", [True, False])
@pytest.mark.parametrize("every_tie", [True, False])
@pytest.mark.parametrize("period", [None, 1, 3])
def test_dpack_is_a_plain_reading_of_its_definition(
    random_round: MakeRound, equal_weights: bool, every_tie: bool, period: int | None
) -> None:
    for seed in range(100 if period is None else 30):
        round = random_round(seed, 4 + seed % 20, 1 + seed % 4, 1 + seed % 3)
        if equal_weights:
            round = replace(round, weight=np.ones(round.tasks))
        ours = fill(round, dpack.order(round, published_ties=every_tie, period=period))
        assert sorted(ours.tolist()) == sorted(granted_by_definition(round, every_tie, period))


@pytest.mark.parametrize("period", [None, 2])
def test_the_artifact_counts_tasks_in_its_knapsacks_and_weighs_them_in_its_efficiencies(
    random_round: MakeRound, period: int | None
) -> None:
    differs = False
    for seed in range(60):
        round = random_round(seed, 4 + seed % 20, 1 + seed % 4, 1 + seed % 3)
        order = dpack.order(round, published_ties=True, counting=True, period=period)
        ours = sorted(fill(round, order).tolist())
        assert ours == sorted(granted_by_definition(round, True, period, counting=True))
        differs |= ours != sorted(granted_by_definition(round, True, period))
    assert differs


@pytest.mark.parametrize("seed", range(100))
def test_area_is_a_plain_reading_of_its_definition(random_round: MakeRound, seed: int) -> None:
    round = random_round(seed, 4 + seed % 20, 1 + seed % 4, 1 + seed % 3)

    def sum_of_shares(task: int) -> float:
        total = 0.0
        for block in round.blocks_of(task).tolist():
            for asked, whole in zip(round.demand[task], round.capacity[block], strict=True):
                total += int(asked) / int(whole) if whole > 0 else 0.0
        return total / float(round.weight[task])

    expected = sorted(range(round.tasks), key=lambda t: (sum_of_shares(t), round.arrival[t], t))
    assert area.order(round).tolist() == expected


def test_dpack_sees_breadth(make_round: MakeRound) -> None:
    """Where DPF grants one wide task, DPack grants three narrow ones (EuroSys 2025, Figure 1)."""
    wide = {"demand": [50], "blocks": [0, 1, 2]}
    narrow = [{"demand": [60], "blocks": [block]} for block in range(3)]
    round = make_round([[100]] * 3, [wide, *narrow])
    assert fill(round, dpack.order(round)).tolist() == [1, 2, 3]


def test_dpack_sees_the_best_order(make_round: MakeRound) -> None:
    """Four tasks that are cheap at the second order go before two that are cheap at the first."""
    tasks = [{"demand": [2, 9], "blocks": [0]}] * 2 + [{"demand": [9, 2], "blocks": [0]}] * 4
    round = make_round([[10, 10]], tasks)
    assert fill(round, dpack.order(round)).tolist() == [2, 3, 4, 5]


def test_ties_of_orders_go_to_the_least_loaded(make_round: MakeRound) -> None:
    """Both orders hold two tasks. At the second one less is asked in all, so it counts alone."""
    tasks = [
        {"demand": [4, 5], "blocks": [0]},
        {"demand": [6, 4], "blocks": [0]},
        {"demand": [9, 6], "blocks": [0]},
    ]
    round = make_round([[10, 10]], tasks)
    assert dpack.order(round).tolist() == [1, 0, 2]
    assert dpack.order(round, published_ties=True).tolist() == [0, 1, 2]


def test_tasks_that_do_not_fit_come_last(make_round: MakeRound) -> None:
    tasks = [{"demand": [11], "blocks": [0]}, {"demand": [9], "blocks": [1]}]
    round = make_round([[10], [10]], tasks)
    assert dpack.order(round).tolist() == [1, 0]
