"""Elastic jobs: at most one point of each is granted, and the right one."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.scheduling import dpack
from dpmoe_operator.scheduling.bounds import upper_bound
from dpmoe_operator.scheduling.explain import explain
from dpmoe_operator.scheduling.filling import check_grants, fill, fits, left_after
from dpmoe_operator.scheduling.outcome import Prices
from dpmoe_operator.scheduling.points import increments
from dpmoe_operator.scheduling.policies import POLICIES, policy
from dpmoe_operator.scheduling.round import ABSENT, Round
from dpmoe_operator.scheduling.unlocking import Immediate

MakeRound = Callable[..., Round]


def grouped(round: Round, *group: int) -> Round:
    return replace(round, group=np.array(group, dtype=np.int64), arrival=np.zeros(round.tasks))


def assert_exact(round: Round, granted: list[int]) -> None:
    """At most one point a job, and every block holds at some order, in Python's integers."""
    jobs = round.job_of_task[granted].tolist()
    assert len(set(jobs)) == len(jobs)
    for block in set(round.indices[round.pairs_of(np.array(granted, np.int64))].tolist()):
        asking = [task for task in granted if block in round.blocks_of(task)]
        assert any(
            sum(int(round.demand[task, order]) for task in asking)
            <= int(round.available[block, order])
            for order in range(len(round.orders))
        )


@given(
    seed=st.integers(0, 10**6),
    tasks=st.integers(1, 14),
    blocks=st.integers(1, 4),
    name=st.sampled_from(sorted(POLICIES)),
    fairness=st.sampled_from([0.0, 0.3, 1.0]),
)
@budget(max_examples=150)
def test_no_policy_breaks_a_filter_or_grants_two_points(
    elastic_round: MakeRound, seed: int, tasks: int, blocks: int, name: str, fairness: float
) -> None:
    """And whoever waits has no point that would fit, nor anybody a better one in its place."""
    round = elastic_round(seed, tasks, blocks, 3)
    outcome = policy(name).grant(round, fairness=fairness)
    granted = outcome.granted.tolist()
    assert sorted(outcome.order.tolist()) == list(range(round.tasks))
    assert_exact(round, granted)
    check_grants(round, granted)
    held = {int(round.job_of_task[task]): task for task in granted}
    for task in range(round.tasks):
        own = held.get(int(round.job_of_task[task]))
        if own is None or round.weight[task] > round.weight[own]:
            others = np.array([one for one in granted if one != own], np.int64)
            assert not fits(round.demand[task], left_after(round, others)[round.blocks_of(task)])
    assert outcome.bound is None or outcome.weight <= outcome.bound
    waiting = explain(round, outcome.granted, outcome.order, [Immediate()] * round.blocks)
    jobs = {int(round.job_of_task[one.task]) for one in waiting}
    assert len(waiting) == len(jobs)
    assert jobs == set(range(round.jobs)) - held.keys()
    assert all(1 <= one.rank <= one.of == round.jobs for one in waiting)


@given(seed=st.integers(0, 10**6), tasks=st.integers(1, 11), blocks=st.integers(1, 3))
@budget(max_examples=60)
def test_optimal_is_the_best_set_and_bounds_hold(
    elastic_round: MakeRound,
    best_weight: Callable[[Round], float],
    seed: int,
    tasks: int,
    blocks: int,
) -> None:
    round = elastic_round(seed, tasks, blocks, 3)
    round = replace(round, priority=np.zeros(round.tasks, np.int64))
    best = best_weight(round)
    outcome = policy("optimal").grant(round)
    assert outcome.weight == pytest.approx(best)
    dual = policy("dual").grant(round)
    assert dual.bound is not None
    assert dual.weight <= best + 1e-9
    assert best <= dual.bound + 1e-9
    rng = np.random.default_rng(seed)
    price = Prices(rng.uniform(0, 5, round.blocks), rng.integers(0, 3, round.blocks))
    assert best <= upper_bound(round, price) + 1e-9


def test_dual_comes_close_to_optimal(elastic_curves: Callable[[int], Round]) -> None:
    parts = []
    for seed in range(4):
        round = elastic_curves(seed)
        optimal = policy("optimal").grant(round)
        parts.append(policy("dual").grant(round).weight / optimal.weight)
    assert min(parts) >= 0.97


@pytest.fixture(scope="session")
def elastic_curves(curves_round: MakeRound) -> Callable[[int], Round]:
    """Thirty jobs on four blocks; a third of the budget is worth 0.6, two thirds 0.85."""

    def make(seed: int) -> Round:
        round = curves_round(seed, 30, 4, 3)
        points = np.repeat(np.arange(30), 3)
        part = np.tile([1 / 3, 2 / 3, 1.0], 30)[:, np.newaxis]
        pairs = round.pairs_of(points)
        return replace(
            round,
            demand=np.ceil(round.demand[points] * part).astype(np.int64),
            indptr=np.append(0, np.cumsum(np.diff(round.indptr)[points])),
            indices=round.indices[pairs],
            arrival=round.arrival[points],
            weight=np.tile([0.6, 0.85, 1.0], 30),
            priority=round.priority[points],
            group=points.astype(np.int64),
        )

    return make


def test_cheap_points_come_first_and_upgrades_take_what_is_left(make_round: MakeRound) -> None:
    """Two jobs of 30 for 0.6 or 60 for 1: one upgrade fits beside the other's cheap point."""
    job = [{"demand": [30], "blocks": [0], "weight": 0.6}, {"demand": [60], "blocks": [0]}]
    for name in ("area", "dpack", "dpf", "dual", "optimal"):
        outcome = policy(name).grant(grouped(make_round([[100]], job + job), 0, 0, 1, 1))
        assert outcome.weight == pytest.approx(1.6)
        assert sorted(outcome.granted.tolist()) in ([0, 3], [1, 2])
    for name in POLICIES:
        outcome = policy(name).grant(grouped(make_round([[60]], job + job), 0, 0, 1, 1))
        assert outcome.weight == pytest.approx(1.0 if name == "fcfs" else 1.2)


def test_increments_are_slopes_of_the_lower_hull(make_round: MakeRound) -> None:
    points = [
        {"demand": [1], "blocks": [0], "weight": weight} for weight in (2.0, 3.0, 4.0, 1.0, 5.0)
    ]
    round = grouped(make_round([[10]], points), 0, 0, 0, 0, 1)
    key, late = increments(round, np.array([2.0, 5.0, 6.0, 2.0, 15.0]))
    assert late.tolist() == [False, True, False, True, False]
    assert key[~late].tolist() == [1.0, 2.0, 3.0]
    single = replace(round, group=None)
    assert increments(single, np.arange(5.0))[0].tolist() == [0, 1 / 3, 0.5, 3.0, 0.8]


def test_what_another_point_gives_back_is_used(make_round: MakeRound) -> None:
    """A better point may ask less of a block than the one that it replaces."""
    round = grouped(
        make_round(
            [[10], [10]],
            [
                {"demand": [10], "blocks": [0], "weight": 1},
                {"demand": [10], "blocks": [1], "weight": 2},
                {"demand": [10], "blocks": [0], "weight": 1},
            ],
        ),
        *(0, 0, 1),
    )
    assert sorted(fill(round, np.array([0, 2, 1])).tolist()) == [1, 2]


def test_saturated_budget_is_never_given_back(make_round: MakeRound) -> None:
    """At an order that a block lacks nothing fits, however often points are exchanged."""
    points = [{"demand": [1, 9 * 10**15], "blocks": [0], "weight": w} for w in range(1, 40)]
    other = {"demand": [9, 1], "blocks": [0]}
    round = grouped(make_round([[8, ABSENT]], [*points, other]), *[0] * 39, 1)
    assert fill(round, np.arange(40)).tolist() == [38]


def test_check_grants_refuses_two_points(make_round: MakeRound) -> None:
    point = {"demand": [1], "blocks": [0]}
    round = grouped(make_round([[10]], [point, point, point]), 3, 3, 5)
    check_grants(round, [0, 2])
    with pytest.raises(AssertionError, match="two points of the elastic job 3"):
        check_grants(round, [0, 1])


def test_the_closest_point_is_explained(make_round: MakeRound) -> None:
    round = grouped(
        make_round(
            [[100]],
            [
                {"demand": [500], "blocks": [0], "weight": 5},
                {"demand": [90], "blocks": [0], "weight": 1},
                {"demand": [95], "blocks": [0], "weight": 2},
            ],
            reserved=[[60]],
        ),
        *(0, 0, 1),
    )
    explained = explain(round, np.zeros(0, np.int64), np.array([0, 2, 1]), [Immediate()])
    assert [(one.task, one.reason) for one in explained] == [
        (1, Reason.WAITING_FOR_REFUND),
        (2, Reason.WAITING_FOR_REFUND),
    ]
    assert [(one.rank, one.of) for one in explained] == [(1, 2), (2, 2)]


def test_periodic_dpack_lists_every_point(elastic_round: MakeRound) -> None:
    for seed in range(20):
        round = elastic_round(seed, 20, 3, 3)
        assert sorted(dpack.order(round, period=2).tolist()) == list(range(20))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group": np.array([1, 0, 0])}, "group"),
        ({"arrival": np.array([0.0, 1.0, 2.0])}, "arrival"),
        ({"priority": np.array([0, 1, 1])}, "priority"),
    ],
)
def test_groups_are_checked(make_round: MakeRound, change: dict[str, object], words: str) -> None:
    round = grouped(make_round([[10]], [{"demand": [1], "blocks": [0]}] * 3), 0, 0, 1)
    with pytest.raises(ValueError, match=words):
        replace(round, **change)  # type: ignore[arg-type]
