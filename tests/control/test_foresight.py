"""An operator that looks ahead keeps budget that time unlocks for jobs that are worth more."""

from dataclasses import replace
from datetime import timedelta

from tests.builders import NOW, SETTINGS, UNITS, block, job, snapshot, with_accounts

from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.control.decide import Decision, decide
from dpmoe_operator.control.planning import Planner

DAY = 86_400
# At one order a budget is one number: ε 3 leaves 1.457 at order 8.
SLOW = block(
    budget={"epsilon": "3", "orders": ["8"]}, unlocking={"kind": "time", "lifetimeSeconds": DAY}
)


def decide_at(hours: float, foresight: float, lifetime: float = 24.0) -> Decision:
    """One large job of great weight, and a small one that fits half of the budget."""
    once = {"steps": 1, "logicalBatch": UNITS}
    jobs = [
        # α/2σ²: 1.384 and 0.64.
        job("large", uid="large", weight=10, training=once, privacy=_sigma("1.7")),
        job("small", uid="small", training=once, privacy=_sigma("2.5")),
    ]
    ledger = with_accounts(SLOW, time=NOW - timedelta(hours=hours))
    settings = replace(SETTINGS, foresight_seconds=foresight)
    return decide(snapshot([SLOW], jobs, ledger=ledger), settings, Planner(settings))


def _sigma(sigma: str) -> dict[str, str | None]:
    return {"epsilon": None, "noiseMultiplier": sigma}


def granted(decision: Decision) -> list[str]:
    return [record.job.name for record in decision.allocation.granted]


def test_budget_is_kept_for_the_larger_job() -> None:
    assert granted(decide_at(12, 0)) == ["small"]
    kept = decide_at(12, DAY)
    assert granted(kept) == []
    waiting = kept.allocation.waiting
    assert waiting["large"].reason is Reason.WAITING_FOR_UNLOCK
    assert waiting["small"].reason is Reason.OUTRANKED
    assert "budget is kept for jobs before it that fit once more is unlocked" in (
        waiting["small"].message
    )
    assert granted(decide_at(24, DAY)) == ["large"]


def test_a_short_sight_keeps_nothing() -> None:
    assert granted(decide_at(12, DAY / 24)) == ["small"]
