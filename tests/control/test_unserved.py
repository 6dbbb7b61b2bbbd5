"""A data namespace that the operator may not look into: refused, left alone, no one else's harm."""

from tests.builders import ABSENT, OWNER, SETTINGS, block, commit, job, snapshot, with_accounts

from dpmoe_operator.control.actions import Prepare
from dpmoe_operator.control.decide import decide, react
from dpmoe_operator.control.planning import Planner
from dpmoe_operator.kube.picture import Picture

FORBIDDEN = {OWNER: "jobs.batch is forbidden"}


def test_its_block_is_refused_and_its_jobs_get_nothing() -> None:
    here, there = block(), block("other", "elsewhere")
    mine = job(uid="mine", blocks={"namespace": "elsewhere", "names": ["other"]})
    ledger = with_accounts(here, there)
    view = snapshot([here, there], [job(uid="theirs"), mine], ledger=ledger, unserved=FORBIDDEN)
    decision = decide(view, SETTINGS, Planner(SETTINGS))
    assert [record.granted.job.uid for record in decision.records if record.granted] == ["mine"]
    assert "NamespaceNotServed" in decision.allocation.waiting["theirs"].message


def test_its_running_job_is_not_taken_for_gone() -> None:
    """Neither its Job nor its DPMoEJob is seen; both may be there."""
    stored = block()
    ledger = with_accounts(stored)
    plan = decide(snapshot([stored], [job(uid="j")], ledger=ledger), SETTINGS, Planner(SETTINGS))
    commit(ledger, *plan.records)
    blind = snapshot([stored], ledger=ledger, unserved=FORBIDDEN)
    assert decide(blind, SETTINGS, Planner(SETTINGS)).records == ()
    seeing = snapshot([stored], ledger=ledger)
    [record] = decide(seeing, SETTINGS, Planner(SETTINGS)).records
    assert record.settled is not None


HUB = {"claim": ABSENT, "format": ABSENT, "huggingFace": {"id": "org/data", "revision": "0" * 40}}


def test_data_that_moved_to_another_namespace_is_served_there() -> None:
    """Its account was opened where the operator may not look any more; the job runs elsewhere."""
    before, after = block(dataset=HUB), block(namespace="elsewhere", dataset=HUB)
    asked = job(uid="j", blocks={"namespace": "elsewhere"})
    ledger = with_accounts(before)
    seen = snapshot([after], [asked], ledger=ledger, unserved=FORBIDDEN)
    decision = decide(seen, SETTINGS, Planner(SETTINGS))
    commit(ledger, *decision.records)
    assert [type(a) for a in react(seen, decision, SETTINGS)][:1] == [Prepare]
    deleted = snapshot([after], ledger=ledger, unserved=FORBIDDEN)
    [record] = decide(deleted, SETTINGS, Planner(SETTINGS)).records
    assert record.settled is not None
    assert record.settled.outcome == "NeverStarted"


def test_a_jobs_own_namespace_is_looked_into_even_without_its_block() -> None:
    before, after = block(dataset=HUB), block(namespace="elsewhere", dataset=HUB)
    asked = job(uid="j", blocks={"namespace": "elsewhere"})
    ledger = with_accounts(before)
    decision = decide(snapshot([after], [asked], ledger=ledger), SETTINGS, Planner(SETTINGS))
    commit(ledger, *decision.records)
    picture = Picture()
    picture.put_job(asked)
    assert picture.data_namespaces(ledger) == {"elsewhere"}
    blind = snapshot([], [asked], ledger=ledger, unserved={"elsewhere": "jobs.batch is forbidden"})
    assert decide(blind, SETTINGS, Planner(SETTINGS)).records == ()
