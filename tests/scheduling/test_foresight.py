"""Foresight: budget is kept for tasks that are worth more and fit once more is unlocked."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.scheduling.explain import explain
from dpmoe_operator.scheduling.filling import check_grants, fill, tasks_that_fit
from dpmoe_operator.scheduling.policies import POLICIES, policy
from dpmoe_operator.scheduling.round import Round
from dpmoe_operator.scheduling.unlocking import ByTime

MakeRound = Callable[..., Round]


def large_and_small(make_round: MakeRound) -> Round:
    """Half of 100 is unlocked, the rest soon; one task of 80 is worth more than four of 25."""
    small = [{"demand": [25], "blocks": [0], "weight": 1} for _ in range(4)]
    large = {"demand": [80], "blocks": [0], "weight": 10}
    return make_round([[100]], [*small, large], unlocked=[[50]])


@pytest.mark.parametrize("name", ["area", "dpack", "dual", "optimal"])
def test_budget_is_kept_for_what_is_worth_more(make_round: MakeRound, name: str) -> None:
    now = large_and_small(make_round)
    assert sorted(policy(name).grant(now).granted.tolist()) == [0, 1]
    outcome = policy(name).grant(replace(now, soon=now.capacity))
    assert outcome.granted.tolist() == []
    assert outcome.planned.tolist() == [4]
    later = replace(now, unlocked=now.capacity, soon=now.capacity)
    assert policy(name).grant(later).granted.tolist() == [4]


def test_who_has_a_place_in_the_plan_is_granted_at_once(make_round: MakeRound) -> None:
    """Twenty are over beside the large task, and a task of ten fits now."""
    now = large_and_small(make_round)
    tasks = [
        {"demand": [80], "blocks": [0], "weight": 10},
        {"demand": [10], "blocks": [0], "weight": 1},
        {"demand": [25], "blocks": [0], "weight": 1},
    ]
    round = replace(make_round([[100]], tasks, unlocked=[[50]]), soon=now.capacity)
    outcome = policy("dual").grant(round)
    assert outcome.granted.tolist() == [1]
    waiting = explain(round, outcome.granted, outcome.order, [ByTime(0, 1)], outcome.planned)
    large, held = waiting
    assert (large.task, large.reason, large.held) == (0, Reason.WAITING_FOR_UNLOCK, False)
    assert (held.task, held.reason, held.held) == (2, Reason.OUTRANKED, True)
    assert (held.asked, held.left) == (25, 10)


def contended(make_round: MakeRound, ours: float, **fields: object) -> Round:
    """Of 100, 30 are unlocked; a task of 10 competes with twelve of 10 that weigh 1 each."""
    tasks = [{"demand": [10], "blocks": [0], "weight": weight} for weight in [ours] + [1] * 12]
    now = make_round([[100]], tasks, unlocked=[[30]])
    return replace(now, soon=now.capacity, **fields)


def test_who_is_hardly_worth_its_price_waits_for_the_last_unlock(make_round: MakeRound) -> None:
    round = contended(make_round, ours=3)
    outcome = policy("dual").grant(round)
    assert (outcome.granted.tolist(), len(outcome.planned)) == ([0], 10)
    rules = [ByTime(5.0, 20.0)]
    waiting = explain(round, outcome.granted, outcome.order, rules, outcome.planned)
    assert sum(one.kept for one in waiting) == 9
    for one in waiting:
        if one.kept:
            assert (one.reason, one.unlock_at) == (Reason.WAITING_FOR_UNLOCK, 25.0)
        else:
            assert (one.reason, one.held) == (Reason.OUTRANKED, True)
    late = replace(round, unlocked=round.capacity)
    assert len(policy("dual").grant(late).granted) == 10


def test_without_competition_nobody_waits(make_round: MakeRound) -> None:
    tasks = [{"demand": [10], "blocks": [0]} for _ in range(3)]
    now = make_round([[100]], tasks, unlocked=[[30]])
    assert len(policy("dual").grant(replace(now, soon=now.capacity)).granted) == 3


def test_prices_do_not_hold_up_who_goes_first_for_another_reason(make_round: MakeRound) -> None:
    round = contended(make_round, ours=1)
    assert len(policy("dual").grant(round).granted) == 0
    assert len(policy("dual").grant(round, fairness=0.5).granted) == 3
    priority = np.array([1] + [0] * 12)
    assert len(policy("dual").grant(replace(round, priority=priority)).granted) == 3


@given(
    seed=st.integers(0, 10**6),
    tasks=st.integers(1, 14),
    name=st.sampled_from(sorted(POLICIES)),
    fairness=st.sampled_from([0.0, 0.4]),
    elastic=st.booleans(),
    equal=st.booleans(),
)
@budget(max_examples=150)
def test_grants_fit_now_and_everybody_who_waits_is_told_why(
    random_round: MakeRound,
    elastic_round: MakeRound,
    seed: int,
    tasks: int,
    name: str,
    fairness: float,
    elastic: bool,
    equal: bool,
) -> None:
    now = (elastic_round if elastic else random_round)(seed, tasks, 3, 3)
    if equal:
        now = replace(now, priority=np.zeros_like(now.priority))
    part = np.random.default_rng(seed).choice([0.0, 0.5, 1.0], (3, 1))
    soon = now.unlocked + ((now.capacity - now.unlocked) * part).astype(np.int64)
    round = replace(now, soon=soon)
    assert name == "dual" or not jobs_that_are_kept_waiting(round, name, fairness)


@pytest.mark.parametrize("elastic", [False, True])
def test_whoever_waits_for_better_ones_is_told_so(
    random_round: MakeRound, elastic_round: MakeRound, elastic: bool
) -> None:
    found = 0
    for seed in range(150):
        now = (elastic_round if elastic else random_round)(seed, 14, 3, 3)
        less = np.where(now.capacity > 0, now.unlocked // 3, now.unlocked)
        round = replace(
            now,
            demand=now.demand // 3,
            unlocked=less,
            soon=now.capacity,
            priority=np.zeros_like(now.priority),
        )
        found += bool(jobs_that_are_kept_waiting(round, "dual", 0.0))
    assert found > 5


def jobs_that_are_kept_waiting(round: Round, name: str, fairness: float) -> set[int]:
    """Those in the plan that fit and aren't granted; all else that must hold is checked."""
    outcome = policy(name).grant(round, fairness=fairness)
    now = replace(round, soon=None)
    check_grants(now, outcome.granted)
    check_grants(round.ahead, outcome.planned)
    assert set(outcome.granted.tolist()) <= set(outcome.planned.tolist())
    # Whoever has a place in the plan and fits has not been left out, unless more is to come.
    rest = np.setdiff1d(outcome.planned, outcome.granted)
    left = now.after(outcome.granted, rest)
    more = (round.ahead.unlocked > now.unlocked).any(axis=1)
    kept = {
        int(round.job_of_task[task]) for task in rest[tasks_that_fit(left, left.available)].tolist()
    }
    waiting = explain(round, outcome.granted, outcome.order, [ByTime(0, 1)] * 3, outcome.planned)
    assert len(waiting) == round.jobs - len(outcome.granted)
    assert kept == {int(round.job_of_task[one.task]) for one in waiting if one.kept}
    for one in waiting:
        assert (one.left < one.asked) != one.kept
        assert not one.kept or more[round.blocks_of(one.task)].any()
    return kept


@given(seed=st.integers(0, 10**6), name=st.sampled_from(sorted(POLICIES.keys() - {"optimal"})))
@budget(max_examples=30)
def test_nothing_to_come_changes_nothing(random_round: MakeRound, seed: int, name: str) -> None:
    now = random_round(seed, 12, 3, 3)
    ahead = policy(name).grant(replace(now, soon=now.unlocked))
    assert ahead.granted.tolist() == policy(name).grant(now).granted.tolist()
    assert ahead.granted.tolist() == fill(now, ahead.order).tolist()


def test_soon_is_checked(make_round: MakeRound) -> None:
    now = large_and_small(make_round)
    for soon in ([[49]], [[101]]):
        with pytest.raises(ValueError, match="soon"):
            replace(now, soon=np.array(soon))
