"""What people read of jobs: their status, projected from the ledger and the cluster.

Status is never read back to give budget; it is read where it can only withhold it. So some fields
outlive their source: what a job showed of its progress, its restarts, its entries in the ledger,
and a finished job's scores, once its pods are gone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from dpmoe_operator.api.dpmoejob import DPMoEJobStatus, EvaluationStatus
from dpmoe_operator.api.ledgerentry import Charge, GrantClosed
from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.control.job_phase import State, eta_of, phase_of, restarts_of
from dpmoe_operator.control.projection import conditions_of
from dpmoe_operator.control.proof import Unanswered
from dpmoe_operator.control.settlement import answer, steps_shown
from dpmoe_operator.control.views import JobView, Snapshot, WorkloadView
from dpmoe_operator.ledger.account import Grant
from dpmoe_operator.privacy.calibration import epsilon_for
from dpmoe_trainer.contract import TrainingReport

REJECTED = (
    Reason.GRANT_MISSING,
    Reason.BLOCK_NOT_FOUND,
    Reason.BLOCK_NOT_SHARED,
    Reason.BLOCK_RETIRED,
    Reason.INVALID_SPEC,
    Reason.DEMAND_EXCEEDS_CAPACITY,
    Reason.BLOCK_EXHAUSTED,
)
"""Reasons that time alone does not mend: somebody must act."""


RESTARTABLE = (
    "Restartable",
    "True",
    "CheckpointsOpened",
    "its blocks open a claim for checkpoints: after a failure or a suspension it goes on",
)
NOT_RESTARTABLE = (
    "Restartable",
    "False",
    "NoCheckpoints",
    "its blocks do not all open the same claim for checkpoints: a failure or a suspension ends it",
)


@dataclass(frozen=True)
class Waiting:
    """Why a job has no budget yet, in words, with the plan's numbers where it could be planned."""

    reason: Reason
    message: str
    epsilon: float | None = None
    noise_multiplier: float | None = None
    sampling_rate: float | None = None
    steps: int | None = None
    blocks: Sequence[str] = field(default=())


def job_status(
    job: JobView, snapshot: Snapshot, *, waiting: Waiting | None, suspended: bool
) -> DPMoEJobStatus:
    """The status of a job: granted, or waiting for the reason given."""
    closed = snapshot.ledger.closed.get(job.meta.uid)
    if closed is not None:
        return _status_of_closed(job, snapshot, closed)
    grant = snapshot.ledger.grants.get(job.meta.uid)
    if grant is None:
        assert waiting is not None
        return _status_without_grant(job, snapshot, waiting, suspended)
    return _status_with_grant(job, snapshot, grant)


def timed_out(job: JobView, now: datetime) -> bool:
    """Whether a job without budget waited longer than its timeout."""
    limit = job.spec.timeout_seconds if job.spec else None
    return limit is not None and (now - job.meta.created).total_seconds() > limit


def _status_without_grant(
    job: JobView, snapshot: Snapshot, waiting: Waiting, suspended: bool
) -> DPMoEJobStatus:
    state: State = "Rejected" if waiting.reason in REJECTED else "Pending"
    reason, message = str(waiting.reason), waiting.message
    if timed_out(job, snapshot.now):
        state, reason = "Failed", "TimedOut"
        message = f"no budget within spec.timeoutSeconds; last reason {waiting.reason}: {message}"
    elif suspended and state == "Pending":
        state = "Suspended"
    return DPMoEJobStatus(
        state=state,
        reason=reason,
        message=message[:2048],
        epsilon=_number(waiting.epsilon),
        noise_multiplier=_number(waiting.noise_multiplier),
        sampling_rate=_number(waiting.sampling_rate),
        steps=waiting.steps,
        blocks=list(waiting.blocks) or None,
        # The only witness of a grant that the ledger lost.
        grant_entry=job.status.get("grantEntry"),
        settlement_entry=job.status.get("settlementEntry"),
        observed_generation=job.meta.generation,
        conditions=conditions_of(
            job.status,
            [("BudgetReserved", "False", reason, message)],
            job.meta.generation,
            snapshot.now,
        ),
    )


def _status_with_grant(job: JobView, snapshot: Snapshot, grant: Grant) -> DPMoEJobStatus:
    granted, settled = grant.granted, grant.settled
    workload = snapshot.workloads.get(job.meta.uid)
    shown = 0 if settled else steps_shown(snapshot, job.meta.uid)
    at = f"at step {min(shown, granted.steps)} of {granted.steps}"
    restarts = restarts_of(job, workload)
    state, reason, message = _phase(job, snapshot, grant, workload, restarts, at)
    report = _report(grant, workload, shown)
    evaluation, output = _scores(job.status, report)
    done = settled.steps if settled else min(shown, granted.steps)
    reserved_message = f"reserved in {grant.entry} at {grant.time}"
    if granted.utility is not None:
        reserved_message += (
            f": epsilon {granted.epsilon} on {len(granted.charges)} of spec.blocks, utility"
            f" {granted.utility} of 1"
        )
    conditions = [("BudgetReserved", "True", "Granted", reserved_message)]
    if workload is not None and settled is None:  # Of a job that is over it answers nothing.
        conditions.append(RESTARTABLE if workload.restartable else NOT_RESTARTABLE)
    if settled is not None:
        success = "True" if state == "Completed" else "False"
        conditions.append(("Succeeded", success, reason, message))
    return DPMoEJobStatus(
        state=state,
        reason=reason,
        message=message[:2048],
        epsilon=_number(float(granted.epsilon)),
        epsilon_spent=_spent(grant),
        utility=granted.utility,
        noise_multiplier=_number(float(granted.noise_multiplier)),
        sampling_rate=_number(float(granted.sampling_rate)),
        steps=granted.steps,
        steps_done=done,
        progress=f"{100 * done // granted.steps}%",
        eta=eta_of(snapshot.progress.get(job.meta.uid)) if reason == "Training" else None,
        restarts=restarts,
        blocks=_block_names(snapshot, granted.charges),
        grant_entry=grant.entry,
        settlement_entry=grant.settlement_entry,
        evaluation=evaluation,
        output=output,
        start_time=_to_seconds(grant.time),
        completion_time=_to_seconds(grant.settlement_time),
        observed_generation=job.meta.generation,
        conditions=conditions_of(job.status, conditions, job.meta.generation, snapshot.now),
    )


def _status_of_closed(job: JobView, snapshot: Snapshot, closed: GrantClosed) -> DPMoEJobStatus:
    """A job that was settled so long ago that the ledger keeps its outcome alone."""
    state = _end_state(closed.outcome)
    message = f"settled in {closed.entry}; what it cost is in the archive of the ledger"
    success = "True" if state == "Completed" else "False"
    return DPMoEJobStatus(
        state=state,
        reason=closed.outcome,
        message=message,
        grant_entry=job.status.get("grantEntry"),
        settlement_entry=closed.entry,
        completion_time=_to_seconds(closed.time),
        observed_generation=job.meta.generation,
        conditions=conditions_of(
            job.status,
            [("Succeeded", success, closed.outcome, message)],
            job.meta.generation,
            snapshot.now,
        ),
    )


def _end_state(outcome: str) -> State:
    return "Completed" if outcome == "Completed" else "Failed"


def _phase(
    job: JobView,
    snapshot: Snapshot,
    grant: Grant,
    workload: WorkloadView | None,
    restarts: int | None,
    at: str,
) -> tuple[State, str, str]:
    """State, reason and message of a job that has budget."""
    settled, launch_error = grant.settled, snapshot.launch_errors.get(job.meta.uid)
    if settled is not None:
        return _end_state(settled.outcome), settled.outcome, settled.message
    if launch_error is not None:
        return "Reserved", "LaunchFailed", f"the trainer cannot be launched: {launch_error}"
    if grant.launched is None or workload is None:
        return "Reserved", "Launching", "budget is reserved; the trainer pods are being created"
    return phase_of(job, workload, restarts, at)


def _report(grant: Grant, workload: WorkloadView | None, shown: int) -> TrainingReport | None:
    """The report that answers the grant, if there is one by now."""
    refused = grant.settled is not None and grant.settled.outcome == "ReportRefused"
    if workload is None or refused:
        return None
    try:
        return answer(grant, workload, shown)
    except Unanswered:
        return None


def _scores(
    old: Mapping[str, Any], report: TrainingReport | None
) -> tuple[EvaluationStatus | None, str | None]:
    if report is None:
        kept = old.get("evaluation")
        return (EvaluationStatus.model_validate(kept) if kept else None), old.get("output")
    scores = report.evaluation
    if scores is None:
        return None, report.output
    return (
        EvaluationStatus(
            accuracy=f"{scores.accuracy:.4f}",
            majority_share=f"{scores.majority_share:.4f}",
            perplexity=f"{scores.perplexity:.4g}" if scores.perplexity is not None else None,
            examples=scores.examples,
        ),
        report.output,
    )


def _spent(grant: Grant) -> str | None:
    """ε of the steps that a settled job is charged for, at the job's own δ."""
    granted, settled = grant.granted, grant.settled
    if settled is None:
        return None
    if settled.steps == 0:
        return "0"
    if settled.steps == granted.steps:
        return _number(float(granted.epsilon))
    return _number(
        epsilon_for(
            float(granted.noise_multiplier),
            float(granted.delta),
            float(granted.sampling_rate),
            settled.steps,
        )
    )


def _block_names(snapshot: Snapshot, charges: Sequence[Charge]) -> list[str]:
    return [snapshot.ledger.accounts[charge.account].opened.block.name for charge in charges]


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"


def _to_seconds(time: str | None) -> str | None:
    return None if time is None else f"{time[:19]}Z"
