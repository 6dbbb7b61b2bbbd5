"""Settlement: what is not proven unspent is spent. Every row of the table, and its charge."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.builders import (
    SETTINGS,
    Object,
    block,
    commit,
    granted,
    job,
    snapshot,
    with_accounts,
)
from tests.control.workloads import (
    CREATING,
    NEVER_FOUND,
    NO_IMAGE,
    RUNNING,
    UNSCHEDULED,
    ended,
    history,
    report,
    workload,
)

from dpmoe_operator.control.decide import decide
from dpmoe_operator.control.planning import Planner
from dpmoe_operator.control.pods import PodView
from dpmoe_operator.control.proof import Unanswered
from dpmoe_operator.control.settlement import (
    Verdict,
    answer,
    settle,
    steps_shown,
    verdict_of_ended,
    verdict_of_stolen_start,
    verdict_of_unlaunched,
    verdict_of_vanished,
)
from dpmoe_operator.control.views import WorkloadView
from dpmoe_operator.ledger.account import Grant
from dpmoe_operator.ledger.fold import LedgerState
from dpmoe_operator.privacy.mechanisms import demand
from dpmoe_trainer.contract import (
    TERMINATION_MESSAGE_BYTES,
    ExitCode,
    Outcome,
    Progress,
)

FAILED = {"Failed": "BackoffLimitExceeded"}
COMPLETE = {"Complete": "Completed"}


def grant(**fields: Any) -> Grant:
    return Grant(granted(**fields), "entry-000000000001", "2030-01-01T12:00:00Z")


def view(*pods: PodView, **fields: Any) -> WorkloadView:
    fields = {"conditions": FAILED, "failed": len(pods), **fields}
    return WorkloadView.of(workload(**fields), pods, confirmed=True, caught_up=True)


def ran(exit_code: int, message: str | None = None, **fields: Any) -> PodView:
    return history(UNSCHEDULED, RUNNING, ended(exit_code, message), gone=False, **fields)


def stopped(steps: int, **fields: Any) -> str:
    return report(outcome=Outcome.STOPPED, steps=steps, **fields)


# name: what was seen, the settlement's word, the steps that are charged of 100
PROVEN: dict[str, tuple[WorkloadView, str, int]] = {
    "completed": (
        view(ran(0, report()), conditions=COMPLETE, failed=0, succeeded=1),
        "Completed",
        100,
    ),
    "stopped early": (view(ran(143, stopped(40))), "Stopped", 40),
    "stopped before the first step": (view(ran(143, stopped(0))), "Stopped", 0),
    "stopped at the last step": (view(ran(143, stopped(100))), "Stopped", 100),
    "refused before the data": (
        view(ran(ExitCode.BAD_MODEL, report(outcome=Outcome.REFUSED, steps=0))),
        "Refused",
        0,
    ),
    "failed with a report": (
        view(ran(ExitCode.CRASHED, report(outcome=Outcome.FAILED, steps=7))),
        "Failed",
        7,
    ),
    "killed after its report": (view(ran(137, stopped(40))), "Stopped", 40),
    "suspended by hand": (
        view(
            history(RUNNING, ended(143, stopped(12))),
            suspend=True,
            conditions={"Suspended": ""},
            failed=0,
        ),
        "Stopped",
        12,
    ),
    "never scheduled": (
        view(
            history(UNSCHEDULED, UNSCHEDULED),
            suspend=True,
            conditions={"Suspended": ""},
            failed=0,
        ),
        "NeverStarted",
        0,
    ),
    "image never came": (view(history(NO_IMAGE, CREATING, NEVER_FOUND)), "NeverStarted", 0),
    "never scheduled, then the deadline": (
        view(history(UNSCHEDULED, UNSCHEDULED), conditions={"Failed": "DeadlineExceeded"}),
        "NeverStarted",
        0,
    ),
}

UNPROVEN: dict[str, tuple[WorkloadView, str, str]] = {
    "crash without a report": (view(ran(1)), "ReportMissing", "exit code 1 and wrote no report"),
    "killed for memory": (
        view(history(UNSCHEDULED, RUNNING, ended(137, reason="OOMKilled"), gone=False)),
        "ReportMissing",
        "exit code 137 (OOMKilled) and wrote no report",
    ),
    "evicted": (
        view(history(RUNNING, ended(137) | {"reason": "Evicted"}, gone=False)),
        "ReportMissing",
        "exit code 137 (Evicted) and wrote no report",
    ),
    "empty report": (view(ran(1, "")), "ReportMissing", "wrote no report"),
    "success without a report": (
        view(ran(0), conditions=COMPLETE, failed=0, succeeded=1),
        "ReportMissing",
        "exit code 0 and wrote no report",
    ),
    "no exit code": (
        view(history(RUNNING, RUNNING)),
        "ReportMissing",
        "ended without an exit code",
    ),
    "text instead of a report": (view(ran(1, "Killed")), "ReportMissing", "malformed at report"),
    "half a report": (view(ran(143, stopped(4)[:-9])), "ReportMissing", "malformed at report"),
    "report of a newer trainer": (
        view(ran(143, stopped(4).replace('"version":1', '"version":2'))),
        "ReportMissing",
        "malformed at version",
    ),
    "report with more in it": (
        view(ran(143, '{"extra":1,' + stopped(4)[1:])),
        "ReportMissing",
        "malformed at extra",
    ),
    "report with infinity": (
        view(ran(143, stopped(4).replace('"epsilon":1.0', '"epsilon":Infinity'))),
        "ReportMissing",
        "malformed at epsilon",
    ),
    "report longer than a termination message": (
        view(ran(143, stopped(4) + " " * TERMINATION_MESSAGE_BYTES)),
        "ReportMissing",
        "longer than a termination message",
    ),
    "another job's report": (
        view(ran(143, stopped(4, job_uid="job-2"))),
        "ReportRefused",
        "belongs to another job",
    ),
    "another plan's report": (
        view(ran(143, stopped(4, plan_digest="1" * 64))),
        "ReportRefused",
        "answers another plan",
    ),
    "more noise": (
        view(ran(143, stopped(4, noise_multiplier=1.1))),
        "ReportRefused",
        "mechanism is not the plan's",
    ),
    "a little less noise": (
        view(ran(143, stopped(4, noise_multiplier=0.9999999999999999))),
        "ReportRefused",
        "mechanism is not the plan's",
    ),
    "another sampling rate": (
        view(ran(143, stopped(4, sampling_rate=0.001))),
        "ReportRefused",
        "mechanism is not the plan's",
    ),
    "another clipping norm": (
        view(ran(143, stopped(4, clipping_norm=2.0))),
        "ReportRefused",
        "mechanism is not the plan's",
    ),
    "more steps than planned": (
        view(ran(143, stopped(101))),
        "ReportRefused",
        "counts 101 steps of 100",
    ),
    "completed with too few steps": (
        view(ran(0, report(steps=99)), conditions=COMPLETE, failed=0, succeeded=1),
        "ReportRefused",
        "claims completion after 99 of 100",
    ),
    "completed with a failing exit code": (
        view(ran(1, report())),
        "ReportRefused",
        "says Completed, the exit code is 1",
    ),
    "stopped with a good exit code": (
        view(ran(0, stopped(4)), conditions=COMPLETE, failed=0, succeeded=1),
        "ReportRefused",
        "says Stopped, the exit code is 0",
    ),
    "rank 0 was replaced": (
        view(ran(143, stopped(4)), ran(143, stopped(4), uid="pod-2")),
        "ReportMissing",
        "rank 0 ran in 2 known pods",
    ),
    "a pod was never seen": (
        view(ran(143, stopped(4)), failed=2),
        "ReportMissing",
        "2 pods ended, 1 of them were seen",
    ),
    "a pod was never seen, and is not counted yet": (
        view(ran(143, stopped(4)), uncountedTerminatedPods={"failed": ["pod-0"]}),
        "ReportMissing",
        "2 pods ended, 1 of them were seen",
    ),
    "no pod was seen": (view(failed=1), "ReportMissing", "1 pods ended, 0 of them were seen"),
    "no pod was seen, none is counted": (
        view(suspend=True, conditions={"Suspended": ""}),
        "ReportMissing",
        "rank 0 ran in 0 known pods",
    ),
    "only another rank was seen": (
        view(ran(143, stopped(4), index="1")),
        "ReportMissing",
        "rank 0 ran in 0 known pods",
    ),
    "never scheduled, but another pod was not seen": (
        view(history(UNSCHEDULED, UNSCHEDULED), failed=2),
        "ReportMissing",
        "2 pods ended, 1 of them were seen",
    ),
    "one of two pods may have started": (
        view(history(UNSCHEDULED, UNSCHEDULED), history(UNSCHEDULED, RUNNING, uid="pod-2")),
        "ReportMissing",
        "rank 0 ran in 2 known pods",
    ),
    "deleted past the kubelet": (
        view(history(NO_IMAGE, NO_IMAGE)),
        "ReportMissing",
        "ended without an exit code",
    ),
    "end unseen until it was gone": (
        view(history(NEVER_FOUND)),
        "ReportMissing",
        "left no report: its kubelet found no container of it (ContainerStatusUnknown)",
    ),
    "a pod may still run": (
        view(history(UNSCHEDULED, UNSCHEDULED), active=1),
        "ReportMissing",
        "ended without an exit code",
    ),
}


@pytest.mark.parametrize(("seen", "outcome", "steps"), PROVEN.values(), ids=PROVEN.keys())
def test_what_is_proven_unspent_returns(seen: WorkloadView, outcome: str, steps: int) -> None:
    verdict = verdict_of_ended(grant(), seen)
    assert (verdict.outcome, verdict.steps) == (outcome, steps)


@pytest.mark.parametrize(("seen", "outcome", "why"), UNPROVEN.values(), ids=UNPROVEN.keys())
def test_what_is_not_proven_is_charged_in_full(seen: WorkloadView, outcome: str, why: str) -> None:
    verdict = verdict_of_ended(grant(), seen)
    assert (verdict.outcome, verdict.steps) == (outcome, 100)
    assert why in verdict.message
    with pytest.raises(Unanswered):
        answer(grant(), seen)


@pytest.mark.parametrize("steps", [0, 4, 100])
def test_other_images_pay_in_full_whatever_they_report(steps: int) -> None:
    theirs = grant(reports_prove=False, image="registry.example/other:1")
    verdict = verdict_of_ended(theirs, view(ran(143, stopped(steps))))
    assert (verdict.outcome, verdict.steps) == ("Charged", 100)
    assert "registry.example/other:1 prove nothing" in verdict.message
    done = view(ran(0, report()), conditions=COMPLETE, failed=0, succeeded=1)
    assert verdict_of_ended(theirs, done).outcome == "Completed"
    assert verdict_of_ended(theirs, done).steps == 100


def test_other_images_that_never_started_pay_nothing() -> None:
    seen = view(history(UNSCHEDULED, UNSCHEDULED))
    assert verdict_of_ended(grant(reports_prove=False), seen).steps == 0


@pytest.mark.parametrize(("shown", "charged"), [(0, 40), (39, 40), (40, 40), (41, 100), (101, 100)])
def test_report_may_not_count_fewer_steps_than_were_shown(shown: int, charged: int) -> None:
    verdict = verdict_of_ended(grant(), view(ran(143, stopped(40))), shown)
    assert verdict.steps == charged
    if charged == 100:
        assert verdict.outcome == "ReportRefused"
        assert f"counts 40 steps, its progress showed {shown}" in verdict.message


def test_shown_steps_are_the_most_that_progress_or_status_tell_of() -> None:
    def shown(progress: int | None, status: int | None) -> int:
        asked = job(uid="j", status={"stepsDone": status} if status is not None else {})
        steps = {} if progress is None else {"j": Progress(step=progress, steps=100, epsilon=0)}
        return steps_shown(snapshot([], [asked], progress=steps), "j")

    assert shown(None, None) == 0
    assert shown(7, None) == shown(None, 7) == shown(7, 3) == shown(3, 7) == 7
    assert steps_shown(snapshot(progress={"j": Progress(step=7, steps=9, epsilon=0)}), "j") == 7


def test_ends_without_a_workload() -> None:
    assert verdict_of_unlaunched("why") == Verdict("NeverStarted", 0, "why")
    assert verdict_of_vanished(grant()).steps == 100
    assert verdict_of_stolen_start(grant()).steps == 100


# From a verdict to charges


@pytest.fixture(scope="module")
def open_grant() -> tuple[Grant, LedgerState]:
    """A real grant over two blocks with different orders."""
    blocks = [block(), block("more", budget={"orders": ["2", "8", "32"]})]
    ledger = with_accounts(*blocks)
    asked = job(uid="u", blocks={"names": ["reviews", "more"]})
    decision = decide(snapshot(blocks, [asked], ledger=ledger), SETTINGS, Planner(SETTINGS))
    commit(ledger, *decision.records)
    return ledger.grants["u"], ledger


@pytest.mark.parametrize("steps", [0, 1, 40, 99])
def test_charge_is_the_price_of_the_steps_taken(
    open_grant: tuple[Grant, LedgerState], steps: int
) -> None:
    held, ledger = open_grant
    record = settle(held, Verdict("Stopped", steps, "why"), ledger)
    for charge in record.charges:
        orders = ledger.accounts[charge.account].opened.orders
        sigma, rate = float(held.granted.noise_multiplier), float(held.granted.sampling_rate)
        assert tuple(charge.amounts) == demand(sigma, rate, steps, orders)
        assert all(c < r for c, r in zip(charge.amounts, held.amounts[charge.account], strict=True))


def test_full_charge_is_the_reservation(open_grant: tuple[Grant, LedgerState]) -> None:
    held, ledger = open_grant
    record = settle(held, Verdict("Completed", 100, ""), ledger)
    assert record.charges == held.granted.charges
    assert (record.steps, record.outcome, record.job) == (100, "Completed", held.granted.job)


def test_charge_never_exceeds_the_reservation(open_grant: tuple[Grant, LedgerState]) -> None:
    """Even if a newer accountant prices the same steps higher."""
    held, ledger = open_grant
    charges = [
        charge.model_copy(update={"amounts": [amount // 2 for amount in charge.amounts]})
        for charge in held.granted.charges
    ]
    cheap = replace(held, granted=held.granted.model_copy(update={"charges": charges}))
    record = settle(cheap, Verdict("Stopped", 99, ""), ledger)
    assert [charge.amounts for charge in record.charges] == [c.amounts for c in charges]


def test_long_messages_are_cut(open_grant: tuple[Grant, LedgerState]) -> None:
    held, ledger = open_grant
    assert len(settle(held, Verdict("Failed", 100, "x" * 5000), ledger).message) == 1024


@given(st.integers(0, 100))
def test_later_stops_cost_no_less(open_grant: tuple[Grant, LedgerState], steps: int) -> None:
    held, ledger = open_grant
    now = settle(held, Verdict("Stopped", steps, ""), ledger)
    later = settle(held, Verdict("Stopped", min(steps + 1, 100), ""), ledger)
    for a, b in zip(now.charges, later.charges, strict=True):
        assert all(x <= y for x, y in zip(a.amounts, b.amounts, strict=True))


def forged(path: tuple[str, ...], value: Any) -> str:
    changed: Object = json.loads(stopped(40))
    node = changed
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    return json.dumps(changed)


paths = st.sampled_from(
    [
        ("version",),
        ("job", "uid"),
        ("planDigest",),
        ("outcome",),
        ("mechanism", "noiseMultiplier"),
        ("mechanism", "samplingRate"),
        ("mechanism", "clippingNorm"),
        ("mechanism", "steps"),
        ("epsilon",),
    ]
)
values = st.none() | st.integers(-5, 200) | st.floats() | st.text(max_size=8) | st.booleans()


@given(paths, values, st.sampled_from([0, 1, 143]))
def test_no_forged_field_refunds_more_than_it_says(
    path: tuple[str, ...], value: Any, exit_code: int
) -> None:
    """A report with any other field either claims fewer steps itself, or refunds nothing."""
    verdict = verdict_of_ended(grant(), view(ran(exit_code, forged(path, value))))
    assert 0 <= verdict.steps <= 100
    if verdict.steps < 100 and path != ("mechanism", "steps"):
        assert verdict.steps == 40
    if verdict.outcome in ("ReportMissing", "ReportRefused", "Completed"):
        assert verdict.steps == 100
