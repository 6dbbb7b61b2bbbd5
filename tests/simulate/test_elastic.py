"""Elastic jobs in the simulator: one point each, unlocking counts jobs, and more is won."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.simulate import naive

from dpmoe_operator.privacy.units import MAX_UNITS
from dpmoe_operator.scheduling.filling import check_grants
from dpmoe_operator.scheduling.policies import POLICIES, policy
from dpmoe_operator.simulate.elastic import Part, elastic
from dpmoe_operator.simulate.engine import FIXED_ORDER, play
from dpmoe_operator.simulate.instance import read_instance, solve
from dpmoe_operator.simulate.report import to_object
from dpmoe_operator.simulate.rules import Rules, Unlock
from dpmoe_operator.simulate.spec import read_spec
from dpmoe_operator.simulate.summary import summarise, upper_bound
from dpmoe_operator.simulate.workload import Workload

PARTS = (Part.parse("0.5:0.7"), Part.parse("0.2:0.4"))


def made(random_workload: Callable[[int], Workload], seed: int) -> Workload:
    return elastic(random_workload(seed), PARTS)


@pytest.mark.parametrize("unlock", [Unlock(), Unlock(fair_shares=7)], ids=str)
@pytest.mark.parametrize("name", sorted(FIXED_ORDER))
def test_fixed_orders_agree_with_the_plain_simulator(
    random_workload: Callable[[int], Workload], name: str, unlock: Unlock
) -> None:
    for seed in range(2):
        workload = made(random_workload, seed)
        for rules in (Rules(unlock), Rules(unlock, period=3.0)):
            expected = naive.play(workload, policy(name), rules, all_waiting=True)
            played = play(workload, policy(name), rules)
            tasks = np.flatnonzero(played.granted)
            assert {int(t): float(played.granted_at[t]) for t in tasks} == expected


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_one_point_of_each_job_and_the_bound_holds(
    random_workload: Callable[[int], Workload], name: str
) -> None:
    workload = made(random_workload, 5)
    assert (workload.tasks, workload.jobs) == (180, 60)
    played = play(workload, policy(name), Rules(period=8.0))
    check_grants(workload.whole, np.flatnonzero(played.granted))
    bound = upper_bound(played)
    summary = summarise(played, upper_bound=bound)
    assert 0 < summary.granted == int(played.granted_jobs.sum()) < summary.tasks == 60
    assert 0 < summary.weight <= bound <= summary.weight_of_all
    [result] = to_object(workload, played.rules, [played], [summary])["results"]
    served = [time is not None for time in result["granted_at"]]
    assert served == [weight is not None for weight in result["granted_weight"]]
    assert sum(filter(None, result["granted_weight"])) == pytest.approx(summary.weight)


def test_choosing_the_point_wins_utility(random_workload: Callable[[int], Workload]) -> None:
    for seed in range(3):
        rigid = random_workload(seed)
        won = [
            summarise(play(one, policy("dual"), Rules(period=50.0))).weight
            for one in (rigid, elastic(rigid, PARTS))
        ]
        assert won[1] > won[0]


def test_parts_round_against_the_task(random_workload: Callable[[int], Workload]) -> None:
    rigid = random_workload(0)
    demand = rigid.demand.copy()
    demand[0] = [7, MAX_UNITS, 0]
    workload = elastic(replace(rigid, demand=demand), PARTS)
    assert workload.demand[:3].tolist() == [[2, MAX_UNITS, 0], [4, MAX_UNITS, 0], [7, MAX_UNITS, 0]]
    assert workload.weight[:3] == pytest.approx(rigid.weight[0] * np.array([0.4, 0.7, 1.0]))
    with pytest.raises(ValueError, match="already"):
        elastic(workload, PARTS)
    with pytest.raises(ValueError, match="increase"):
        elastic(rigid, (Part(500, 0.3), Part(200, 0.4)))


@pytest.mark.parametrize("text", ["", "0.5", "1:0.5", "0.5:1", "0.5:2", "0:0.1", "0.1234:0.5"])
def test_parts_are_checked(text: str) -> None:
    with pytest.raises(ValueError, match="elastic"):
        Part.parse(text)


POINTS = """
budget: {epsilon: "10"}
blocks: {initial: 2}
tasks:
  - arrivals: {at: [1, 2]}
    blocks: {all: true}
    epsilon: "9"
    points:
      - {utility: 0.6, epsilon: "5"}
      - {utility: 0.5, blocks: {latest: 1}}
  - arrivals: {at: [3]}
    blocks: {latest: 1}
    epsilon: "1"
"""


def test_points_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "points.yaml"
    path.write_text(POINTS)
    workload, rules = read_spec(path)
    assert (workload.tasks, workload.jobs) == (7, 3)
    assert workload.weight.tolist() == [1.0, 0.6, 0.5, 1.0, 0.6, 0.5, 1.0]
    assert [len(workload.whole.blocks_of(task)) for task in range(7)] == [2, 2, 1, 2, 2, 1, 1]
    assert workload.demand[:3, 0].tolist() == [9 * 10**9, 5 * 10**9, 9 * 10**9]
    played = play(workload, policy("dual"), replace(rules, period=5.0))
    assert summarise(played).weight == pytest.approx(2.0)

    path.write_text(POINTS + "elastic: [{part: 0.5, utility: 0.7}]\n")
    with pytest.raises(ValueError, match="already"):
        read_spec(path)
    path.write_text(
        "generator: {kind: dpack-blocks, spread: 3, tasks: 20}\n"
        "elastic: [{part: 0.5, utility: 0.7}]\n"
    )
    assert (read_spec(path)[0].tasks, read_spec(path)[0].jobs) == (40, 20)


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ("{utility: 0.6}", "tasks.points"),
        ('{utility: 0.6, epsilon: "5", laplace: "2"}', "tasks.points"),
        ('{utility: 1.6, epsilon: "5"}', "utility"),
        ('{utility: 0.6, laplace: "2"}', "demand as epsilon"),
    ],
)
def test_points_in_yaml_are_checked(tmp_path: Path, point: str, words: str) -> None:
    path = tmp_path / "points.yaml"
    path.write_text(POINTS.replace('{utility: 0.6, epsilon: "5"}', point))
    with pytest.raises(ValueError, match=words):
        read_spec(path)


def test_groups_in_an_instance(tmp_path: Path) -> None:
    path = tmp_path / "problem.npz"
    np.savez(
        path,
        demand=np.array([[6.0], [4.0], [6.0]]),
        indptr=np.array([0, 1, 2, 3]),
        indices=np.array([0, 0, 0]),
        capacity=np.array([[10.0]]),
        orders=np.array([2.0]),
        weight=np.array([1.0, 0.7, 0.8]),
        group=np.array([0, 0, 1]),
    )
    result = solve(read_instance(path), policy("optimal"))
    assert sorted(result["granted"]) == [1, 2]
    assert json.dumps(result)
