"""Elastic jobs in a round: which point is granted, what pins it, and what people read."""

from typing import Any

import pytest
from tests.builders import (
    ABSENT,
    NOW,
    SETTINGS,
    TEAM,
    Object,
    block,
    commit,
    job,
    snapshot,
    with_accounts,
)

from dpmoe_operator.api.ledgerentry import Granted
from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.control.access import Refusal
from dpmoe_operator.control.accounts import standings
from dpmoe_operator.control.actions import SetStatus
from dpmoe_operator.control.decide import Decision, decide, react
from dpmoe_operator.control.market import Market
from dpmoe_operator.control.planning import Planned, Planner
from dpmoe_operator.control.views import JobView
from dpmoe_operator.ledger.fold import LedgerState
from dpmoe_operator.privacy.calibration import epsilon_for
from dpmoe_operator.scheduling.policies import POLICIES

BOTH = {
    "blocks": {"names": ["a", "b"]},
    "privacy": {"epsilon": "4"},
    "elastic": {
        "epsilon": [{"epsilon": "1", "utility": "0.5"}, {"epsilon": "2", "utility": "0.8"}],
        "blocks": [{"count": 1, "utility": "0.7"}],
    },
}


def two(epsilon_a: str = "10", epsilon_b: str = "10") -> list[Object]:
    return [block("a", budget={"epsilon": epsilon_a}), block("b", budget={"epsilon": epsilon_b})]


def decide_on(
    blocks: list[Object], jobs: list[Object], ledger: LedgerState, **rest: Any
) -> Decision:
    seen = snapshot(blocks, jobs, ledger=ledger)
    return decide(seen, rest.pop("settings", SETTINGS), Planner(SETTINGS), **rest)


def grants(decision: Decision) -> list[Granted]:
    return [record.granted for record in decision.records if record.granted is not None]


def point(granted: Granted) -> tuple[str, int, str | None]:
    return granted.epsilon, len(granted.charges), granted.utility


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_the_best_point_that_fits_is_granted(name: str) -> None:
    settings = SETTINGS.__class__(SETTINGS.namespace, SETTINGS.trainer_image, policy=name)
    for epsilons, expected in (
        (("10", "10"), ("4", 2, "1")),
        (("10", "2.5"), ("2", 2, "0.8")),
        (("10", "0.5"), ("4", 1, "0.7")),
        (("1.5", "0.5"), ("1", 1, "0.35")),
    ):
        blocks = two(*epsilons)
        asked = job(uid="e", **BOTH)
        [granted] = grants(decide_on(blocks, [asked], with_accounts(*blocks), settings=settings))
        assert point(granted) == expected


def test_the_plan_is_calibrated_to_the_point_and_stays_pinned() -> None:
    """Also once a better point would fit: what was granted is what is launched."""
    blocks = two("10", "2.5")
    ledger, asked = with_accounts(*blocks), job(uid="e", **BOTH)
    [granted] = grants(decide_on(blocks, [asked], ledger))
    spent = epsilon_for(
        float(granted.noise_multiplier),
        float(granted.delta),
        float(granted.sampling_rate),
        granted.steps,
    )
    assert 1.98 < spent <= 2
    commit(ledger, granted)
    again = decide_on(blocks, [asked], ledger)
    assert again.records == ()
    planned = again.plans["e"]
    assert planned.plan.digest() == granted.plan_digest
    assert (planned.plan.privacy.epsilon, len(planned.plan.blocks)) == (2, 2)


def test_a_selector_is_pinned_with_its_point() -> None:
    labels = {"labels": {"kind": "reviews"}}
    blocks = [block("a", meta=labels), block("b", meta=labels, budget={"epsilon": "2.5"})]
    selects = {"names": ABSENT, "selector": {"matchLabels": {"kind": "reviews"}}, "count": 2}
    ledger, asked = with_accounts(*blocks), job(uid="e", **(BOTH | {"blocks": selects}))
    [granted] = grants(decide_on(blocks, [asked], ledger))
    assert point(granted) == ("2", 2, "0.8")
    commit(ledger, granted)
    assert decide_on(blocks, [asked], ledger).plans["e"].plan.digest() == granted.plan_digest


def test_two_jobs_share_what_one_would_have_taken() -> None:
    """The blocks hold one job at its best; together the two are worth more at smaller points."""
    blocks = two("4.5", "4.5")
    jobs = [job(f"j{i}", uid=f"j{i}", **BOTH) for i in range(2)]
    granted = grants(decide_on(blocks, jobs, with_accounts(*blocks)))
    assert len(granted) == 2
    assert sum(float(one.utility or 0) for one in granted) > 1


def test_status_says_which_point_was_chosen() -> None:
    blocks = two("10", "2.5")
    ledger, asked = with_accounts(*blocks), job(uid="e", **BOTH)
    decision = decide_on(blocks, [asked], ledger)
    commit(ledger, *grants(decision))
    actions = react(snapshot(blocks, [asked], ledger=ledger), decision, SETTINGS)
    [status] = [a.patch for a in actions if isinstance(a, SetStatus) and a.kind == "DPMoEJob"]
    assert (status["epsilon"], status["utility"], status["blocks"]) == ("2", "0.8", ["a", "b"])
    [reserved] = [c for c in status["conditions"] if c["type"] == "BudgetReserved"]
    assert "epsilon 2 on 2 of spec.blocks, utility 0.8 of 1" in reserved["message"]


def test_the_closest_point_is_explained() -> None:
    blocks = two("0.5", "0.5")
    decision = decide_on(blocks, [job(uid="e", **BOTH)], with_accounts(*blocks))
    waiting = decision.allocation.waiting["e"]
    assert waiting.reason is Reason.DEMAND_EXCEEDS_CAPACITY
    assert waiting.message.startswith("closest at epsilon 1 on ")


def test_an_elastic_job_is_one_arrival() -> None:
    blocks = two()
    for one in blocks:
        one["spec"]["unlocking"] = {"kind": "arrivals", "arrivals": 2}
    decision = decide_on(blocks, [job(uid="e", **BOTH)], with_accounts(*blocks))
    for unlocked in decision.allocation.unlocked.values():
        assert unlocked.rule.arrivals == 1  # type: ignore[union-attr]


def plan(asked: Object, blocks: list[Object]) -> Planned:
    return Planner(SETTINGS).plan(JobView.of(asked), standings(snapshot(blocks)))


def test_a_point_waits_for_blocks_only_while_no_other_has_them() -> None:
    assert {len(point.plan.blocks) for point in plan(job(**BOTH), two()[:1]).points} == {1}
    retired = [two()[0], block("b", retired=True)]
    assert {len(point.plan.blocks) for point in plan(job(**BOTH), retired).points} == {1}
    with pytest.raises(Refusal) as refused:
        plan(job(**BOTH), two()[1:])
    assert refused.value.reason is Reason.BLOCK_NOT_FOUND


def test_any_other_fault_of_a_point_is_one_of_the_job() -> None:
    with pytest.raises(Refusal) as refused:
        plan(job(**BOTH, training={"logicalBatch": 15_000}), two())
    assert refused.value.reason is Reason.INVALID_SPEC
    assert "spec.training.logicalBatch" in refused.value.message
    assert "at the point of spec.elastic with epsilon 4 and 1 blocks" in refused.value.message


def test_points_are_remembered() -> None:
    planner, judged, view = Planner(SETTINGS), standings(snapshot(two())), JobView.of(job(**BOTH))
    assert planner.plan(view, judged) is planner.plan(view, judged)
    assert len(planner.plan(view, judged).points) == 6


# Which of more blocks are meant


def labelled(name: str, hours: int) -> Object:
    created = NOW.replace(hour=hours).strftime("%Y-%m-%dT%H:%M:%SZ")
    meta = {"labels": {"kind": "x"}, "creationTimestamp": created}
    return block(name, uid=f"uid-{name}", meta=meta)


def test_latest_and_any_blocks() -> None:
    blocks = [labelled("a", 3), labelled("b", 9), labelled("c", 5), labelled("d", 1)]

    def names(pick: str, uid: str, among: list[Object] = blocks) -> list[str]:
        selects = {
            "names": ABSENT,
            "selector": {"matchLabels": {"kind": "x"}},
            "count": 2,
            "pick": pick,
        }
        planned = plan(job(uid=uid, blocks=selects), among)
        return [one.name for one in planned.plan.blocks]

    assert names("name", "j") == ["a", "b"]
    assert names("latest", "j") == ["b", "c"]
    chosen = {tuple(sorted(names("any", f"j{i}"))) for i in range(40)}
    assert len(chosen) == 6
    for i in range(10):
        assert names("any", f"j{i}") == names("any", f"j{i}", blocks[::-1])
        kept = names("any", f"j{i}")
        assert kept == names("any", f"j{i}", [b for b in blocks if b["metadata"]["name"] in kept])


# Prices between rounds


def test_prices_are_kept_by_what_rows_mean() -> None:
    blocks = two("2", "2")
    jobs = [job(f"j{i}", uid=f"j{i}", blocks={"names": ["a", "b"]}) for i in range(12)]
    ledger, market = with_accounts(*blocks), Market()
    first = decide_on(blocks, jobs, ledger, market=market)
    outcome = first.allocation.outcome
    assert outcome is not None
    assert outcome.prices is not None
    orders = tuple(next(iter(ledger.accounts.values())).opened.orders)
    rows = [(account, None) for account in sorted(ledger.accounts)]
    quoted = market.quote([rows[1], ("new", TEAM), rows[0]], orders)
    assert quoted is not None
    price = outcome.prices.price
    assert quoted.price.tolist() == [price[1], price.mean(), price[0]]
    assert market.quote(rows, ("2",)) is None
    commit(ledger, *grants(first))
    assert grants(decide_on(blocks, jobs, ledger, market=market)) == []
