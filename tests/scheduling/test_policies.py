"""FCFS and DPF: the literature's small examples, and DPF against its definition."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from dpmoe_operator.scheduling import dpf
from dpmoe_operator.scheduling.policies import POLICIES, policy
from dpmoe_operator.scheduling.round import ABSENT, Round
from dpmoe_operator.scheduling.shares import largest_and_summed

MakeRound = Callable[..., Round]


def test_policies_by_name() -> None:
    assert set(POLICIES) == {"area", "dpack", "dpf", "dual", "fcfs", "optimal"}
    assert all(policy(name).name == name for name in POLICIES)
    with pytest.raises(ValueError, match="'lottery' is unknown; choose one of area, dpack"):
        policy("lottery")


def test_mice_and_elephants(make_round: MakeRound) -> None:
    """Luo et al., OSDI 2021, Figure 6: one block, 75 % mice (0.01 ε_G), 25 % elephants (0.1 ε_G).

    With 100 mice waiting, DPF grants 100 tasks, the most there can be; FCFS lets elephants in.
    """
    tasks = [{"demand": [100 if i % 4 == 3 else 10], "blocks": [0]} for i in range(136)]
    round = make_round([[1000]], tasks)
    assert len(policy("dpf").grant(round).granted) == 100
    # Of every four, three mice and an elephant take 130: 7 rounds take 910, then 9 mice fit.
    assert len(policy("fcfs").grant(round).granted) == 7 * 4 + 9


def test_dpf_prefers_a_wide_task_with_a_small_dominant_share(make_round: MakeRound) -> None:
    """DPack's case against DPF (Tholoniat et al., EuroSys 2025): breadth doesn't count."""
    wide = {"demand": [50], "blocks": [0, 1, 2]}
    narrow = [{"demand": [60], "blocks": [block]} for block in range(3)]
    round = make_round([[100]] * 3, [*narrow, wide])
    assert policy("dpf").grant(round).granted.tolist() == [3]
    assert policy("fcfs").grant(round).granted.tolist() == [0, 1, 2]


def test_shares_are_of_initial_capacity_at_usable_orders(make_round: MakeRound) -> None:
    round = make_round(
        [[-5, 20, 100], [0, 50, ABSENT]],
        [
            {"demand": [9, 5, 10], "blocks": [0]},
            {"demand": [9, 5, 10], "blocks": [1]},
            {"demand": [9, 5, 60], "blocks": [0, 1]},
            {"demand": [9, 5, 10], "blocks": [0], "weight": 4},
        ],
        consumed=[[0, 19, 99], [0, 49, 0]],
    )
    assert (largest_and_summed(round)[0] / round.weight).tolist() == [0.25, 0.1, 0.6, 0.0625]


def test_ties_go_to_the_next_largest_share_then_to_arrival(make_round: MakeRound) -> None:
    round = make_round(
        [[100, 100], [100, 100]],
        [
            {"demand": [50, 40], "blocks": [0], "arrival": 1},
            {"demand": [50, 30], "blocks": [0], "arrival": 2},
            {"demand": [50, 30], "blocks": [0, 1], "arrival": 0},
            {"demand": [50, 30], "blocks": [1], "arrival": 1},
            {"demand": [30, 50], "blocks": [1], "arrival": 1},
            {"demand": [50, 0], "blocks": [1], "arrival": 9},
        ],
    )
    assert dpf.order(round).tolist() == [5, 3, 4, 1, 0, 2]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_priority_goes_before_everything(make_round: MakeRound, name: str) -> None:
    round = make_round(
        [[100]],
        [
            {"demand": [1], "blocks": [0], "arrival": 0, "priority": -1},
            {"demand": [2], "blocks": [0], "arrival": 1},
            {"demand": [99], "blocks": [0], "arrival": 2, "priority": 7},
        ],
    )
    assert policy(name).order(round).tolist() == [2, 1, 0]
    assert policy(name).grant(round).granted.tolist() == [2, 0]


def test_fcfs_serves_by_arrival_then_place(make_round: MakeRound) -> None:
    arrivals = [3.0, 1.0, 2.0, 1.0]
    round = make_round(
        [[100]], [{"demand": [1], "blocks": [0], "arrival": arrival} for arrival in arrivals]
    )
    assert (
        policy("fcfs").order(round).tolist()
        == policy("fcfs").grant(round).granted.tolist()
        == [1, 3, 2, 0]
    )


@given(seed=st.integers(0, 2**32), tasks=st.integers(0, 30))
def test_fcfs_grants_in_order_of_priority_and_arrival(
    random_round: MakeRound, seed: int, tasks: int
) -> None:
    round = random_round(seed, tasks, 3, 2)
    keys = [
        (-round.priority[t], round.arrival[t], t)
        for t in policy("fcfs").grant(round).granted.tolist()
    ]
    assert keys == sorted(keys)


@pytest.mark.parametrize("seed", range(100))
def test_dpf_is_a_plain_reading_of_its_definition(random_round: MakeRound, seed: int) -> None:
    """Luo et al., OSDI 2021, Algorithms 1 and 3, one task and one amount at a time."""
    round = random_round(seed, 4 + seed % 20, 1 + seed % 4, 1 + seed % 3)
    orders = range(len(round.orders))

    def shares(task: int) -> list[Fraction]:
        """All shares d/c of a task, largest first; it asks nothing of any other."""
        found = [
            Fraction(int(round.demand[task, a]), int(round.capacity[block, a]))
            / Fraction(float(round.weight[task]))
            for block in round.blocks_of(task).tolist()
            for a in orders
            if round.capacity[block, a] > 0
        ]
        missing = round.blocks * len(orders) - len(found)
        return sorted(found, reverse=True) + [Fraction(0)] * missing

    def can_run(task: int) -> bool:
        return all(
            any(int(round.demand[task, a]) <= left[block][a] for a in orders)
            for block in round.blocks_of(task).tolist()
        )

    left = round.available.tolist()
    waiting, granted = list(range(round.tasks)), []
    expected_order = sorted(
        waiting,
        key=lambda t: (-int(round.priority[t]), shares(t), round.arrival[t], t),
    )
    while runnable := [task for task in expected_order if task in waiting and can_run(task)]:
        task = runnable[0]
        for block in round.blocks_of(task).tolist():
            left[block] = [left[block][a] - int(round.demand[task, a]) for a in orders]
        waiting.remove(task)
        granted.append(task)
    assert policy("dpf").order(round).tolist() == expected_order
    assert policy("dpf").grant(round).granted.tolist() == granted


@given(seed=st.integers(0, 2**32), tasks=st.integers(0, 30))
@budget(max_examples=50)
def test_every_order_lists_every_task_once(random_round: MakeRound, seed: int, tasks: int) -> None:
    round = random_round(seed, tasks, 3, 3)
    for known in POLICIES.values():
        assert np.sort(known.order(round)).tolist() == list(range(tasks))
        assert set(known.grant(round).granted.tolist()) <= set(range(tasks))
