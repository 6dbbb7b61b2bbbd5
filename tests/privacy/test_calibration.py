"""Calibration against dp-accounting's accountant, Opacus' search, and its own promises."""

import math
import warnings

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import RDPAccountant
from opacus.accountants.utils import get_noise_multiplier

from dpmoe_operator.privacy.calibration import (
    CalibrationError,
    epsilon_for,
    noise_multiplier_for,
)

RUNS = [
    # ε, δ, q, steps
    (2.0, 1e-5, 0.01, 1000),
    (1.0, 1e-6, 0.001, 5000),
    (8.0, 1e-5, 0.05, 200),
    (0.2, 1e-7, 0.01, 500),
    (4.0, 1e-5, 1.0, 10),
    (6.0, 1e-5, 0.5, 20),
]


def accountant_epsilon(sigma: float, delta: float, q: float, steps: int) -> float:
    accountant = RdpAccountant()
    event = PoissonSampledDpEvent(q, GaussianDpEvent(sigma))
    accountant.compose(SelfComposedDpEvent(event, steps))
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(
    ("sigma", "q", "steps"), [(0.5, 0.001, 100), (1.0, 0.01, 1000), (9, 0.2, 50)]
)
@pytest.mark.parametrize("delta", [1e-9, 1e-5])
def test_epsilon_is_that_of_the_dense_accountant(
    sigma: float, q: float, steps: int, delta: float
) -> None:
    expected = accountant_epsilon(sigma, delta, q, steps)
    assert epsilon_for(sigma, delta, q, steps) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("sigma", "q", "steps"), [(0.8, 0.01, 300), (2.0, 0.05, 100)])
def test_epsilon_agrees_with_opacus(sigma: float, q: float, steps: int) -> None:
    accountant = RDPAccountant()
    accountant.history = [(sigma, q, steps)]
    theirs = accountant.get_epsilon(delta=1e-5)
    assert epsilon_for(sigma, 1e-5, q, steps) == pytest.approx(theirs, rel=2e-3)


@pytest.mark.parametrize(("epsilon", "delta", "q", "steps"), RUNS)
def test_the_guarantee_holds_and_is_not_overpaid(
    epsilon: float, delta: float, q: float, steps: int
) -> None:
    sigma = noise_multiplier_for(epsilon, delta, q, steps)
    assert epsilon_for(sigma, delta, q, steps) <= epsilon
    assert accountant_epsilon(sigma, delta, q, steps) <= epsilon
    assert epsilon_for(sigma * (1 - 1e-4), delta, q, steps) > epsilon
    assert sigma == float(f"{sigma:.6g}")


@pytest.mark.parametrize(("epsilon", "delta", "q", "steps"), RUNS[:3])
def test_it_agrees_with_opacus(epsilon: float, delta: float, q: float, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus warns when its best order is its largest.
        theirs = get_noise_multiplier(
            target_epsilon=epsilon,
            target_delta=delta,
            sample_rate=q,
            steps=steps,
            epsilon_tolerance=1e-3 * epsilon,
        )
    assert noise_multiplier_for(epsilon, delta, q, steps) == pytest.approx(theirs, rel=2e-3)


def test_without_sampling_it_approaches_the_gaussian() -> None:
    """One order's closed form: ε = α/(2σ²)·T + cost(α) at the best α can't be beaten."""
    sigma = noise_multiplier_for(1.0, 1e-5, 1.0, 1)
    best = min(
        a / (2 * sigma**2) + math.log((a - 1) / a) - math.log(1e-5 * a) / (a - 1)
        for a in [1 + x / 1000 for x in range(100, 60000)]
    )
    assert best == pytest.approx(1.0, rel=1e-3)


def test_more_is_never_cheaper() -> None:
    base = noise_multiplier_for(2.0, 1e-5, 0.01, 500)
    assert noise_multiplier_for(2.0, 1e-5, 0.01, 1000) > base
    assert noise_multiplier_for(2.0, 1e-5, 0.02, 500) > base
    assert noise_multiplier_for(1.0, 1e-5, 0.01, 500) > base
    assert noise_multiplier_for(2.0, 1e-7, 0.01, 500) > base


def test_no_steps_cost_nothing() -> None:
    assert epsilon_for(1.0, 1e-5, 0.1, 0) == 0


@pytest.mark.parametrize(
    ("arguments", "field", "remedy"),
    [
        ((1e-6, 1e-6, 0.5, 10**6), "epsilon", "larger epsilon, fewer steps"),
        ((1e9, 1e-5, 0.01, 1), "epsilon", "smaller epsilon"),
        ((0.0, 1e-5, 0.01, 10), "epsilon", "above 0"),
        ((math.nan, 1e-5, 0.01, 10), "epsilon", "finite"),
        ((math.inf, 1e-5, 0.01, 10), "epsilon", "finite"),
        ((1.0, 0.0, 0.01, 10), "delta", "between 0 and 1"),
        ((1.0, 1.0, 0.01, 10), "delta", "between 0 and 1"),
        ((1.0, 1e-5, 0.0, 10), "sampling rate", r"\(0, 1\]"),
        ((1.0, 1e-5, 1.5, 10), "sampling rate", r"\(0, 1\]"),
        ((1.0, 1e-5, 0.1, 0), "steps", "at least 1"),
        ((1.0, 1e-5, 0.1, 10**400), "steps", "whole number"),
        ((1.0, 1e-5, 0.1, -3), "steps", "whole number"),
    ],
)
def test_impossible_calibrations_name_field_value_and_remedy(
    arguments: tuple[float, float, float, int], field: str, remedy: str
) -> None:
    with pytest.raises(CalibrationError, match=remedy) as caught:
        noise_multiplier_for(*arguments)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: {caught.value.value}: ")
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_noise_multiplier_is_named(sigma: float) -> None:
    with pytest.raises(CalibrationError, match="noise multiplier"):
        epsilon_for(sigma, 1e-5, 0.1, 10)
