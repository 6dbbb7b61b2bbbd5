"""The fairness share, priorities, and what counts as a fair demand: the same for all policies."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpmoe_operator.scheduling.filling import fill
from dpmoe_operator.scheduling.policies import POLICIES, policy
from dpmoe_operator.scheduling.round import ABSENT, Round
from dpmoe_operator.scheduling.shares import fair_demands

MakeRound = Callable[..., Round]
FAST = sorted(set(POLICIES) - {"optimal"})


def test_fairness_is_a_choice_between_both(make_round: MakeRound) -> None:
    """A wide task of small shares, and narrow ones of larger shares that are more.

    DPF grants the wide task first, dual the narrow ones. Half of the budget in DPF's order is
    enough for the wide task, and leaves room for a narrow one on the block that it doesn't ask for.
    """
    wide = {"demand": [50], "blocks": [0, 1, 2]}
    narrow = [{"demand": [60], "blocks": [block]} for block in range(4)]
    round = make_round([[100]] * 4, [*narrow, wide])
    dual = policy("dual")
    assert sorted(dual.grant(round).granted.tolist()) == [0, 1, 2, 3]
    assert sorted(dual.grant(round, fairness=0.4).granted.tolist()) == [0, 1, 2, 3]
    assert dual.grant(round, fairness=0.5).granted.tolist() == [4, 3]
    assert dual.grant(round, fairness=1.0).granted.tolist() == [4, 3]


@given(seed=st.integers(0, 2**32), tasks=st.integers(0, 25), name=st.sampled_from(FAST))
def test_all_of_it_is_dpf(random_round: MakeRound, seed: int, tasks: int, name: str) -> None:
    round = random_round(seed, tasks, 4, 3)
    granted = policy(name).grant(round, fairness=1.0).granted.tolist()
    assert granted == policy("dpf").grant(round).granted.tolist()


@given(
    seed=st.integers(0, 2**32),
    tasks=st.integers(0, 25),
    name=st.sampled_from(FAST),
    fairness=st.floats(0, 1),
)
def test_the_order_says_it_all(
    random_round: MakeRound, seed: int, tasks: int, name: str, fairness: float
) -> None:
    """With any share and priorities: filling in the order grants what was granted, and its sums."""
    round = random_round(seed, tasks, 4, 3)
    outcome = policy(name).grant(round, fairness=fairness)
    assert sorted(outcome.order.tolist()) == list(range(tasks))
    assert outcome.granted.tolist() == fill(round, outcome.order).tolist()
    assert outcome.weight == pytest.approx(round.weight[outcome.granted].sum())
    fair = fair_demands(round)
    assert (outcome.fair, outcome.fair_granted) == (fair.sum(), fair[outcome.granted].sum())
    priorities = round.priority[outcome.order]
    assert (np.diff(priorities) <= 0).all()


@pytest.mark.parametrize("fairness", [-0.1, 1.1, float("nan")])
def test_a_share_lies_between_none_and_all(make_round: MakeRound, fairness: float) -> None:
    round = make_round([[10]], [{"demand": [1], "blocks": [0]}])
    with pytest.raises(ValueError, match=r"fairness: .* must lie in"):
        policy("dual").grant(round, fairness=fairness)


@pytest.mark.parametrize("name", FAST)
def test_a_class_is_ranked_on_what_the_classes_before_it_left(
    make_round: MakeRound, name: str
) -> None:
    """Of the low class alone, the task on block 0 would go first; but block 0 is taken by then."""
    round = make_round(
        [[10, 10], [10, 10]],
        [
            {"demand": [2, 2], "blocks": [0], "arrival": 1},
            {"demand": [8, 8], "blocks": [1], "arrival": 2},
            {"demand": [9, 9], "blocks": [0], "arrival": 3, "priority": 1},
        ],
    )
    outcome = policy(name).grant(round)
    assert outcome.granted.tolist() == [2, 1]
    if name in ("dpack", "dual"):
        assert outcome.order.tolist() == [2, 1, 0]


def test_the_bound_of_several_classes_is_of_the_whole_round(make_round: MakeRound) -> None:
    """One urgent task keeps ten others out. The bound tells what that costs."""
    tasks = [{"demand": [1], "blocks": [0]} for _ in range(10)]
    round = make_round([[10]], [*tasks, {"demand": [10], "blocks": [0], "priority": 5}])
    outcome = policy("dual").grant(round)
    assert outcome.granted.tolist() == [10]
    assert (outcome.weight, outcome.bound) == (1, 10)


def test_a_fair_demand_is_at_most_its_share_everywhere(make_round: MakeRound) -> None:
    """Four tasks wait for block 0, so that 25 of 100 is fair; block 1 says that N is 10."""
    tasks = [
        {"demand": [25, 25], "blocks": [0]},
        {"demand": [26, 25], "blocks": [0]},
        {"demand": [25, 26], "blocks": [0]},
        {"demand": [25, 25], "blocks": [0, 1]},
        {"demand": [10, 5], "blocks": [1]},
        {"demand": [11, 5], "blocks": [1]},
        {"demand": [10, 99], "blocks": [1]},
    ]
    round = make_round([[100, 100], [100, ABSENT]], tasks)
    round = replace(round, fair_shares=np.array([0, 10]))
    assert fair_demands(round).tolist() == [True, False, False, False, True, False, True]


@given(seed=st.integers(0, 2**32), tasks=st.integers(1, 25))
def test_fair_demands_are_exact(random_round: MakeRound, seed: int, tasks: int) -> None:
    round = random_round(seed, tasks, 4, 3)
    waiting = [int((round.indices == block).sum()) for block in range(4)]
    for task, fair in enumerate(fair_demands(round).tolist()):
        assert fair == all(
            Fraction(int(asked)) <= Fraction(int(whole), waiting[block])
            for block in round.blocks_of(task).tolist()
            for asked, whole in zip(round.demand[task], round.capacity[block], strict=True)
            if whole > 0
        )
