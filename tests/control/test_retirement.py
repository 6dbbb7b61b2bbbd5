"""A retired block: written to the ledger once, no grant any more, and what was granted goes on."""

import pytest
from tests.builders import (
    ABSENT,
    NOW,
    SETTINGS,
    Object,
    block,
    commit,
    job,
    reference,
    run,
    snapshot,
    with_accounts,
)
from tests.control.cluster import Cluster
from tests.control.operator import Operator, settle_down
from tests.control.stages import cheap

from dpmoe_operator.api.ledgerentry import AccountRetired
from dpmoe_operator.control.decide import Decision, decide
from dpmoe_operator.control.planning import Planner
from dpmoe_operator.ledger.checkpoint import checkpoint_records
from dpmoe_operator.ledger.fold import LedgerState

ACCOUNT = "claim://vault/data/reviews.jsonl"
LABELLED = {"labels": {"kind": "reviews"}}
SELECTOR = {"names": ABSENT, "selector": {"matchLabels": {"kind": "reviews"}}}


@pytest.fixture
def cluster() -> Cluster:
    """One block."""
    result = Cluster()
    result.apply(block(uid="b", meta=LABELLED))
    return result


@pytest.fixture
def operator(cluster: Cluster) -> Operator:
    """An operator that has opened the block's account."""
    result = Operator(cluster)
    result.round()
    result.round()
    return result


def round_(cluster: Cluster, operator: Operator) -> list[str]:
    """One round after all news; the records that it wrote."""
    operator.deliver()
    decision, _ = operator.round()
    cluster.job_controller()
    return [next(iter(record.to_object())) for record in decision.records]


def state_of(cluster: Cluster, uid: str = "j") -> tuple[str, str]:
    status = cluster.jobs[uid]["status"]
    return status["state"], status["reason"]


def outcome(cluster: Cluster, uid: str = "j") -> str | None:
    settled = cluster.ledger.grants[uid].settled
    return settled.outcome if settled else None


def test_retirement_is_recorded_once(cluster: Cluster, operator: Operator) -> None:
    cluster.edit("b", retired=True)
    assert round_(cluster, operator) == ["accountRetired"]
    account = cluster.ledger.accounts[ACCOUNT]
    assert account.retired is not None
    assert (account.retired.block.name, account.retired.block.uid) == ("reviews", "b")
    operator.restart()
    assert round_(cluster, operator) == []
    status = cluster.blocks["b"]["status"]
    assert (status["state"], status["reason"]) == ("Retired", "BlockRetired")
    assert f"retired on {account.retirement_time} by block vault/reviews" in status["message"]
    assert ("Ready", "False") in [(c["type"], c["status"]) for c in status["conditions"]]


def test_checkpoint_keeps_who_retired_it_and_when(cluster: Cluster, operator: Operator) -> None:
    cluster.edit("b", retired=True)
    settle_down(cluster, operator)
    before, message = cluster.ledger.accounts[ACCOUNT], cluster.blocks["b"]["status"]["message"]
    for record in checkpoint_records(operator.ledger.state.contents()):
        run(operator.ledger.append([record], time="2030-01-02T00:00:00.000000Z"))
    for name in sorted(cluster.store.log)[:-1]:
        del cluster.store.log[name]
    operator.restart()
    assert operator.ledger.state.accounts[ACCOUNT] == before
    assert round_(cluster, operator) == []
    assert cluster.blocks["b"]["status"]["message"] == message


def test_jobs_that_ask_for_it_are_rejected(cluster: Cluster, operator: Operator) -> None:
    cluster.edit("b", retired=True)
    cluster.apply(cheap())
    settle_down(cluster, operator)
    assert state_of(cluster) == ("Rejected", "BlockRetired")
    message = cluster.jobs["j"]["status"]["message"]
    assert message.startswith("spec.blocks: 'reviews': takes no job any more (the account of this")
    assert message.endswith("ask for other blocks")
    assert cluster.ledger.grants == {}


def test_job_of_the_same_round_is_not_granted(cluster: Cluster, operator: Operator) -> None:
    """Before the ledger says so, the manifest already does."""
    cluster.edit("b", retired=True)
    cluster.apply(cheap())
    assert round_(cluster, operator) == ["accountRetired"]
    assert state_of(cluster) == ("Rejected", "BlockRetired")


def test_running_job_goes_on_and_is_settled(cluster: Cluster, operator: Operator) -> None:
    cluster.apply(cheap())
    assert round_(cluster, operator) == ["granted"]
    assert round_(cluster, operator) == ["launched"]
    cluster.edit("b", retired=True)
    settle_down(cluster, operator)
    assert outcome(cluster) == "Completed"
    assert state_of(cluster) == ("Completed", "Completed")
    status = cluster.blocks["b"]["status"]
    assert (status["state"], status["jobs"], status["reserved"]) == ("Retired", 1, "0")
    assert float(status["consumed"]) > 0
    assert (status["available"], status["spenders"][0]["jobs"]) == ("0", 1)


@pytest.mark.parametrize("blocks", [{}, SELECTOR])
def test_granted_job_that_is_not_launched_yet_goes_on_too(
    cluster: Cluster, operator: Operator, blocks: Object
) -> None:
    cluster.apply(cheap(blocks=blocks))
    assert round_(cluster, operator) == ["granted"]
    cluster.edit("b", retired=True)
    assert round_(cluster, operator) == ["accountRetired", "launched"]
    settle_down(cluster, operator)
    assert outcome(cluster) == "Completed"


def test_selector_passes_over_retired_blocks(cluster: Cluster, operator: Operator) -> None:
    """Also those that were retired before the grant, when the plan is looked at again."""
    cluster.apply(block("a-retired", uid="r", meta=LABELLED, retired=True))
    cluster.apply(cheap(blocks=SELECTOR))
    settle_down(cluster, operator)
    assert outcome(cluster) == "Completed"
    assert cluster.jobs["j"]["status"]["blocks"] == ["reviews"]


def test_selected_blocks_stay_the_jobs_after_the_grant(
    cluster: Cluster, operator: Operator
) -> None:
    cluster.apply(cheap(blocks=SELECTOR))
    assert round_(cluster, operator) == ["granted"]
    cluster.apply(block("a-newcomer", uid="n", meta=LABELLED))
    settle_down(cluster, operator)
    assert outcome(cluster) == "Completed"
    assert cluster.jobs["j"]["status"]["blocks"] == ["reviews"]


def test_selected_block_that_is_gone_ends_the_grant(cluster: Cluster, operator: Operator) -> None:
    cluster.apply(cheap(blocks=SELECTOR))
    assert round_(cluster, operator) == ["granted"]
    cluster.delete("block", "b")
    settle_down(cluster, operator)
    assert outcome(cluster) == "NeverStarted"
    assert ACCOUNT in cluster.jobs["j"]["status"]["message"]


def test_block_retired_from_the_start_opens_nothing() -> None:
    cluster = Cluster()
    cluster.apply(block(uid="b", retired=True))
    cluster.apply(cheap())
    operator = Operator(cluster)
    settle_down(cluster, operator)
    assert cluster.ledger.accounts == {}
    status = cluster.blocks["b"]["status"]
    assert (status["state"], status["reason"]) == ("Retired", "BlockRetired")
    assert "no account was ever opened" in status["message"]
    assert state_of(cluster) == ("Rejected", "BlockRetired")
    cluster.edit("b", retired=False)
    settle_down(cluster, operator)
    assert state_of(cluster) == ("Completed", "Completed")


def test_block_that_opens_nothing_keeps_nobody_from_its_rows() -> None:
    cluster = Cluster()
    cluster.apply(block(uid="b", retired=True))
    part = {
        "claim": {"claimName": "data", "path": "reviews.jsonl"},
        "partition": {"column": "year", "values": ["2024"]},
    }
    cluster.apply(block("part", uid="c", dataset=part))
    settle_down(cluster, Operator(cluster))
    assert list(cluster.ledger.accounts) == [f"{ACCOUNT}?year=2024"]


REVIVALS: dict[str, Object] = {
    "in place, without CEL": {"uid": "b"},
    "deleted and applied again": {"uid": "b2"},
    "with another budget": {"uid": "b2", "budget": {"epsilon": "99"}},
    "under another name": {
        "uid": "b2",
        "name": "fresh",
        "dataset": {"claim": {"claimName": "data", "path": "reviews.jsonl"}},
    },
}


@pytest.mark.parametrize("again", REVIVALS.values(), ids=REVIVALS.keys())
def test_retired_account_is_never_revived(
    cluster: Cluster, operator: Operator, again: Object
) -> None:
    cluster.edit("b", retired=True)
    settle_down(cluster, operator)
    if again["uid"] != "b":
        cluster.delete("block", "b")
    uid = cluster.apply(block(**again))
    cluster.apply(cheap(blocks={"names": [again.get("name", "reviews")]}))
    settle_down(cluster, operator)
    assert cluster.ledger.grants == {}
    assert list(cluster.ledger.accounts) == [ACCOUNT]
    assert state_of(cluster) == ("Rejected", "BlockRetired")
    status = cluster.blocks[uid]["status"]
    assert status["state"] == "Retired"
    assert status["message"].startswith("spec.retired: False: must be true: the account of this")
    retired_on = cluster.ledger.accounts[ACCOUNT].retirement_time
    assert f"was retired on {retired_on} by block vault/reviews" in status["message"]
    assert status["jobs"] == 0


def test_rows_of_a_retired_account_stay_taken(cluster: Cluster, operator: Operator) -> None:
    cluster.edit("b", retired=True)
    settle_down(cluster, operator)
    cluster.delete("block", "b")
    part = {
        "claim": {"claimName": "data", "path": "reviews.jsonl"},
        "partition": {"column": "year", "values": ["2024"]},
    }
    cluster.apply(block("part", uid="c", dataset=part))
    settle_down(cluster, operator)
    assert cluster.blocks["c"]["status"]["reason"] == "SharesRows"


def decided(ledger: LedgerState, *blocks: Object) -> Decision:
    return decide(snapshot(blocks, ledger=ledger), SETTINGS, Planner(SETTINGS))


def test_only_the_holder_of_an_account_retires_it() -> None:
    first, twin = block(uid="b"), block("twin", uid="t", retired=True)
    twin["spec"]["dataset"] = first["spec"]["dataset"]
    assert decided(with_accounts(first), first, twin).records == ()


def test_block_that_is_refused_may_still_be_retired() -> None:
    """Nothing that it asks for is given, but closing is always open."""
    ledger = with_accounts(block(uid="b"))
    changed = block(uid="b", budget={"epsilon": "99"}, retired=True)
    [record] = decided(ledger, changed).records
    assert record.account_retired == AccountRetired(
        account=ACCOUNT, block=reference("b", name="reviews", namespace="vault")
    )


def test_retirement_comes_before_everything_else_in_the_round() -> None:
    other = block("other")
    ledger = with_accounts(block(uid="b"), other)
    asked = job(uid="j", blocks={"names": ["other"]})
    seen = snapshot([block(uid="b", retired=True), other], [asked], ledger=ledger)
    decision = decide(seen, SETTINGS, Planner(SETTINGS))
    assert [next(iter(r.to_object())) for r in decision.records] == ["accountRetired", "granted"]
    commit(ledger, *decision.records, time=NOW)
    assert ledger.accounts[ACCOUNT].retirement_time == "2030-01-01T12:00:00.000000Z"
