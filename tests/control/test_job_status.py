"""The status of a job: its states, reasons and numbers, as people read them."""

import re
from typing import get_args

import pytest
from tests.builders import ABSENT, NOW, UNITS, Object
from tests.control.statuses import LATER, Granted, condition, without_grant
from tests.control.workloads import NO_IMAGE, NO_NODE, RUNNING, UNSCHEDULED, ended, history

from dpmoe_operator.api.dpmoejob import DPMoEJobStatus
from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.control.job_status import REJECTED, Waiting
from dpmoe_operator.control.pods import PodView
from dpmoe_operator.control.times import format_time
from dpmoe_operator.privacy.calibration import epsilon_for
from dpmoe_trainer.contract import Evaluation, Outcome, Progress

# Jobs without budget


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
