"""A data namespace that the operator may not look into: refused, left alone, no one else's harm."""

from tests.builders import OWNER, SETTINGS, block, commit, job, snapshot, with_accounts

from dpmoe_operator.control.decide import decide
from dpmoe_operator.control.planning import Planner

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
