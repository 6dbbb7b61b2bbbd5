"""Dual, its bound, and optimal: against brute force where that is possible, and each other."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from dpmoe_operator.scheduling import area, dpack, dual, optimal
from dpmoe_operator.scheduling.bounds import upper_bound
from dpmoe_operator.scheduling.filling import fill, fits
from dpmoe_operator.scheduling.outcome import Prices, Ranking
from dpmoe_operator.scheduling.policies import Policy, policy
from dpmoe_operator.scheduling.round import Round
from dpmoe_operator.scheduling.shares import largest_and_summed

MakeRound = Callable[..., Round]
BestWeight = Callable[[Round], float]
tiny = {
    "seed": st.integers(0, 2**32),
    "tasks": st.integers(1, 8),
    "blocks": st.integers(1, 4),
    "orders": st.integers(1, 4),
}


def weight_of(round: Round, order: np.ndarray) -> float:
    return float(round.weight[fill(round, order)].sum())


@given(**tiny, prices=st.integers(0, 2**32))
def test_any_prices_bound_any_set(
    random_round: MakeRound,
    best_weight: BestWeight,
    seed: int,
    tasks: int,
    blocks: int,
    orders: int,
    prices: int,
) -> None:
    """Whatever the prices and picks, and at whatever orders the blocks hold."""
    round = random_round(seed, tasks, blocks, orders)
    rng = np.random.default_rng(prices)
    guess = Prices(rng.exponential(3, blocks) * (rng.random(blocks) < 0.7), np.zeros(blocks, int))
    guess = replace(guess, pick=rng.integers(0, orders, blocks))
    assert upper_bound(round, guess) >= best_weight(round)


@given(**tiny)
@budget(max_examples=50)
def test_the_bound_of_dual_is_valid(
    random_round: MakeRound,
    best_weight: BestWeight,
    seed: int,
    tasks: int,
    blocks: int,
    orders: int,
) -> None:
    round = random_round(seed, tasks, blocks, orders)
    outcome = policy("dual").grant(round, fairness=seed % 3 / 2)
    assert outcome.bound is not None
    assert outcome.weight <= best_weight(round) <= outcome.bound


def test_a_whole_weight_bounds_in_whole_numbers(make_round: MakeRound) -> None:
    """The relaxed knapsack is worth 2.5 tasks; whole weights make that 2, and halves don't."""
    tasks = [{"demand": [4], "blocks": [0]}] * 4
    assert policy("dual").grant(make_round([[10]], tasks)).bound == 2
    halves = [{**task, "weight": 0.5} for task in tasks]
    assert policy("dual").grant(make_round([[10]], halves)).bound == pytest.approx(1.25)


def test_the_bound_leaves_blocks_their_order(make_round: MakeRound) -> None:
    """At the first order only one task fits, at the second all do; no pick may hide that."""
    round = make_round([[10, 10]], [{"demand": [9, 2], "blocks": [0]}] * 5)
    for pick in (0, 1):
        assert upper_bound(round, Prices(np.ones(1), np.array([pick]))) == 5


def test_nothing_fits_and_nothing_waits(make_round: MakeRound) -> None:
    round = make_round([[10], [0]], [{"demand": [11], "blocks": [0]}])
    for empty in (round, make_round([[10]], [])):
        for name in ("dual", "optimal"):
            outcome = policy(name).grant(empty)
            assert outcome.granted.tolist() == []
            assert (outcome.weight, outcome.bound) == (0, 0)


@given(
    seed=st.integers(0, 2**32),
    tasks=st.integers(0, 40),
    blocks=st.integers(1, 5),
    orders=st.integers(1, 4),
)
@budget(max_examples=50)
def test_dual_is_never_behind_the_simple_policies(
    random_round: MakeRound, seed: int, tasks: int, blocks: int, orders: int
) -> None:
    round = random_round(seed, tasks, blocks, orders)
    round = replace(round, priority=np.zeros(tasks, np.int64))
    ours = policy("dual").grant(round).weight
    shares = np.lexsort((round.arrival, largest_and_summed(round)[0] / round.weight))
    for order in (
        dpack.order(round),
        dpack.order(round, published_ties=True),
        area.order(round),
        shares,
    ):
        assert ours >= weight_of(round, order)


@pytest.mark.parametrize("seed", range(5))
def test_dual_is_close_to_the_optimum(curves_round: MakeRound, seed: int) -> None:
    """Within 3 % of its own bound, and so of the optimum, on 50 tasks and 7 blocks."""
    outcome = policy("dual").grant(curves_round(seed, 50, 7, 7))
    assert outcome.bound is not None
    assert outcome.weight >= 0.97 * outcome.bound


def test_dual_is_ahead_of_dpack_where_blocks_are_unequal(curves_round: MakeRound) -> None:
    rounds = [curves_round(seed, 400, 12, 12) for seed in range(3)]
    ours = sum(policy("dual").grant(round).weight for round in rounds)
    bound = sum(policy("dual").grant(round).bound or 0.0 for round in rounds)
    theirs = sum(policy("dpack").grant(round).weight for round in rounds)
    assert ours >= 1.01 * theirs
    assert ours >= 0.97 * bound


def test_prices_tell_scarce_blocks_from_idle_ones(make_round: MakeRound) -> None:
    """Block 0 is asked for by ten tasks too many, block 1 has room for all."""
    tasks = [{"demand": [10], "blocks": [i % 2]} for i in range(40)]
    prices = policy("dual").grant(make_round([[100], [400]], tasks)).prices
    assert prices is not None
    assert prices.price[0] > 5
    assert prices.price[1] < 0.01


def test_a_warm_start_is_as_good_and_repeatable(curves_round: MakeRound) -> None:
    round = curves_round(3, 300, 10, 6)
    cold = policy("dual").grant(round)
    warm = policy("dual").grant(round, prices=cold.prices)
    again = policy("dual").grant(round, prices=cold.prices)
    assert warm.weight >= cold.weight
    assert warm.granted.tolist() == again.granted.tolist()
    assert (warm.bound, warm.weight) == (again.bound, again.weight)


@given(**tiny, prices=st.integers(0, 2**32))
@budget(max_examples=50)
def test_a_misleading_start_breaks_nothing(
    random_round: MakeRound, seed: int, tasks: int, blocks: int, orders: int, prices: int
) -> None:
    """Prices of other times, at orders that are used up since, or that a block lacks."""
    round = random_round(seed, tasks, blocks, orders)
    rng = np.random.default_rng(prices)
    old = Prices(rng.choice([0.0, 1e-12, 1.0, 1e12], blocks), rng.integers(0, orders, blocks))
    for priority in (round.priority, np.zeros(tasks, np.int64)):
        round = replace(round, priority=priority)
        outcome = policy("dual").grant(round, prices=old)
        if not priority.any():
            assert outcome.weight >= policy("dpack").grant(round).weight


def test_prices_move_to_the_rows_of_the_next_round() -> None:
    prices = Prices(np.array([1.0, 2.0, 6.0]), np.array([3, 4, 5]))
    moved = prices.on(np.array([2, -1, 0]))
    assert moved.price.tolist() == [6.0, 3.0, 1.0]
    assert moved.pick.tolist() == [5, 0, 3]


@given(**tiny)
@budget(max_examples=40)
def test_optimal_is_the_best_set(
    random_round: MakeRound,
    best_weight: BestWeight,
    seed: int,
    tasks: int,
    blocks: int,
    orders: int,
) -> None:
    round = random_round(seed, tasks, blocks, orders)
    round = replace(round, priority=np.zeros(tasks, np.int64))
    outcome = policy("optimal").grant(round)
    assert outcome.bound is not None
    assert outcome.weight == pytest.approx(best_weight(round), rel=1e-9)
    assert outcome.bound >= outcome.weight


def test_who_asks_nothing_fits_where_nothing_is_left(make_round: MakeRound) -> None:
    """Three tasks hold at the second order, of which nothing is left and which costs them nothing.

    Any two of them are too much at the first one.
    """
    tasks = [{"demand": [6, 0], "blocks": [0]}] * 3 + [{"demand": [5, 1], "blocks": [0]}] * 2
    round = make_round([[10, 0]], tasks)
    chosen, proven = optimal._solve(round, np.array([3, 4]), 5.0)
    assert chosen.tolist() == [True] * 3 + [False] * 2
    assert proven == pytest.approx(3)


def test_optimal_beats_every_greedy_order(make_round: MakeRound) -> None:
    """Two tasks of weight 5 fill the block; any order by efficiency takes the one of 6 first."""
    tasks = [
        {"demand": [6], "blocks": [0], "weight": 6.5},
        {"demand": [5], "blocks": [0], "weight": 5},
        {"demand": [5], "blocks": [0], "weight": 5},
    ]
    round = make_round([[10]], tasks)
    assert policy("optimal").grant(round).weight == 10
    assert policy("dpack").grant(round).weight == 6.5


def test_optimal_falls_back_when_its_time_is_over(curves_round: MakeRound) -> None:
    round = curves_round(1, 120, 7, 7)
    start = dual.rank(round)
    stopped = optimal.rank(round, seconds=0.0)
    assert weight_of(round, stopped.order) >= weight_of(round, start.order)
    assert start.bound is not None
    assert stopped.bound is not None
    assert weight_of(round, stopped.order) <= stopped.bound <= start.bound


def test_what_a_solver_lets_in_by_tolerance_is_dropped(
    make_round: MakeRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A solver that says both tasks fit, and that this is proven: integers decide."""
    round = make_round([[10]], [{"demand": [6], "blocks": [0]}, {"demand": [5], "blocks": [0]}])
    monkeypatch.setattr(dual, "rank", lambda r, p: Ranking(np.array([0, 1]), 2.0, p))
    monkeypatch.setattr(optimal, "_solve", lambda *_: (np.array([True, True]), 2.0))
    outcome = Policy("optimal", optimal.rank).grant(round)
    assert outcome.granted.tolist() == [0]
    assert not fits(np.array([11]), round.available)
