"""The trainer's own accounting, against dp-accounting's, which plans are made with."""

import math

import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import RDPAccountant

from dpmoe_trainer.dp.accounting import AccountingMismatch, check_plan, spent

ORDERS = [1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64]
DENSE = sorted({*ORDERS, *RDPAccountant.DEFAULT_ALPHAS})
PLANS = [(0.8, 0.01, 1000), (1.1, 0.06, 98), (4.0, 0.3, 50), (5.0, 1.0, 10), (20.0, 0.06, 98)]
DELTA = 1e-5


def planned(noise_multiplier, sampling_rate, steps, orders=ORDERS):
    event = dp_event.PoissonSampledDpEvent(
        sampling_rate, dp_event.GaussianDpEvent(noise_multiplier)
    )
    accountant = RdpAccountant(orders)
    accountant.compose(event, steps)
    return accountant.get_epsilon(DELTA)


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_that_states_its_cost_passes(plan):
    check_plan(*plan, planned(*plan), DELTA, ORDERS)


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_calibrated_on_many_orders_passes_with_few(plan):
    check_plan(*plan, planned(*plan, orders=DENSE), DELTA, [2, 64])


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_that_states_less_than_its_cost_is_refused(plan):
    # At fractional orders dp-accounting's curve is the higher, which leaves two percent of room.
    stated = planned(*plan, orders=DENSE) * 0.98
    with pytest.raises(AccountingMismatch, match="epsilon is") as refusal:
        check_plan(*plan, stated, DELTA, ORDERS)
    assert isinstance(refusal.value, ValueError)


@pytest.mark.parametrize("plan", [(5.0, 1.0, 10), (20.0, 1.0, 300)])
def test_where_both_accountants_have_the_same_curve_a_thousandth_is_what_passes(plan):
    stated = planned(*plan, orders=DENSE)
    check_plan(*plan, stated * (1 - 0.9e-3), DELTA, ORDERS)
    with pytest.raises(AccountingMismatch):
        check_plan(*plan, stated * (1 - 1.1e-3), DELTA, ORDERS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_multiplier", 0.0),
        ("noise_multiplier", math.nan),
        ("noise_multiplier", math.inf),
        ("sampling_rate", 0.0),
        ("sampling_rate", 1.5),
        ("steps", 0),
        ("steps", 2.5),
        ("epsilon", 0.0),
        ("epsilon", math.inf),
        ("epsilon", math.nan),
        ("delta", 0.0),
        ("delta", 1.0),
        ("orders", []),
        ("orders", [1.0, 2.0]),
        ("orders", [math.nan]),
    ],
)
def test_nonsense_is_refused_by_name(field, value):
    plan = {
        "noise_multiplier": 1.0,
        "sampling_rate": 0.01,
        "steps": 100,
        "epsilon": 8.0,
        "delta": DELTA,
        "orders": ORDERS,
    }
    check_plan(**plan)
    with pytest.raises(AccountingMismatch, match=field):
        check_plan(**plan | {field: value})


@pytest.mark.parametrize("plan", PLANS)
def test_spending_grows_with_the_steps_up_to_the_plan(plan):
    noise_multiplier, sampling_rate, steps = plan
    so_far = [
        spent(noise_multiplier, sampling_rate, done, DELTA, ORDERS)
        for done in (0, 1, steps // 2, steps)
    ]
    assert so_far[0] == 0
    assert so_far == sorted(so_far)
    assert so_far[-1] <= planned(*plan) * (1 + 1e-9)
    assert so_far[-1] > 0
