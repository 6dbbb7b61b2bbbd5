"""A ledger that knows less than the objects' own statuses was lost: nothing is given twice."""

from copy import deepcopy

import pytest
from tests.builders import Object, block, commit, granted, snapshot, with_accounts
from tests.control.cluster import Cluster
from tests.control.operator import Operator, settle_down
from tests.control.stages import cheap

from dpmoe_operator.control.accounts import standings, to_open

ACCOUNT = "claim://vault/data/reviews.jsonl"
SPENT = {"account": ACCOUNT, "jobs": 2, "consumed": "3"}
SAME = {"claim": {"claimName": "data", "path": "reviews.jsonl"}}
OLD = {"creationTimestamp": "2000-01-01T00:00:00Z"}


@pytest.fixture
def cluster() -> Cluster:
    """A block, and a job that was granted, trained and settled."""
    result = Cluster()
    result.apply(block(uid="b"))
    result.apply(cheap())
    settle_down(result, Operator(result))
    assert result.jobs["j"]["status"]["state"] == "Completed"
    return result


def lose_ledger(cluster: Cluster, *, keep: int = 0) -> Operator:
    """All entries but the first few are gone; a new process starts."""
    cluster.lose_entries(keep)
    return Operator(cluster)


def test_lost_account_is_never_opened_afresh(cluster: Cluster) -> None:
    operator = lose_ledger(cluster)
    for _ in range(3):
        settle_down(cluster, operator)
        operator.restart()
        status = cluster.blocks["b"]["status"]
        assert (status["state"], status["reason"]) == ("Refused", "AccountMissing")
        assert "the status of block reviews says that 1 jobs had budget" in status["message"]
        assert "but the ledger has no such account" in status["message"]
        assert "put its entries back from the anchor" in status["message"]
        # What the refusal rests on outlives it.
        assert (status["account"], status["jobs"]) == (ACCOUNT, 1)
        assert float(status["consumed"]) > 0
    assert cluster.ledger.accounts == {}


def test_jobs_on_a_lost_account_get_nothing(cluster: Cluster) -> None:
    cluster.apply(cheap("new"))
    settle_down(cluster, lose_ledger(cluster))
    status = cluster.jobs["new"]["status"]
    assert (status["state"], status["reason"]) == ("Rejected", "BlockNotFound")
    assert "AccountMissing" in status["message"]
    assert cluster.ledger.grants == {}


def test_account_that_was_taken_back_gives_nothing(cluster: Cluster) -> None:
    """The account is there, as it was before the grant: its budget looks unspent."""
    cluster.apply(cheap("new"))
    operator = lose_ledger(cluster, keep=1)
    for _ in range(3):
        settle_down(cluster, operator)
        operator.restart()
        status = cluster.blocks["b"]["status"]
        assert (status["state"], status["reason"]) == ("Refused", "LedgerBehind")
        assert "says that 1 jobs had budget" in status["message"]
        assert "but the ledger knows of 0" in status["message"]
        assert status["jobs"] == 1
        assert cluster.jobs["new"]["status"]["state"] == "Rejected"
    assert cluster.ledger.grants == {}


def test_lost_grant_is_never_given_again(cluster: Cluster) -> None:
    entry = cluster.jobs["j"]["status"]["grantEntry"]
    operator = lose_ledger(cluster, keep=1)
    for _ in range(3):
        settle_down(cluster, operator)
        operator.restart()
        status = cluster.jobs["j"]["status"]
        assert (status["state"], status["reason"]) == ("Rejected", "GrantMissing")
        assert f"status.grantEntry: '{entry}': the ledger knows no grant" in status["message"]
        assert status["grantEntry"] == entry
    assert cluster.ledger.grants == {}
    assert ACCOUNT in cluster.ledger.accounts


def test_grant_that_only_its_settlement_tells_of_is_not_given_again(cluster: Cluster) -> None:
    del cluster.jobs["j"]["status"]["grantEntry"]
    settle_down(cluster, lose_ledger(cluster, keep=1))
    assert cluster.jobs["j"]["status"]["reason"] == "GrantMissing"
    assert cluster.ledger.grants == {}


def test_recovered_ledger_ends_the_refusals(cluster: Cluster) -> None:
    kept, before = deepcopy(cluster.store.log), cluster.ledger
    operator = lose_ledger(cluster)
    settle_down(cluster, operator)
    cluster.store.log = kept
    operator.restart()
    settle_down(cluster, operator)
    assert cluster.blocks["b"]["status"]["state"] == "Ready"
    assert cluster.jobs["j"]["status"]["state"] == "Completed"
    assert cluster.ledger == before


def reasons(*blocks: Object) -> dict[str, str | None]:
    judged = standings(snapshot(blocks))
    return {name: s.refusal[0] if s.refusal else None for (_, name), s in judged.items()}


def test_nobody_opens_what_another_blocks_status_tells_of() -> None:
    """Neither an older object of the same data, nor one over a part of it."""
    witness = block(status=SPENT)
    twin = block("twin", dataset=SAME, meta=OLD)
    assert reasons(witness, twin) == {"reviews": "DuplicateDataset", "twin": "AccountMissing"}
    part = block("part", dataset=SAME | {"partition": {"column": "y", "values": ["1"]}}, meta=OLD)
    assert reasons(witness, part) == {"reviews": "AccountMissing", "part": "SharesRows"}
    assert to_open(snapshot([witness, part])) == []


UNSPENT: dict[str, Object] = {
    "no job": SPENT | {"jobs": 0},
    "nothing about jobs": {"account": ACCOUNT},
    "another account": SPENT | {"account": "claim://vault/data/other.jsonl"},
    "no account": {"jobs": 2},
}


@pytest.mark.parametrize("status", UNSPENT.values(), ids=UNSPENT.keys())
def test_status_without_spending_keeps_nobody_from_a_budget(status: Object) -> None:
    assert reasons(block(status=status)) == {"reviews": None}
    assert len(to_open(snapshot([block(status=status)]))) == 1


@pytest.mark.parametrize(("told", "reason"), [(1, None), (2, None), (3, "LedgerBehind")])
def test_ledger_may_know_more_than_a_status_but_not_less(told: int, reason: str | None) -> None:
    """A status is written after the commit: one that is late says too little."""
    ledger = with_accounts(block())
    width = len(ledger.accounts[ACCOUNT].capacity)
    commit(ledger, *[granted(f"j{n}", {ACCOUNT: (1,) * width}) for n in range(2)])
    spent = block(status=SPENT | {"jobs": told})
    [standing] = standings(snapshot([spent], ledger=ledger)).values()
    assert (standing.refusal[0] if standing.refusal else None) == reason


@pytest.mark.parametrize("problem", [{"budget": {"epsilon": "-1"}}, {"evaluation": SAME}])
def test_refused_blocks_keep_what_their_status_tells(cluster: Cluster, problem: Object) -> None:
    """Refused first, then the ledger is lost, then mended: there is no way around the check."""
    healthy = deepcopy(cluster.blocks["b"]["spec"])
    cluster.edit("b", **problem)
    operator = Operator(cluster)
    settle_down(cluster, operator)
    assert cluster.blocks["b"]["status"]["state"] == "Refused"
    operator = lose_ledger(cluster)
    settle_down(cluster, operator)
    cluster.apply(cluster.blocks["b"] | {"spec": healthy})
    settle_down(cluster, operator)
    assert cluster.blocks["b"]["status"]["reason"] == "AccountMissing"
    assert cluster.ledger.accounts == {}
