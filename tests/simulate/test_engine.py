"""The engine's shortcuts change nothing: it grants what the plainest simulator grants, and when."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from tests.simulate import naive

from dpmoe_operator.privacy.units import MAX_UNITS
from dpmoe_operator.scheduling.filling import check_grants
from dpmoe_operator.scheduling.policies import POLICIES, policy
from dpmoe_operator.simulate.engine import FIXED_ORDER, Played, play
from dpmoe_operator.simulate.rules import Rules, Unlock
from dpmoe_operator.simulate.workload import Workload, make_workload

UNLOCKS = [Unlock(), Unlock(fair_shares=7), Unlock(lifetime=20.0), Unlock(lifetime=20.0, steps=4)]
PERIODS = [Rules(), Rules(until=60.0), Rules(period=3.0), Rules(period=8.0, until=100.0)]
RandomWorkload = Callable[[int], Workload]


def grants(played: Played) -> dict[int, float]:
    return {int(t): float(played.granted_at[t]) for t in np.flatnonzero(played.granted)}


@pytest.mark.parametrize("rules", PERIODS, ids=str)
@pytest.mark.parametrize("unlock", UNLOCKS, ids=str)
@pytest.mark.parametrize("name", sorted(FIXED_ORDER))
def test_fixed_orders_see_all_who_wait(
    random_workload: RandomWorkload, name: str, unlock: Unlock, rules: Rules
) -> None:
    rules = replace(rules, unlock=unlock)
    for seed in range(4):
        workload = random_workload(seed)
        expected = naive.play(workload, policy(name), rules, all_waiting=True)
        assert 0 < len(expected) < workload.tasks
        assert grants(play(workload, policy(name), rules)) == expected


@pytest.mark.parametrize("unlock", UNLOCKS, ids=str)
@pytest.mark.parametrize("name", sorted(POLICIES.keys() - FIXED_ORDER - {"dual", "optimal"}))
def test_other_orders_see_all_who_fit(
    random_workload: RandomWorkload, name: str, unlock: Unlock
) -> None:
    rules = Rules(unlock, period=3.0, until=60.0)
    for seed in range(4):
        workload = random_workload(seed)
        expected = naive.play(workload, policy(name), rules, all_waiting=False)
        assert grants(play(workload, policy(name), rules)) == expected


def test_a_whole_queue_holds_all_who_wait(random_workload: RandomWorkload) -> None:
    differs = False
    for unlock in UNLOCKS:
        rules = Rules(unlock, period=3.0, until=60.0)
        for seed in range(8):
            workload = random_workload(seed)
            expected = naive.play(workload, policy("dpack"), rules, all_waiting=True)
            assert grants(play(workload, policy("dpack"), rules, whole_queue=True)) == expected
            differs |= expected != grants(play(workload, policy("dpack"), rules))
    assert differs


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_nothing_is_overdrawn_and_nobody_who_fits_is_left(
    random_workload: RandomWorkload, name: str
) -> None:
    for seed in range(3):
        workload = random_workload(seed)
        played = play(workload, policy(name), Rules(period=5.0))
        check_grants(workload.whole, np.flatnonzero(played.granted))
        after = workload.whole.after(
            np.flatnonzero(played.granted), np.flatnonzero(~played.granted)
        )
        patient = workload.timeout[~played.granted] == np.inf
        fits = naive.tasks_that_fit(after, after.available)
        assert not (fits & patient).any()


@pytest.mark.parametrize(
    ("rules", "rounds"),
    [
        (Rules(period=8.0), 5),
        (Rules(period=8.0, until=7.0), 0),
        (Rules(period=8.0, until=100.0), 12),
        (Rules(period=1000.0), 1),
    ],
)
def test_rounds_end_when_told_or_with_the_last_task(
    random_workload: RandomWorkload, rules: Rules, rounds: int
) -> None:
    workload = random_workload(0)
    assert 32 < workload.arrival[-1] < 40
    assert play(workload, policy("dpf"), rules).rounds == rounds


def test_all_tasks_at_once_are_one_round(random_workload: RandomWorkload) -> None:
    workload = replace(random_workload(0), arrival=np.zeros(60), opened=np.zeros(7))
    for rules in (Rules(), Rules(period=3.0)):
        assert play(workload, policy("dpf"), rules).rounds == 1


def test_fairness_at_one_is_dpf(random_workload: RandomWorkload) -> None:
    rules = Rules(Unlock(fair_shares=7), period=3.0)
    for seed in range(3):
        workload = random_workload(seed)
        fair = play(workload, policy("fcfs"), rules, fairness=1.0)
        assert grants(fair) == grants(play(workload, policy("dpf"), rules))


def test_a_task_that_nothing_can_pay_leaves_exact_amounts() -> None:
    """Saturated demands at some orders must neither overflow nor come back as budget."""
    workload = make_workload(
        "saturated",
        orders=np.array([2.0, 3.0]),
        capacity=np.array([[5, 10_000]]),
        opened=np.zeros(1),
        demand=np.tile(np.array([[MAX_UNITS, 1]]), (3000, 1)),
        asked=[np.zeros(1, np.int64)] * 3000,
        arrival=np.arange(3000.0),
    )
    played = play(workload, policy("dpf"), Rules(Unlock(fair_shares=4000)))
    assert played.granted.all()
    assert played.spent.tolist() == [[MAX_UNITS, 3000]]
    assert played.unlocked.tolist() == [[5 * 3000 // 4000, 7500]]


def test_progress_ends_at_all_tasks(random_workload: RandomWorkload) -> None:
    seen: list[tuple[int, int]] = []
    play(
        random_workload(0),
        policy("dpf"),
        Rules(period=7.0),
        progress=lambda arrived, of: seen.append((arrived, of)),
    )
    assert seen[-1] == (60, 60)
    assert seen == sorted(seen)
