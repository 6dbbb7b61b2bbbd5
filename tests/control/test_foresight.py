"""An operator that looks ahead keeps budget that time unlocks for jobs that are worth more."""

from dataclasses import replace
from datetime import timedelta

from tests.builders import NOW, SETTINGS, UNITS, block, job, snapshot, with_accounts

from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.control.decide import Decision, decide
from dpmoe_operator.control.planning import Planner
from dpmoe_operator.control.times import format_time
from dpmoe_operator.control.views import JobView

DAY = 86_400
# At one order a budget is one number: ε 3 leaves 1.457 at order 8.
SLOW = block(
    budget={"epsilon": "3", "orders": ["8"]}, unlocking={"kind": "time", "lifetimeSeconds": DAY}
)


ONCE = {"steps": 1, "logicalBatch": UNITS}


def large_and_small() -> list[JobView]:
    """One large job of great weight, and a small one that fits half of the budget."""
    return [
        # α/2σ²: 1.384 and 0.64.
        job("large", uid="large", weight=10, training=ONCE, privacy=_sigma("1.7")),
        job("small", uid="small", training=ONCE, privacy=_sigma("2.5")),
    ]


def decide_at(hours: float, foresight: float, jobs: list[JobView] | None = None) -> Decision:
    """What is decided so many hours after a block opened that unlocks over a day."""
    jobs = large_and_small() if jobs is None else jobs
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


def test_equals_wait_for_better_ones_until_all_is_unlocked() -> None:
    """Two of three fit in the end, one of them at noon already; somebody better may still come."""
    names = ["one", "two", "three"]
    jobs = [job(name, uid=name, training=ONCE, privacy=_sigma("2.5")) for name in names]
    assert len(granted(decide_at(12, 0, jobs))) == 1
    noon = decide_at(12, DAY, jobs)
    assert granted(noon) == []
    reasons = sorted(noon.allocation.waiting[name].reason for name in names)
    assert reasons == [Reason.OUTRANKED, Reason.WAITING_FOR_UNLOCK, Reason.WAITING_FOR_UNLOCK]
    end = f"before all of its blocks is unlocked at {format_time(NOW + timedelta(hours=12))}"
    messages = [noon.allocation.waiting[name].message for name in names]
    kept = [message for message in messages if "budget is kept for it" in message]
    assert len(kept) == 2
    assert all(message.endswith(end) for message in kept)
    assert len(granted(decide_at(24, DAY, jobs))) == 2
