"""Published workloads, rebuilt: the facts that are known of them hold."""

from collections import Counter

import numpy as np
import pytest

from dpmoe_operator.privacy.mechanisms import subsampled_gaussian_rdp
from dpmoe_operator.scheduling.policies import policy
from dpmoe_operator.simulate import zoo
from dpmoe_operator.simulate.curves import PUBLISHED_ORDERS, gaussian, laplace, subsampled_laplace
from dpmoe_operator.simulate.engine import play
from dpmoe_operator.simulate.generators import amazon, dpack, large, privatekube
from dpmoe_operator.simulate.rules import Rules, Unlock
from dpmoe_operator.simulate.workload import Workload


def best_orders(least: float) -> dict[float, int]:
    curves = zoo.all_curves()
    floor = curves.min(axis=1)
    kept = curves[(floor > least) & (floor < 1)]
    return dict(Counter(zoo.ORDERS[kept.argmin(axis=1)].tolist()))


def test_the_zoo_is_the_published_one() -> None:
    assert zoo.all_curves().shape == (620, 8)
    assert zoo.ORDERS.tolist() == [3, 4, 5, 6, 8, 16, 32, 64]
    assert sum(best_orders(0.01).values()) == 239
    assert best_orders(0.01)[5] == 123
    assert best_orders(0.05) == {3: 2, 4: 12, 5: 81, 6: 7, 8: 8, 16: 5, 64: 66}


def test_curves_are_normalised_as_asked() -> None:
    knob = zoo.build_zoo(least_demand=0.05, smallest=0.01, order_spread=6, flatness=(0.05, 0.03))
    assert len(knob.frequency) == 181
    assert knob.normalised.min(axis=1) == pytest.approx(0.01)
    assert knob.frequency.sum() == pytest.approx(1)
    flat = knob.normalised[:, 1:5]
    for order in (4, 5, 6, 8, 64):
        group = knob.best_order == order
        assert np.ptp(flat[group], axis=1).mean() == pytest.approx(0.05)
        assert np.ptp(flat[group], axis=1).std(ddof=1) == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("spread", "shares"),
    [(0, {5.0: 1.0}), (0.5, {64.0: 1.0}), (8, {3.0: 0.140, 5.0: 0.136, 64.0: 0.165})],
)
def test_the_orders_knob_draws_as_the_published_generator(
    spread: float, shares: dict[float, float]
) -> None:
    knob = zoo.build_zoo(least_demand=0.05, smallest=0.01, order_spread=spread, flatness=None)
    for order, share in shares.items():
        assert knob.frequency[knob.best_order == order].sum() == pytest.approx(share, abs=1e-3)


def test_blocks_knob() -> None:
    level = dpack.blocks_knob(0, 0.0)
    assert (level.tasks, level.blocks) == (1000, 20)
    assert set(np.diff(level.indptr).tolist()) == {10}
    varied = np.diff(dpack.blocks_knob(0, 10.0).indptr)
    assert varied.min() == 1
    assert varied.max() == 20
    # 20 tasks of a twentieth fit a block, and 20 blocks hold 400 such pairs: 40 tasks of ten.
    assert play(level, policy("fcfs"), Rules()).granted.sum() <= 40
    share = level.demand[:, 2] / level.capacity[0, 2]
    assert share == pytest.approx(0.05)


def test_twenty_tasks_of_a_twentieth_fit() -> None:
    knob = dpack.orders_knob(0, 0.0, smallest=0.05, tasks=30)
    assert play(knob, policy("fcfs"), Rules()).granted.sum() == 20


def test_privatekube_basic() -> None:
    workload = privatekube.multi_block(0)
    assert workload.tasks == pytest.approx(300 / 0.078125, rel=0.05)
    assert workload.blocks == 12 + 29
    counts = Counter(np.diff(workload.indptr).tolist())
    assert counts[1] / workload.tasks == pytest.approx(0.75, abs=0.03)
    assert counts.keys() == {1, 10}
    mice = workload.demand[:, 0] <= 10_000_000
    assert mice.mean() == pytest.approx(0.75, abs=0.03)
    assert set(workload.demand[mice, 0].tolist()) <= {9_999_999, 10_000_000}
    asked = workload.indices[workload.indptr[1:] - 1]
    latest = np.searchsorted(workload.opened, workload.arrival, side="right") - 1
    assert asked.tolist() == latest.tolist()


def test_privatekube_renyi() -> None:
    workload = privatekube.multi_block(0, renyi=True, interval=1.0, seconds=60.0)
    assert (workload.capacity > 0).all()
    mouse, block = workload.demand.min(axis=0), workload.capacity[0]
    # 14,514 mice fill a block, at order 32: the largest N of the published experiment.
    fitting = block / mouse
    assert fitting.max() == pytest.approx(14514, rel=1e-3)
    assert workload.orders[fitting.argmax()] == 32


@pytest.mark.parametrize(
    ("name", "fair_shares", "least"), [("fcfs", None, 40), ("dpf", 100, 75), ("dpf", 175, 95)]
)
def test_privatekube_on_one_block(name: str, fair_shares: int | None, least: int) -> None:
    """Its own simulator grants 46, 82 and 100 on its seed; at most 100 mice fit."""
    workload = privatekube.single_block(0)
    granted = play(workload, policy(name), Rules(Unlock(fair_shares=fair_shares))).granted.sum()
    assert least <= granted <= 100


@pytest.mark.parametrize(
    "make",
    [
        privatekube.single_block,
        privatekube.multi_block,
        lambda seed: dpack.blocks_knob(seed, 4.0),
        lambda seed: dpack.orders_knob(seed, 6.0),
        dpack.both_knobs,
        lambda seed: amazon.amazon(seed, tasks_per_day=20),
        lambda seed: large.large(seed, tasks=300, blocks=20),
    ],
)
def test_a_seed_says_everything(make) -> None:  # type: ignore[no-untyped-def]
    def same(one: Workload, other: Workload) -> bool:
        return all(
            np.array_equal(getattr(one, field), getattr(other, field))
            for field in ("arrival", "indices", "demand", "opened")
        )

    assert same(make(3), make(3))
    assert not same(make(3), make(4))


def test_laplace_is_the_integral_of_its_densities() -> None:
    """1/(α−1) · ln ∫ p^α q^(1−α), by a sum over a fine grid."""
    x, width = np.linspace(-60, 61, 2_000_001, retstep=True)
    scale = 2.0
    log_p, log_q = -abs(x) / scale - np.log(2 * scale), -abs(x - 1) / scale - np.log(2 * scale)
    for order in (1.5, 3.0, 8.0):
        integral = np.exp(order * log_p + (1 - order) * log_q).sum() * width
        expected = np.log(integral) / (order - 1)
        assert laplace(scale, np.array([order]))[0] == pytest.approx(expected, rel=1e-6)


def test_subsampling_everything_is_not_subsampling() -> None:
    orders = np.array([2.0, 5.0, 32.0])
    whole = subsampled_laplace(1.5, 1 - 1e-12, 1, orders)
    assert whole == pytest.approx(laplace(1.5, orders), rel=1e-6)


def test_subsampled_moments_match_the_gaussian_ones_at_whole_orders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same sum with Gaussian curves inside is what dp-accounting computes."""
    from dpmoe_operator.simulate import curves

    monkeypatch.setattr(curves, "laplace", gaussian)
    orders = np.array([2.0, 3.0, 8.0, 16.0])
    ours = curves.subsampled_laplace(2.0, 0.05, 10, orders)
    theirs = subsampled_gaussian_rdp(2.0, 0.05, 10, orders.tolist())
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_amazon() -> None:
    workload = amazon.amazon(0, tasks_per_day=100)
    assert workload.tasks == pytest.approx(5000, rel=0.05)
    assert workload.orders.tolist() == PUBLISHED_ORDERS.tolist()
    days = np.diff(workload.indptr)
    assert (days == 1).mean() == pytest.approx(0.75 + 0.25 * 6 / 24, abs=0.02)
    assert days.max() == 20
