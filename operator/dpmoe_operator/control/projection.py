"""What people read: the status of blocks and jobs, projected from the ledger and the cluster.

Status is never read back to give budget; it is read where it can only withhold it. So some fields
outlive their source: what a job showed of its progress, its entries in the ledger, what a refused
block had spent, and a finished job's scores, once its pods are gone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

from dpmoe_operator.api.dpmoejob import DPMoEJobStatus, EvaluationStatus
from dpmoe_operator.api.ledgerentry import Charge, GrantClosed
from dpmoe_operator.api.privateblock import OrderStatus, PrivateBlockStatus, Spender
from dpmoe_operator.api.reasons import Reason
from dpmoe_operator.control.accounts import Standing
from dpmoe_operator.control.proof import Unanswered
from dpmoe_operator.control.settlement import answer, steps_shown
from dpmoe_operator.control.times import format_time
from dpmoe_operator.control.views import JobView, Snapshot, WorkloadView
from dpmoe_operator.ledger.account import Account, Grant, minus
from dpmoe_operator.privacy.calibration import epsilon_for
from dpmoe_operator.privacy.capacity import conversion_cost, epsilon_of
from dpmoe_operator.privacy.units import NANO, capacity_units, format_epsilon, spend_units
from dpmoe_trainer.contract import TrainingReport

State = Literal["Pending", "Rejected", "Reserved", "Running", "Completed", "Failed", "Suspended"]

BlockState = Literal["Ready", "Exhausted", "Retired", "Refused"]

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

LEDGER_VERIFIED = "LedgerVerified"
"""Condition of a block: whether what the ledger says of it may be relied on."""

LEDGER_ANCHORED = (
    LEDGER_VERIFIED,
    "True",
    "Anchored",
    "the ledger holds, and agrees with its anchor",
)
LEDGER_NOT_ANCHORED = (
    LEDGER_VERIFIED,
    "Unknown",
    "NoAnchor",
    "the ledger holds; without an anchor nothing shows whether it was taken back as a whole",
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


def epsilon_text(account: Account, amounts: Sequence[int]) -> str:
    """A curve on an account as the ε that it guarantees at the account's δ, for people."""
    opened = account.opened
    epsilon = epsilon_of(amounts, Decimal(opened.delta), opened.orders, opened.conversion)
    return "inf" if epsilon is None else format_epsilon(spend_units(epsilon))


def available_epsilon(account: Account, unlocked: Sequence[int]) -> str:
    """The ε, at the account's δ, that no job that still fits can exceed; all of it when unspent.

    A job that fits at order α has an ε of at most what is left there plus what the conversion
    costs there.
    """
    opened = account.opened
    bounds = [
        Decimal(left) / NANO
        + conversion_cost(Decimal(order), Decimal(opened.delta), opened.conversion)
        for order, left in zip(opened.orders, minus(unlocked, account.spending.total), strict=True)
        if left > 0
    ]
    epsilon = min(max(bounds, default=Decimal(0)), Decimal(opened.epsilon))
    return format_epsilon(capacity_units(epsilon))


def used_share(account: Account) -> float:
    """How much of the account is promised, in [0, 1]: the share at the order with most room."""
    shares = [
        total / capacity
        for total, capacity in zip(account.spending.total, account.capacity, strict=True)
        if capacity > 0
    ]
    return min(shares, default=1.0)


def block_status(
    standing: Standing,
    snapshot: Snapshot,
    *,
    waiting: int,
    unlocked: Sequence[int] | None,
    next_unlock: datetime | None,
    anchored: bool,
) -> PrivateBlockStatus:
    """The status of a block.

    Args:
        standing: the block and whether it stands.
        snapshot: for its account.
        waiting: jobs that ask for it and have no budget yet.
        unlocked: what unlocking released so far at each order; None where no account is open.
        next_unlock: when time-unlocking completes.
        anchored: whether the ledger is checked against an anchor.
    """
    verified = LEDGER_ANCHORED if anchored else LEDGER_NOT_ANCHORED
    old, generation = standing.block.status, standing.block.meta.generation
    account = snapshot.ledger.accounts.get(standing.account_name or "")
    if standing.retired is not None:
        unlocked = account.zero if account else None
    elif standing.refusal is not None:
        unlocked = None
    state, reason, message = _block_state(standing, account, unlocked)
    ready = {None: "Unknown", "Ready": "True", "Exhausted": "True"}.get(state, "False")
    numbers = _remembered(standing)
    if account is not None and unlocked is not None:
        numbers = _numbers(account, unlocked)
        numbers["waiting"] = waiting
        numbers["next_unlock"] = format_time(next_unlock) if next_unlock else None
    return PrivateBlockStatus(
        state=state,
        reason=reason,
        message=message[:2048],
        account=standing.account_name or old.get("account"),
        observed_generation=generation,
        conditions=conditions_of(
            old, [("Ready", ready, reason, message), verified], generation, snapshot.now
        ),
        **numbers,
    )


def _block_state(
    standing: Standing, account: Account | None, unlocked: Sequence[int] | None
) -> tuple[BlockState | None, str, str]:
    """State, reason and message of a block."""
    if standing.retired is not None:
        return "Retired", "BlockRetired", standing.retired
    if standing.refusal is not None:
        return "Refused", *standing.refusal
    if account is None or unlocked is None:
        return None, "AccountPending", "the account is being opened"
    used = used_share(account)
    message = (
        f"{used:.1%} of epsilon {account.opened.epsilon} at delta {account.opened.delta} is"
        f" promised to {account.spending.jobs} jobs, for ever"
    )
    if used >= 1:
        return "Exhausted", "BudgetExhausted", message
    return "Ready", "BudgetAvailable", message


def _numbers(account: Account, unlocked: Sequence[int]) -> dict[str, Any]:
    """The account, as the fields of a block's status."""
    spending = account.spending
    return {
        "epsilon": account.opened.epsilon,
        "consumed": epsilon_text(account, spending.consumed),
        "reserved": epsilon_text(account, spending.reserved),
        "available": available_epsilon(account, unlocked),
        "used": f"{used_share(account):.0%}",
        "jobs": spending.jobs,
        "orders": [
            OrderStatus(
                order=order,
                capacity=format_epsilon(account.capacity[i]),
                unlocked=format_epsilon(unlocked[i]),
                reserved=format_epsilon(spending.reserved[i]),
                consumed=format_epsilon(spending.consumed[i]),
            )
            for i, order in enumerate(account.opened.orders)
        ],
        "spenders": [
            Spender(
                namespace=namespace,
                epsilon=epsilon_text(account, spent.total),
                jobs=spent.jobs,
            )
            for namespace, spent in sorted(account.by_namespace.items())[:32]
        ],
    }


def _remembered(standing: Standing) -> dict[str, Any]:
    """What a block's status said was spent from its account, kept while the block is refused.

    Were the ledger lost, this would be all that is left to tell.
    """
    old = standing.block.status
    if standing.account_name not in (None, old.get("account")):
        return {}
    return {name: old[name] for name in ("consumed", "reserved", "jobs") if name in old}


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
    state, reason, message = _phase(grant, workload, snapshot.launch_errors.get(job.meta.uid))
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
    grant: Grant, workload: WorkloadView | None, launch_error: str | None
) -> tuple[State, str, str]:
    """State, reason and message of a job that has budget."""
    settled = grant.settled
    if settled is not None:
        return _end_state(settled.outcome), settled.outcome, settled.message
    if launch_error is not None:
        return "Reserved", "LaunchFailed", f"the trainer cannot be launched: {launch_error}"
    if grant.launched is None or workload is None:
        return "Reserved", "Launching", "budget is reserved; the trainer pods are being created"
    if any(pod.running for pod in workload.pods):
        return "Running", "Training", "the trainer runs; budget is reserved until it reports"
    if any(pod.exit_code is not None for pod in workload.pods):
        return "Running", "Settling", "the trainer ended; what it spent is being settled"
    stuck = next((pod.waiting for pod in workload.pods if pod.waiting and not pod.gone), None)
    if stuck is not None:
        return "Reserved", "PodWaiting", f"the trainer pod waits: {stuck}"
    return "Reserved", "PodPending", "budget is reserved; the trainer pods wait for a node"


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


def conditions_of(
    old: Mapping[str, Any],
    wanted: Sequence[tuple[str, str, str, str]],
    generation: int,
    now: datetime,
) -> list[Any]:
    """Conditions with their transition times kept where the status did not change."""
    before = {c.get("type"): c for c in old.get("conditions") or []}
    result = []
    for kind, status, reason, message in wanted:
        previous = before.get(kind, {})
        same = previous.get("status") == status
        result.append(
            {
                "type": kind,
                "status": status,
                "reason": reason,
                "message": message[:2048],
                "lastTransitionTime": previous.get("lastTransitionTime")
                if same
                else format_time(now),
                "observedGeneration": generation,
            }
        )
    return result
