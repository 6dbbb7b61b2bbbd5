"""A workload in the manner of the Amazon Reviews experiment of PrivateKube.

Luo et al., OSDI 2021, Section 6.2, in DPack's version (one block a day, (10, 10⁻⁷) each): three
quarters of the tasks are statistics with Laplace noise on the latest day, of ε 0.01, 0.05 or 0.1;
one quarter trains one of 24 models with DP-SGD at δ = 10⁻⁹ and ε 0.5, 1 or 5, on as many of the
latest days as it takes. Arrivals are a Poisson process. The numbers of days are the published
ones; the sampling rate is one for all models here, so the curves are alike but not the same.
"""

import numpy as np

from dpmoe_operator.privacy.calibration import noise_multiplier_for
from dpmoe_operator.privacy.capacity import capacity
from dpmoe_operator.privacy.mechanisms import subsampled_gaussian_rdp
from dpmoe_operator.scheduling.round import Floats
from dpmoe_operator.simulate.amounts import spend_units
from dpmoe_operator.simulate.curves import PUBLISHED_ORDERS, laplace
from dpmoe_operator.simulate.workload import Workload, make_workload

STATISTICS = 0.75
STATISTIC_EPSILONS = (0.01, 0.05, 0.1)
MODEL_EPSILONS = (0.5, 1.0, 5.0)
MODEL_DAYS = np.array(
    [
        *[(20, 10, 5), (5, 5, 2), (2, 2, 1), (5, 2, 2)],  # Product category: BERT, BoW, FF, LSTM.
        *[(5, 5, 2), (2, 1, 1), (2, 1, 1), (10, 5, 1)],  # Sentiment, the same models.
    ]
)
"""Days of data of each model, at each of `MODEL_EPSILONS`."""

_SAMPLING_RATE, _EPOCHS, _DELTA = 0.01, 3, 1e-9


def amazon(
    seed: int, *, tasks_per_day: float = 300.0, days: int = 50, initial_blocks: int = 10
) -> Workload:
    """Tasks over `days`; time is in days."""
    rng = np.random.default_rng(seed)
    count = rng.poisson(tasks_per_day * days)
    arrival = np.sort(rng.uniform(0, days, count))
    statistic = rng.random(count) < STATISTICS
    budget = rng.integers(0, len(MODEL_EPSILONS), count)
    model = rng.integers(0, len(MODEL_DAYS), count)
    opened = np.append(np.zeros(initial_blocks), np.arange(1.0, days))
    there = np.searchsorted(opened, arrival, side="right")
    wanted = np.where(statistic, 1, MODEL_DAYS[model, budget])
    curves = spend_units(np.array([*_statistics(), *_models()]))
    room = capacity("10", "1e-7", PUBLISHED_ORDERS.tolist(), "classic")
    return make_workload(
        "Amazon Reviews",
        orders=PUBLISHED_ORDERS,
        capacity=np.tile(np.array(room, dtype=np.int64), (len(opened), 1)),
        opened=opened,
        demand=curves[np.where(statistic, budget, budget + len(STATISTIC_EPSILONS))],
        asked=[
            np.arange(max(0, end - days_wanted), end)
            for end, days_wanted in zip(there.tolist(), wanted.tolist(), strict=True)
        ],
        arrival=arrival,
    )


def _statistics() -> list[Floats]:
    return [laplace(1 / epsilon, PUBLISHED_ORDERS) for epsilon in STATISTIC_EPSILONS]


def _models() -> list[Floats]:
    steps = round(_EPOCHS / _SAMPLING_RATE)
    return [
        subsampled_gaussian_rdp(
            noise_multiplier_for(epsilon, _DELTA, _SAMPLING_RATE, steps),
            _SAMPLING_RATE,
            steps,
            PUBLISHED_ORDERS.tolist(),
        )
        for epsilon in MODEL_EPSILONS
    ]
