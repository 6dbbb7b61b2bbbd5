"""Statuses: states, reasons and numbers that people read, and when they are written at all."""

import re
from datetime import timedelta
from decimal import Decimal
from typing import Any, get_args

import pytest
from tests.builders import (
    ABSENT,
    NOW,
    OTHER_TEAM,
    SETTINGS,
    TEAM,
    UNITS,
    Object,
    block,
    commit,
    granted,
    job,
    launched,
    reference,
    snapshot,
    with_accounts,
)
from tests.control.cluster import Cluster, Operator, settle_down
from tests.control.workloads import (
    NO_IMAGE,
    NO_NODE,
    RUNNING,
    UNSCHEDULED,
    ended,
    history,
    report,
    workload,
)

from dpmoe_operator.api.dpmoejob import DPMoEJobStatus
from dpmoe_operator.api.privateblock import PrivateBlockStatus
from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.control.accounts import standings
from dpmoe_operator.control.actions import SetStatus
from dpmoe_operator.control.decide import decide, react
from dpmoe_operator.control.job_status import REJECTED, Waiting, job_status
from dpmoe_operator.control.planning import Planner
from dpmoe_operator.control.pods import PodView
from dpmoe_operator.control.projection import (
    available_epsilon,
    block_status,
    epsilon_text,
    used_share,
)
from dpmoe_operator.control.settlement import Verdict, settle
from dpmoe_operator.control.times import format_time
from dpmoe_operator.control.views import JobView, Snapshot, WorkloadView
from dpmoe_operator.ledger.account import Account
from dpmoe_operator.ledger.fold import LedgerState
from dpmoe_operator.privacy.calibration import epsilon_for
from dpmoe_operator.privacy.capacity import capacity, epsilon_of
from dpmoe_operator.privacy.units import format_epsilon
from dpmoe_trainer.contract import Evaluation, Outcome, Progress

ACCOUNT = "claim://vault/data/reviews.jsonl"
ONE_ORDER = {"epsilon": "3", "orders": ["8"]}
LATER = NOW + timedelta(minutes=5)


def condition(status: DPMoEJobStatus | PrivateBlockStatus, kind: str) -> Any:
    assert status.conditions is not None
    return next((c for c in status.conditions if c.type == kind), None)


# Jobs without budget


def without_grant(waiting: Waiting, **fields: Any) -> DPMoEJobStatus:
    asked = job(uid="u", **fields)
    seen = snapshot([], [asked])
    suspended = bool(asked["spec"].get("suspend"))
    return job_status(JobView.of(asked), seen, waiting=waiting, suspended=suspended)


@pytest.mark.parametrize("reason", Reason)
def test_state_of_each_reason(reason: Reason) -> None:
    status = without_grant(Waiting(reason, "why"))
    assert status.state == ("Rejected" if reason in REJECTED else "Pending")
    assert (status.reason, status.message) == (reason.value, "why")
    held = condition(status, "BudgetReserved")
    assert (held.status, held.reason, held.message) == ("False", reason.value, "why")
    assert condition(status, "Succeeded") is None


def test_only_what_time_does_not_mend_is_rejected() -> None:
    assert {reason.value for reason in Reason} - {reason.value for reason in REJECTED} == {
        "Suspended",
        "WaitingForRefund",
        "WaitingForUnlock",
        "Outranked",
        "LedgerFrozen",
        "PendingEvaluation",
    }


def test_suspended_job_that_could_never_run_says_so() -> None:
    assert without_grant(Waiting(Reason.SUSPENDED, ""), suspend=True).state == "Suspended"
    rejected = without_grant(Waiting(Reason.BLOCK_NOT_FOUND, ""), suspend=True)
    assert rejected.state == "Rejected"


def test_timeout_names_the_last_reason() -> None:
    status = without_grant(Waiting(Reason.OUTRANKED, "rank 2 of 2"), timeoutSeconds=60)
    assert (status.state, status.reason) == ("Failed", "TimedOut")
    assert status.message is not None
    assert status.message.endswith("last reason Outranked: rank 2 of 2")


def test_numbers_of_the_plan_are_shown_while_it_waits() -> None:
    waiting = Waiting(Reason.OUTRANKED, "", 1.23456789, 2.5, 0.01, 100, ["a", "b"])
    status = without_grant(waiting)
    assert (status.epsilon, status.noise_multiplier, status.sampling_rate) == (
        "1.23457",
        "2.5",
        "0.01",
    )
    assert (status.steps, status.blocks) == (100, ["a", "b"])
    assert without_grant(Waiting(Reason.BLOCK_NOT_FOUND, "")).blocks is None


def test_endless_messages_fit_the_schema() -> None:
    assert len(str(without_grant(Waiting(Reason.INVALID_SPEC, "x" * 9999)).message)) == 2048


# Jobs with budget


class Granted:
    """One granted job, its ledger, and its status with whatever is added."""

    def __init__(self, **fields: Any) -> None:
        blocks = [block()]
        self.job = job(uid="job-1", **fields)
        self.ledger = with_accounts(*blocks)
        seen = snapshot(blocks, [self.job], ledger=self.ledger)
        decision = decide(seen, SETTINGS, Planner(SETTINGS))
        commit(self.ledger, *decision.records)
        self.digest = decision.plans["job-1"].plan.digest()
        self.mechanism: Object = decision.plans["job-1"].plan.privacy.model_dump(
            include={"noise_multiplier", "sampling_rate", "clipping_norm"}
        )

    def report(self, **fields: Any) -> str:
        return report(fields.pop("plan_digest", self.digest), **self.mechanism | fields)

    def launch(self) -> None:
        commit(self.ledger, launched("job-1"))

    def settle(self, outcome: str, steps: int, message: str = "") -> None:
        grant = self.ledger.grants["job-1"]
        commit(
            self.ledger, settle(grant, Verdict(outcome, steps, message), self.ledger), time=LATER
        )

    def status(
        self, *pods: PodView, old: Object | None = None, now: Any = NOW, **rest: Any
    ) -> DPMoEJobStatus:
        manifest = self.job | {"status": old or {}}
        views = {"job-1": WorkloadView.of(workload(active=1), pods)} if pods else {}
        seen = snapshot([], [manifest], ledger=self.ledger, workloads=views, now=now, **rest)
        return job_status(JobView.of(manifest), seen, waiting=None, suspended=False)


def phase(status: DPMoEJobStatus) -> tuple[str | None, str | None]:
    return status.state, status.reason


def test_phases_of_a_granted_job() -> None:
    held = Granted()
    assert phase(held.status()) == ("Reserved", "Launching")
    failed = held.status(launch_errors={"job-1": "quota exceeded"})
    assert phase(failed) == ("Reserved", "LaunchFailed")
    assert "quota exceeded" in str(failed.message)
    held.launch()
    assert phase(held.status()) == ("Reserved", "Launching")
    assert phase(held.status(history(UNSCHEDULED, gone=False))) == ("Reserved", "PodPending")
    waits = held.status(history(NO_IMAGE, gone=False))
    assert phase(waits) == ("Reserved", "PodWaiting")
    assert "ErrImagePull: no such image" in str(waits.message)
    waits = held.status(history(NO_NODE, gone=False, node=None))
    assert phase(waits) == ("Reserved", "PodWaiting")
    assert "Unschedulable: 0/1 nodes are available" in str(waits.message)
    running = held.status(
        history(RUNNING, gone=False),
        progress={"job-1": Progress(step=33, steps=100, epsilon=0.5, phase="Training")},
    )
    assert phase(running) == ("Running", "Training")
    assert (running.steps_done, running.progress, running.epsilon_spent) == (33, "33%", None)
    held.settle("Stopped", 40, "40 of 100 steps taken: stopped on request")
    stopped = held.status(history(RUNNING, ended(143), gone=False))
    assert phase(stopped) == ("Failed", "Stopped")
    assert (stopped.steps_done, stopped.progress) == (40, "40%")


def test_training_is_when_all_pods_run() -> None:
    held = Granted(parallelism={"workers": 2})
    held.launch()
    progress = {"job-1": Progress(step=33, steps=100, epsilon=0.5, steps_per_second=0.01)}

    def status(*pods: PodView) -> DPMoEJobStatus:
        return held.status(*pods, progress=progress)

    first = history(RUNNING, gone=False)
    waits = status(first, history(NO_NODE, gone=False, node=None, index="1", uid="pod-2"))
    assert phase(waits) == ("Running", "PodWaiting")
    said = "1 of 2 trainer pods run, the others wait: Unschedulable: 0/1 nodes are available"
    assert str(waits.message).startswith(f"{said}; at step 33 of 100")
    assert waits.eta is None
    both = status(first, history(RUNNING, gone=False, index="1", uid="pod-2"))
    assert (phase(both), both.eta) == (("Running", "Training"), "1h51m")
    saving = status(first, history(ended(0), gone=False, index="1", uid="pod-2"))
    assert phase(saving) == ("Running", "Training")


def test_plan_and_ledger_of_a_granted_job() -> None:
    held = Granted()
    status = held.status()
    assert (status.epsilon, status.steps, status.sampling_rate) == ("1", 100, "0.01")
    assert status.blocks == ["reviews"]
    assert status.grant_entry == "entry-000000000001"
    assert status.settlement_entry is None
    assert status.start_time == format_time(NOW)
    assert status.completion_time is None
    reserved = condition(status, "BudgetReserved")
    assert (reserved.status, reserved.reason) == ("True", "Granted")
    assert "entry-000000000001" in reserved.message
    held.settle("Completed", 100, "the plan ran to its end")
    done = held.status()
    assert phase(done) == ("Completed", "Completed")
    assert done.settlement_entry == "entry-000000000002"
    assert done.completion_time == format_time(LATER)
    assert condition(done, "Succeeded").status == "True"


@pytest.mark.parametrize("steps", [0, 1, 40, 100])
def test_epsilon_spent_is_that_of_the_charged_steps(steps: int) -> None:
    held = Granted()
    held.settle("Failed", steps)
    sigma = held.mechanism["noise_multiplier"]
    expected = {0: 0.0, 100: 1.0}.get(steps) or (
        epsilon_for(sigma, 1e-6, 0.01, steps) * (steps > 0)
    )
    status = held.status()
    assert float(str(status.epsilon_spent)) == pytest.approx(expected, rel=1e-5)
    assert condition(status, "Succeeded").status == "False"


SCORES = Evaluation(examples=50, accuracy=0.91234, majority_share=0.5)


def test_scores_come_from_the_report_and_outlive_it() -> None:
    held = Granted()
    held.launch()
    text = held.report(evaluation=SCORES, output="/dpmoe/outputs/results/team-a/run")
    status = held.status(history(RUNNING, ended(0, text), gone=False))
    assert status.evaluation is not None
    assert (status.evaluation.accuracy, status.evaluation.examples) == ("0.9123", 50)
    assert status.output == "/dpmoe/outputs/results/team-a/run"
    kept = held.status(old=status.to_object())
    assert (kept.evaluation, kept.output) == (status.evaluation, status.output)


@pytest.mark.parametrize(
    "lie", [{"plan_digest": "1" * 64}, {"job_uid": "other"}, {"steps": 7}, {"clipping_norm": 9.0}]
)
def test_report_that_is_refused_shows_no_scores(lie: Object) -> None:
    held = Granted()
    text = held.report(evaluation=SCORES, **lie)
    assert held.status(history(RUNNING, ended(0, text), gone=False)).evaluation is None


def test_report_without_evaluation_has_no_scores() -> None:
    held = Granted()
    text = held.report(outcome=Outcome.STOPPED, steps=3)
    assert held.status(history(RUNNING, ended(143, text), gone=False)).evaluation is None


@pytest.mark.parametrize(
    ("outcome", "code", "fields"),
    [
        ("Completed", 0, {"evaluation": SCORES, "output": "/dpmoe/outputs/results/team-a/run"}),
        ("Stopped", 143, {"outcome": Outcome.STOPPED, "steps": 40}),
    ],
)
def test_a_settled_status_is_the_same_without_the_pods(
    outcome: str, code: int, fields: Object
) -> None:
    """An operator that starts later watches no namespace whose blocks and grants are gone."""
    held = Granted()
    held.launch()
    pod = history(RUNNING, ended(code, held.report(**fields)), gone=False)
    assert condition(held.status(pod), "Restartable").status == "False"
    held.settle(outcome, fields.get("steps", 100))
    seen = held.status(pod).to_object()
    assert held.status(old=seen).to_object() == seen


# Conditions and writes


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


# Blocks


def status_of(reviews: Object, ledger: LedgerState, **rest: Any) -> PrivateBlockStatus:
    seen = snapshot([reviews], ledger=ledger)
    [standing] = standings(seen).values()
    account = ledger.accounts.get(standing.account_name or "")
    fields = {
        "waiting": 0,
        "unlocked": account.capacity if account else None,
        "next_unlock": None,
        "anchored": True,
    }
    return block_status(standing, seen, **fields | rest)


def charged(ledger: LedgerState, units: int, uid: str, namespace: str = TEAM) -> None:
    commit(ledger, granted(uid, {ACCOUNT: (units,)}, job=reference(uid, namespace=namespace)))


def test_fresh_block_is_ready_with_all_of_its_budget() -> None:
    reviews = block(budget=ONE_ORDER)
    status = status_of(reviews, with_accounts(reviews), waiting=3)
    assert (status.state, status.reason, status.account) == ("Ready", "BudgetAvailable", ACCOUNT)
    assert (status.epsilon, status.available, status.used) == ("3", "3", "0%")
    assert (status.consumed, status.reserved) == ("0", "0")
    assert (status.waiting, status.jobs) == (3, 0)
    assert condition(status, "Ready").status == "True"


def test_numbers_of_a_block_in_use() -> None:
    reviews = block(budget=ONE_ORDER)
    ledger = with_accounts(reviews)
    [total] = ledger.accounts[ACCOUNT].capacity
    charged(ledger, 400_000_000, "j1")
    charged(ledger, 300_000_000, "j2", OTHER_TEAM)
    grant = ledger.grants["j1"]
    commit(ledger, settle(grant, Verdict("Completed", 100, ""), ledger))
    status = status_of(reviews, ledger, unlocked=(total,), next_unlock=LATER)

    def shown(units: int) -> str:
        exact = epsilon_of([units], "1e-6", ["8"])
        assert exact is not None
        return format_epsilon(int(exact * 10**9))

    assert (status.consumed, status.reserved) == (shown(400_000_000), shown(300_000_000))
    assert status.used == f"{700_000_000 / total:.0%}"
    assert status.jobs == 2
    assert status.next_unlock == format_time(LATER)
    [order] = status.orders or []
    assert (order.order, order.capacity, order.unlocked) == (
        "8",
        format_epsilon(total),
        format_epsilon(total),
    )
    assert (order.reserved, order.consumed) == ("0.3", "0.4")
    spenders = {s.namespace: (s.epsilon, s.jobs) for s in status.spenders or []}
    assert spenders == {TEAM: (shown(400_000_000), 1), OTHER_TEAM: (shown(300_000_000), 1)}


def test_exhausted_block() -> None:
    reviews = block(budget=ONE_ORDER)
    ledger = with_accounts(reviews)
    [total] = ledger.accounts[ACCOUNT].capacity
    charged(ledger, total, "j1")
    status = status_of(reviews, ledger)
    assert (status.state, status.reason) == ("Exhausted", "BudgetExhausted")
    assert (status.available, status.used) == ("0", "100%")
    assert condition(status, "Ready").status == "True"


def test_refused_block_says_why() -> None:
    status = status_of(block(budget={"epsilon": "-1"}), LedgerState())
    assert (status.state, status.reason) == ("Refused", "InvalidSpec")
    assert "spec.budget.epsilon: '-1'" in str(status.message)
    assert condition(status, "Ready").status == "False"
    assert status.available is None


def test_block_whose_account_is_not_open_yet() -> None:
    status = status_of(block(), LedgerState())
    assert (status.state, status.reason) == (None, "AccountPending")
    assert condition(status, "Ready").status == "Unknown"


def an_account(budget: Object) -> Account:
    [account] = with_accounts(block(budget=budget)).accounts.values()
    return account


def test_available_is_what_one_more_job_can_be_guaranteed_at_most() -> None:
    """A job whose price is all that is left at some order has an ε that is not above it."""
    ledger = with_accounts(block())
    account = ledger.accounts[ACCOUNT]
    orders = account.opened.orders
    assert available_epsilon(account, account.capacity) == "10"
    half = tuple(max(units, 0) // 2 for units in account.capacity)
    shown = Decimal(available_epsilon(account, half))
    for place, units in enumerate(half):
        if units > 0:
            curve = [9 * 10**15] * len(orders)
            curve[place] = units
            exact = epsilon_of(curve, "1e-6", orders)
            assert exact is not None
            assert exact <= shown * Decimal("1.001")
    nothing = tuple(min(units, 0) for units in account.capacity)
    assert available_epsilon(account, nothing) == "0"


def test_used_share_is_at_the_order_with_most_room() -> None:
    ledger = with_accounts(block(budget={"epsilon": "3", "orders": ["8", "64"]}))
    first, second = ledger.accounts[ACCOUNT].capacity
    commit(ledger, granted("j", {ACCOUNT: (first, second // 4)}))
    assert used_share(ledger.accounts[ACCOUNT]) == pytest.approx(0.25)


def test_block_without_any_usable_order_is_used_up() -> None:
    account = an_account({"epsilon": "0.1", "orders": ["2"]})
    assert max(account.capacity) < 0
    assert used_share(account) == 1.0
    assert available_epsilon(account, account.capacity) == "0"


def test_spent_curves_as_epsilon() -> None:
    account = an_account({"epsilon": "3", "orders": ["8"]})
    assert epsilon_text(account, (0,)) == "0"
    assert epsilon_text(account, account.capacity) == "3"
    assert epsilon_text(account, (9 * 10**15,)) == "inf"
    assert capacity("3", "1e-6", ["8"]) == account.capacity


def test_many_spenders_are_cut_to_the_schema() -> None:
    reviews = block(budget=ONE_ORDER)
    ledger = with_accounts(reviews)
    for number in range(40):
        charged(ledger, 1, f"j{number}", f"team-{number}")
    assert len(status_of(reviews, ledger).spenders or []) == 32


# The fixed words

REASON = re.compile(r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")


def test_every_reason_can_be_a_reason() -> None:
    for reason in Reason:
        assert REASON.match(reason)
        assert len(reason) <= 128


def test_states_are_those_of_the_schema() -> None:
    kinds = get_args(DPMoEJobStatus.model_fields["state"].annotation)[0]
    assert set(get_args(kinds)) == {
        *("Pending", "Rejected", "Reserved", "Running", "Completed", "Failed", "Suspended")
    }


def test_waiting_job_of_a_single_step() -> None:
    """Progress of the smallest plan is 0 or 100 %, nothing else."""
    held = Granted(
        privacy={"epsilon": ABSENT, "noiseMultiplier": "8"},
        training={"steps": 1, "logicalBatch": UNITS},
    )
    assert held.status().progress == "0%"
    held.settle("Completed", 1)
    assert held.status().progress == "100%"
