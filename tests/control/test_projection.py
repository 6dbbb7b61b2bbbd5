"""When a status or an event is written at all, and what a write holds."""

from typing import Any

from tests.builders import NOW, SETTINGS, Object, block, commit, job, snapshot, with_accounts
from tests.control.cluster import Cluster
from tests.control.operator import Operator, settle_down
from tests.control.statuses import LATER, Granted, condition, without_grant

from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.control.actions import SetStatus
from dpmoe_operator.control.decide import decide, react
from dpmoe_operator.control.job_status import Waiting, job_status
from dpmoe_operator.control.planning import Planner
from dpmoe_operator.control.times import format_time
from dpmoe_operator.control.views import JobView, Snapshot
from dpmoe_operator.ledger.fold import LedgerState

ONE_ORDER = {"epsilon": "3", "orders": ["8"]}


def test_transition_times_change_with_the_status_alone() -> None:
    held = Granted()
    first = held.status()
    assert condition(first, "BudgetReserved").last_transition_time == format_time(NOW)
    held.settle("Completed", 100)
    second = held.status(old=first.to_object(), now=LATER)
    assert condition(second, "BudgetReserved").last_transition_time == format_time(NOW)
    assert condition(second, "Succeeded").last_transition_time == format_time(LATER)
    waited = without_grant(Waiting(Reason.OUTRANKED, "a")).to_object()
    asked = job(uid="job-1", status=waited)
    seen = snapshot([], [asked], ledger=held.ledger, now=LATER)
    granted = job_status(JobView.of(asked), seen, waiting=None, suspended=False)
    assert condition(granted, "BudgetReserved").last_transition_time == format_time(LATER)


def writes(seen: Snapshot) -> dict[str, SetStatus]:
    decision = decide(seen, SETTINGS, Planner(SETTINGS))
    commit_all(seen.ledger, decision.records)
    return {a.uid: a for a in react(seen, decision, SETTINGS) if isinstance(a, SetStatus)}


def commit_all(ledger: LedgerState, records: Any) -> None:
    if records:
        commit(ledger, *records)


def test_vanished_fields_are_taken_out() -> None:
    old = {"state": "Running", "progress": "50%", "blocks": ["x"], "madeUp": 1}
    asked = job(uid="u", blocks={"names": ["nothing"]}, status=old)
    action = writes(snapshot([], [asked]))["u"]
    assert action.patch["state"] == "Rejected"
    for name in ("progress", "blocks", "madeUp"):
        assert action.patch[name] is None
    assert "observedGeneration" in action.patch


def test_patch_holds_only_what_changed() -> None:
    asked = job(uid="u", blocks={"names": ["nothing"]})
    first = writes(snapshot([], [asked]))["u"]
    stored = asked | {"status": dict(first.patch)}
    assert writes(snapshot([], [stored])) == {}
    stored["metadata"] = stored["metadata"] | {"generation": 2}
    again = writes(snapshot([], [stored]))["u"]
    assert set(again.patch) == {"observedGeneration", "conditions"}
    assert again.event is None


def test_event_tells_a_new_reason_once() -> None:
    asked = job(uid="u", blocks={"names": ["nothing"]})
    first = writes(snapshot([], [asked]))["u"]
    assert first.event is not None
    kind, reason, note = first.event
    assert (kind, reason) == ("Warning", "BlockNotFound")
    assert "no such PrivateBlock" in note
    reworded = asked | {"status": {**first.patch, "message": "in other words"}}
    assert writes(snapshot([], [reworded]))["u"].event is None


def test_good_news_is_normal() -> None:
    reviews = block(uid="b")
    seen = snapshot([reviews], [job(uid="u")], ledger=with_accounts(reviews))
    actions = writes(seen)
    assert actions["u"].event is not None
    assert actions["u"].event[:2] == ("Normal", "Launching")
    assert actions["b"].event is not None
    assert actions["b"].event[:2] == ("Normal", "BudgetAvailable")


def test_status_of_a_job_that_is_gone_is_not_written() -> None:
    held = Granted()
    reviews = block(uid="b")
    assert set(writes(snapshot([reviews], [], ledger=held.ledger))) == {"b"}


def test_second_round_writes_nothing() -> None:
    """With every kind of block and job at once, through a server that prunes by the schema."""
    cluster = Cluster()
    cluster.apply(block(uid="b1", budget=ONE_ORDER))
    cluster.apply(block("broken", uid="b2", budget={"epsilon": "-1"}))
    cluster.apply(block("slow", uid="b3", unlocking={"kind": "arrivals", "arrivals": 100}))
    cluster.apply(block("twin", uid="b4", dataset={"claim": {"claimName": "data", "path": "s"}}))
    cluster.apply(block("twin2", uid="b5", dataset={"claim": {"claimName": "data", "path": "s"}}))
    cluster.apply(
        block("timed", uid="b6", unlocking={"kind": "time", "lifetimeSeconds": 3_153_600_000})
    )
    specs: list[Object] = [
        {},
        {"suspend": True},
        {"blocks": {"names": ["broken"]}},
        {"blocks": {"names": ["slow"]}, "privacy": {"epsilon": "5"}},
        {"blocks": {"names": ["timed"]}},
        {"timeoutSeconds": 1},
        {"privacy": {"epsilon": "900"}},
    ]
    for number, spec in enumerate(specs):
        cluster.apply(job(uid=f"j{number}", **spec))
    operator = Operator(cluster)
    settle_down(cluster, operator, seconds=0)
    operator.restart()
    decision, actions = operator.round()
    assert (decision.records, actions) == ((), [])
    states = {uid: each["status"]["state"] for uid, each in cluster.jobs.items()}
    assert [states[f"j{number}"] for number in range(7)] == [
        *("Completed", "Suspended", "Rejected", "Pending", "Pending", "Failed", "Rejected")
    ]
    assert {each["status"].get("state") for each in cluster.blocks.values()} == {"Ready", "Refused"}
