"""One round: who gets budget, who waits, and the numbers in which the wait is explained."""

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

from tests.builders import (
    ABSENT,
    IMAGE,
    NOW,
    OTHER_TEAM,
    SETTINGS,
    TEAM,
    UNITS,
    Object,
    block,
    commit,
    job,
    snapshot,
    with_accounts,
)

from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.control.access import Refusal
from dpmoe_operator.control.accounts import standings
from dpmoe_operator.control.allocation import Allocation, allocate
from dpmoe_operator.control.job_status import Waiting
from dpmoe_operator.control.planning import Planned, plan_job
from dpmoe_operator.control.settlement import Verdict, settle
from dpmoe_operator.control.times import format_time
from dpmoe_operator.control.views import Snapshot
from dpmoe_operator.ledger.fold import LedgerState
from dpmoe_operator.privacy.capacity import capacity
from dpmoe_operator.privacy.units import MAX_UNITS, format_epsilon

ACCOUNT = "claim://vault/data/reviews.jsonl"
MORE = "claim://vault/data/more.jsonl"

# One order, so that a budget is one number: at order 8, ε 3 leaves 1.457 for Rényi spending.
ONE_ORDER = {"epsilon": "3", "orders": ["8"]}


def plans_of(seen: Snapshot) -> tuple[dict[str, Planned], dict[str, Refusal]]:
    plans, refusals = {}, {}
    for uid, view in seen.jobs.items():
        try:
            plans[uid] = plan_job(view, standings(seen), SETTINGS)
        except Refusal as refusal:
            refusals[uid] = refusal
    return plans, refusals


def allocate_on(seen: Snapshot, policy: str = "dpf") -> Allocation:
    plans, refusals = plans_of(seen)
    return allocate(seen, replace(SETTINGS, policy=policy), standings(seen), plans, refusals)


def round_of(
    blocks: list[Object],
    jobs: list[Object],
    *,
    ledger: LedgerState | None = None,
    policy: str = "dpf",
    **rest: Any,
) -> Allocation:
    """The outcome of a round in which all accounts are open."""
    ledger = ledger if ledger is not None else with_accounts(*blocks)
    return allocate_on(snapshot(blocks, jobs, ledger=ledger, **rest), policy)


def granted_to(allocation: Allocation) -> list[str]:
    return [granted.job.uid for granted in allocation.granted]


def only_wait(allocation: Allocation) -> Waiting:
    [waiting] = allocation.waiting.values()
    return waiting


def price(asked: Object, *blocks: Object) -> int:
    """What a job costs at the only order of its first block."""
    [amounts, *_] = plans_of(snapshot(blocks, [asked]))[0].popitem()[1].demand.values()
    [units] = amounts
    return units


def noisy(sigma: str, **rest: Any) -> Object:
    """One step over all units, which costs α/2σ²: at order 8 and σ = 1.7 that is 1.384."""
    once = {"training": {"steps": 1, "logicalBatch": UNITS}}
    return job(**{"privacy": {"epsilon": ABSENT, "noiseMultiplier": sigma}} | once | rest)


def settle_all(ledger: LedgerState, steps: int | None = None) -> None:
    """Close every open grant, charged for so many steps (None: all)."""
    for grant in list(ledger.grants.values()):
        if grant.settled is None:
            charged = grant.granted.steps if steps is None else steps
            commit(ledger, settle(grant, Verdict("Completed", charged, ""), ledger))


def test_grant_records_the_plan_and_its_price() -> None:
    asked = job(uid="u", privacy={"clippingNorm": "0.3"})
    seen = snapshot([block()], [asked], ledger=with_accounts(block()))
    [granted] = allocate_on(seen).granted
    planned = plans_of(seen)[0]["u"]
    assert (granted.job.namespace, granted.job.name, granted.job.uid) == (TEAM, "train", "u")
    assert granted.plan_digest == planned.plan.digest()
    assert [(c.account, tuple(c.amounts)) for c in granted.charges] == [*planned.demand.items()]
    assert float(granted.noise_multiplier) == planned.plan.privacy.noise_multiplier
    assert float(granted.sampling_rate) == planned.plan.privacy.sampling_rate
    assert float(granted.clipping_norm) == 0.3
    assert (granted.steps, granted.epsilon, granted.delta) == (100, "1", "1e-6")
    assert (granted.image, granted.reports_prove) == (IMAGE, True)


def test_reports_of_other_images_prove_nothing() -> None:
    access = [
        {
            "namespace": TEAM,
            "models": ["models"],
            "outputs": [{"claimName": "results"}],
            "images": ["registry.example/other:1"],
        }
    ]
    [granted] = round_of([block(access=access)], [job(image="registry.example/other:1")]).granted
    assert (granted.image, granted.reports_prove) == ("registry.example/other:1", False)


def test_a_full_round_fits_the_ledger_and_is_maximal() -> None:
    reviews = block(budget=ONE_ORDER)
    jobs = [noisy("2.5", uid=f"j{i}") for i in range(12)]
    ledger = with_accounts(reviews)
    allocation = round_of([reviews], jobs, ledger=ledger)
    fitting = ledger.accounts[ACCOUNT].capacity[0] // price(jobs[0], reviews)
    assert 0 < fitting < 12
    assert len(allocation.granted) == fitting
    assert len(allocation.waiting) == 12 - fitting
    commit(ledger, *allocation.granted)
    assert granted_to(round_of([reviews], jobs, ledger=ledger)) == []


def test_granted_jobs_take_part_no_more() -> None:
    ledger = with_accounts(block())
    commit(ledger, *round_of([block()], [job(uid="u")], ledger=ledger).granted)
    for _ in range(2):
        again = round_of([block()], [job(uid="u")], ledger=ledger)
        assert (again.granted, again.waiting) == ((), {})
        settle_all(ledger)


# All or nothing


def both(sigma: str = "2.5", **rest: Any) -> Object:
    once = {"training": {"steps": 1, "logicalBatch": 2 * UNITS}}
    return noisy(sigma, **{"blocks": {"names": ["reviews", "more"]}} | once | rest)


def test_two_blocks_are_granted_together() -> None:
    blocks = [block(), block("more")]
    [granted] = round_of(blocks, [both()]).granted
    assert [charge.account for charge in granted.charges] == [ACCOUNT, MORE]


def test_nothing_is_reserved_where_one_block_is_short() -> None:
    blocks = [block(), block("more", budget={"epsilon": "0.2"})]
    waiting = only_wait(round_of(blocks, [both()]))
    assert waiting.reason is Reason.DEMAND_EXCEEDS_CAPACITY
    assert "block more " in waiting.message
    assert waiting.blocks == ["reviews", "more"]


def test_blocks_with_different_orders() -> None:
    """`8` and `8.0` are one order; at the others each block knows only its own."""
    blocks = [block(budget={"orders": ["2", "8"]}), block("more", budget={"orders": ["8.0", "16"]})]
    seen = snapshot(blocks, [both(uid="u")], ledger=with_accounts(*blocks))
    [granted] = allocate_on(seen).granted
    first, second = granted.charges
    assert first.amounts[1] == second.amounts[0]
    commit(seen.ledger, granted)


def test_blocks_without_a_common_order() -> None:
    blocks = [block(budget={"orders": ["8"]}), block("more", budget={"orders": ["16"]})]
    ledger = with_accounts(*blocks)
    commit(ledger, *round_of(blocks, [both()], ledger=ledger).granted)
    assert len(ledger.grants) == 1


def test_saturated_demand_fits_where_it_is_finite_and_never_elsewhere() -> None:
    """A million steps of little sampling: cheap at order 2, beyond every budget at order 1024."""
    asked = noisy("1", training={"steps": 1_000_000, "logicalBatch": 1})
    fine, dear = block(budget={"orders": ["2", "1024"], "epsilon": "100"}), block("more")
    [granted] = round_of([fine], [asked]).granted
    assert granted.charges[0].amounts[1] == MAX_UNITS
    dear = block(budget={"orders": ["1024"], "epsilon": "9999"})
    waiting = only_wait(round_of([dear], [asked]))
    assert waiting.reason is Reason.DEMAND_EXCEEDS_CAPACITY
    assert "asks ∞" in waiting.message


# Why a job waits


def test_demand_beyond_the_whole_budget() -> None:
    reviews = block(budget=ONE_ORDER)
    asked = noisy("0.9")
    waiting = only_wait(round_of([reviews], [asked]))
    total = with_accounts(reviews).accounts[ACCOUNT].capacity[0]
    assert waiting.reason is Reason.DEMAND_EXCEEDS_CAPACITY
    assert waiting.message == (
        f"block reviews (order 8): asks {format_epsilon(price(asked, reviews))}, left"
        f" {format_epsilon(total)} even of an unspent budget; ask for a smaller epsilon, fewer"
        " steps or a larger noise multiplier"
    )
    assert waiting.noise_multiplier == 0.9
    assert waiting.steps == 1


def test_renamed_block_is_called_by_its_name_of_today() -> None:
    ledger = with_accounts(block(budget=ONE_ORDER))
    same = {"claim": {"claimName": "data", "path": "reviews.jsonl"}}
    renamed = block("ratings", dataset=same, budget=ONE_ORDER)
    waiting = only_wait(
        round_of([renamed], [noisy("0.9", blocks={"names": ["ratings"]})], ledger=ledger)
    )
    assert waiting.message.startswith("block ratings (order 8)")


def test_reserved_budget_may_come_back_consumed_never_does() -> None:
    reviews = block(budget=ONE_ORDER)
    ledger = with_accounts(reviews)
    first, second = noisy("1.7", uid="first"), noisy("1.7", uid="second")
    asked = price(first, reviews)
    total = ledger.accounts[ACCOUNT].capacity[0]
    assert asked < total < 2 * asked
    commit(ledger, *round_of([reviews], [first], ledger=ledger).granted)

    waiting = only_wait(round_of([reviews], [first, second], ledger=ledger))
    numbers = f"asks {format_epsilon(asked)}, left {format_epsilon(total - asked)}"
    assert waiting.reason is Reason.WAITING_FOR_REFUND
    assert waiting.message == (
        f"block reviews (order 8): {numbers}; running jobs hold the rest and may return some"
    )

    settle_all(ledger)
    waiting = only_wait(round_of([reviews], [first, second], ledger=ledger))
    assert waiting.reason is Reason.BLOCK_EXHAUSTED
    assert waiting.message.startswith(f"block reviews (order 8): {numbers} for ever")


def test_refund_lets_the_next_job_in() -> None:
    reviews = block(budget=ONE_ORDER)
    ledger = with_accounts(reviews)
    jobs = [noisy("1.7", uid="first"), noisy("1.7", uid="second")]
    commit(ledger, *round_of([reviews], jobs, ledger=ledger).granted)
    settle_all(ledger, steps=0)
    assert len(round_of([reviews], jobs, ledger=ledger).granted) == 1


def test_priority_goes_first_and_the_other_is_outranked() -> None:
    reviews = block(budget=ONE_ORDER)
    early = {"creationTimestamp": format_time(NOW - timedelta(hours=9))}
    jobs = [
        noisy("1.7", uid="early", meta=early),
        noisy("1.7", uid="urgent", priority=1),
    ]
    allocation = round_of([reviews], jobs)
    assert granted_to(allocation) == ["urgent"]
    waiting = allocation.waiting["early"]
    left = with_accounts(reviews).accounts[ACCOUNT].capacity[0] - price(jobs[0], reviews)
    assert waiting.reason is Reason.OUTRANKED
    assert waiting.message == (
        "rank 2 of 2 in the order of the policy; block reviews (order 8): asks"
        f" {format_epsilon(price(jobs[0], reviews))}, left {format_epsilon(left)} after the jobs"
        " before it"
    )


def test_policy_is_the_one_that_is_configured() -> None:
    reviews = block(budget=ONE_ORDER)
    early = {"creationTimestamp": format_time(NOW - timedelta(hours=9))}
    jobs = [noisy("1.8", uid="large-early", meta=early), noisy("2.5", uid="small-late")]
    assert granted_to(round_of([reviews], jobs, policy="fcfs")) == ["large-early"]
    assert granted_to(round_of([reviews], jobs, policy="dpf"))[0] == "small-late"


def test_weight_counts_a_task_as_several() -> None:
    reviews = block(budget=ONE_ORDER)
    jobs = [noisy("1.7", uid="light"), noisy("1.68", uid="heavy", weight=10)]
    assert granted_to(round_of([reviews], jobs)) == ["heavy"]


def test_jobs_that_do_not_take_part_say_why() -> None:
    jobs = [
        job(uid="paused", suspend=True),
        job(uid="late", timeoutSeconds=60),
        job(uid="stranger", namespace="strangers"),
        job(uid="fine"),
    ]
    allocation = round_of([block()], jobs)
    assert granted_to(allocation) == ["fine"]
    reasons = {uid: waiting.reason for uid, waiting in allocation.waiting.items()}
    assert reasons == {
        "paused": Reason.SUSPENDED,
        "late": Reason.PENDING_EVALUATION,
        "stranger": Reason.BLOCK_NOT_SHARED,
    }
    assert "set it to false" in allocation.waiting["paused"].message


def test_job_waits_for_its_account_to_be_opened() -> None:
    waiting = only_wait(round_of([block()], [job()], ledger=LedgerState()))
    assert waiting.reason is Reason.PENDING_EVALUATION
    assert "is being opened" in waiting.message


# Unlocking


def test_arrivals_unlock_fair_shares() -> None:
    reviews = block(budget=ONE_ORDER, unlocking={"kind": "arrivals", "arrivals": 4})
    asked = noisy("2.5", uid="j0")
    cost = price(asked, reviews)
    ledger = with_accounts(reviews)
    total = ledger.accounts[ACCOUNT].capacity[0]
    needed = -(-cost * 4 // total)
    assert needed == 2
    allocation = round_of([reviews], [asked], ledger=ledger)
    assert allocation.unlocked[ACCOUNT].amounts == (total // 4,)
    waiting = only_wait(allocation)
    assert waiting.reason is Reason.WAITING_FOR_UNLOCK
    assert waiting.message == (
        f"block reviews (order 8): asks {format_epsilon(cost)}, left {format_epsilon(total // 4)}"
        " of what is unlocked; enough is unlocked once 1 more jobs have asked;"
        f" a demand {10 * (total // 4) // cost}0 % as large would fit now"
    )
    second = round_of([reviews], [asked, noisy("2.5", uid="j1")], ledger=ledger)
    assert second.unlocked[ACCOUNT].amounts == (total // 2,)
    assert len(second.granted) == 1


def test_granted_jobs_stay_arrivals() -> None:
    reviews = block(budget=ONE_ORDER, unlocking={"kind": "arrivals", "arrivals": 4})
    ledger = with_accounts(reviews)
    jobs = [noisy("2.5", uid="j0"), noisy("2.5", uid="j1")]
    [granted] = round_of([reviews], jobs, ledger=ledger).granted
    commit(ledger, granted)
    settle_all(ledger)
    left = [asked for asked in jobs if asked["metadata"]["uid"] != granted.job.uid]
    allocation = round_of([reviews], left, ledger=ledger)
    assert allocation.unlocked[ACCOUNT].amounts == (ledger.accounts[ACCOUNT].capacity[0] // 2,)


def test_jobs_that_cannot_be_granted_unlock_nothing() -> None:
    reviews = block(budget=ONE_ORDER, unlocking={"kind": "arrivals", "arrivals": 4})
    crowd = [job(uid=f"s{i}", suspend=True) for i in range(3)]
    crowd += [job(uid=f"x{i}", namespace="strangers") for i in range(3)]
    assert round_of([reviews], crowd).unlocked[ACCOUNT].amounts == (0,)


def test_time_unlocks_evenly_and_says_when() -> None:
    reviews = block(budget=ONE_ORDER, unlocking={"kind": "time", "lifetimeSeconds": 1000})
    asked = noisy("2.5", uid="u")
    cost = price(asked, reviews)
    ledger = with_accounts(reviews)
    total = ledger.accounts[ACCOUNT].capacity[0]

    allocation = round_of([reviews], [asked], ledger=ledger, now=NOW + timedelta(seconds=100))
    assert allocation.unlocked[ACCOUNT].amounts == (total // 10,)
    assert allocation.unlocked[ACCOUNT].complete_at == NOW + timedelta(seconds=1000)
    waiting = only_wait(allocation)
    enough = NOW + timedelta(seconds=1000 * cost / total)
    assert waiting.reason is Reason.WAITING_FOR_UNLOCK
    assert f"left {format_epsilon(total // 10)} of what is unlocked" in waiting.message
    assert f"; enough is unlocked at {format_time(enough)}; " in waiting.message
    assert waiting.message.endswith("; a demand 20 % as large would fit now")

    early = enough - timedelta(seconds=2)
    assert granted_to(round_of([reviews], [asked], ledger=ledger, now=early)) == []
    assert granted_to(
        round_of([reviews], [asked], ledger=ledger, now=enough + timedelta(seconds=1))
    ) == ["u"]
    end = round_of([reviews], [], ledger=ledger, now=NOW + timedelta(days=1))
    assert end.unlocked[ACCOUNT].amounts == (total,)
    assert end.unlocked[ACCOUNT].complete_at is None


# Caps


def capped(epsilon: str, namespace: str = TEAM) -> list[Object]:
    rest = {"models": ["models"], "outputs": [{"claimName": "results"}]}
    other = OTHER_TEAM if namespace == TEAM else TEAM
    return [
        {"namespace": namespace, "maxEpsilon": epsilon, **rest},
        {"namespace": other, **rest},
    ]


def test_cap_holds_one_namespace_back_and_no_other() -> None:
    reviews = block(budget={"epsilon": "9", "orders": ["8"]}, access=capped("3"))
    ledger = with_accounts(reviews)
    mine = [noisy("1.7", uid=f"a{i}") for i in range(2)]
    theirs = [noisy("1.7", uid=f"b{i}", namespace=OTHER_TEAM) for i in range(2)]
    cost = price(mine[0], reviews)
    [limit] = capacity(Decimal(3), Decimal("1e-6"), ["8"])
    assert cost <= limit < 2 * cost
    allocation = round_of([reviews], [*mine, *theirs], ledger=ledger)
    assert len(granted_to(allocation)) == 3
    assert {"b0", "b1"} < set(granted_to(allocation))
    waiting = only_wait(allocation)
    assert waiting.reason is Reason.OUTRANKED
    assert "the cap of team-a on block reviews (order 8)" in waiting.message

    commit(ledger, *allocation.granted)
    waiting = only_wait(round_of([reviews], [*mine, *theirs], ledger=ledger))
    assert waiting.reason is Reason.WAITING_FOR_REFUND
    numbers = f"asks {format_epsilon(cost)}, left {format_epsilon(limit - cost)}"
    assert f"the cap of team-a on block reviews (order 8): {numbers}" in waiting.message

    settle_all(ledger)
    waiting = only_wait(round_of([reviews], [*mine, *theirs], ledger=ledger))
    assert waiting.reason is Reason.BLOCK_EXHAUSTED


def test_demand_beyond_the_cap_never_runs() -> None:
    reviews = block(budget={"epsilon": "9", "orders": ["8"]}, access=capped("2.3"))
    waiting = only_wait(round_of([reviews], [noisy("1.7")]))
    assert waiting.reason is Reason.DEMAND_EXCEEDS_CAPACITY
    assert "the cap of team-a" in waiting.message


def test_cap_is_on_what_was_consumed_before_it_was_set() -> None:
    ledger = with_accounts(block(budget={"epsilon": "9", "orders": ["8"]}))
    free = block(budget={"epsilon": "9", "orders": ["8"]})
    commit(ledger, *round_of([free], [noisy("1.7", uid="a0")], ledger=ledger).granted)
    settle_all(ledger)
    reviews = block(budget={"epsilon": "9", "orders": ["8"]}, access=capped("3"))
    waiting = only_wait(round_of([reviews], [noisy("1.7", uid="a1")], ledger=ledger))
    assert waiting.reason is Reason.BLOCK_EXHAUSTED


def test_caps_of_one_namespace_on_two_blocks_are_apart() -> None:
    blocks = [
        block(budget={"epsilon": "9", "orders": ["8"]}, access=capped("3")),
        block("more", budget={"epsilon": "9", "orders": ["8"]}, access=capped("9")),
    ]
    jobs = [
        noisy("1.7", uid="on-reviews"),
        noisy("1.7", uid="on-more", blocks={"names": ["more"]}),
        both("1.7", uid="on-both", priority=-1),
    ]
    allocation = round_of(blocks, jobs)
    assert set(granted_to(allocation)) == {"on-reviews", "on-more"}
    assert "the cap of team-a on block reviews" in only_wait(allocation).message
