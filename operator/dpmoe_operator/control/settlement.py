"""Closing a grant: what a job really consumed, as far as that is proven.

The rule of every row: what is not proven unspent is spent. Two things prove:

- the ledger, or the pods' own states, show that no container with data ever started: all returns;
- the report of the operator's own trainer image, which counts all pods that ever ran rank 0
  (`control/proof.py`), answers the granted plan and counts no fewer steps than were shown: those
  that it does not count return.

Everything else is charged in full, and the settlement says why.
"""

from dataclasses import dataclass, replace

from dpmoe_operator.api.ledgerentry import Charge, Settled
from dpmoe_operator.control.pods import PodView
from dpmoe_operator.control.proof import Unanswered, last_report, never_started, only_report
from dpmoe_operator.control.views import Snapshot, WorkloadView
from dpmoe_operator.ledger.account import Grant
from dpmoe_operator.ledger.fold import LedgerState
from dpmoe_operator.privacy.mechanisms import demand
from dpmoe_trainer.contract import Mechanism, Outcome, TrainingReport


@dataclass(frozen=True)
class Verdict:
    """What a settlement rests on.

    Attributes:
        outcome: one word for the ledger and for people.
        steps: steps charged.
        message: why.
    """

    outcome: str
    steps: int
    message: str


def settle(grant: Grant, verdict: Verdict, ledger: LedgerState) -> Settled:
    """The record that closes a grant by a verdict.

    Args:
        grant: the open grant.
        verdict: how many of its steps are charged, at most the plan's.
        ledger: for the orders of the accounts.
    """
    granted = grant.granted
    assert 0 <= verdict.steps <= granted.steps
    return Settled(
        job=granted.job,
        outcome=verdict.outcome,
        steps=verdict.steps,
        message=verdict.message[:1024],
        charges=[_charge(grant, charge, verdict.steps, ledger) for charge in granted.charges],
    )


def _charge(grant: Grant, reserved: Charge, steps: int, ledger: LedgerState) -> Charge:
    granted = grant.granted
    if steps == granted.steps:
        return reserved
    orders = tuple(float(order) for order in ledger.accounts[reserved.account].opened.orders)
    cost = demand(float(granted.noise_multiplier), float(granted.sampling_rate), steps, orders)
    amounts = [min(used, held) for used, held in zip(cost, reserved.amounts, strict=True)]
    return Charge(account=reserved.account, amounts=amounts)


def verdict_of_unlaunched(message: str) -> Verdict:
    """A grant that the ledger does not show as launched: its suspended Job never had a pod."""
    return Verdict("NeverStarted", 0, message)


def verdict_of_stolen_start(grant: Grant) -> Verdict:
    """A grant that the operator did not start, but somebody else may have."""
    return Verdict(
        "StartedByOthers",
        grant.granted.steps,
        "somebody let the Job's pods run before the operator did: nothing shows what they did",
    )


def verdict_of_vanished(grant: Grant) -> Verdict:
    """A launched grant whose Job is gone: nothing shows any more what its pods did."""
    return Verdict(
        "WorkloadVanished",
        grant.granted.steps,
        "the Job was deleted by somebody else, and with it all proof of what it did",
    )


def verdict_of_ended(
    grant: Grant, workload: WorkloadView, shown: int = 0, why: str = "it was stopped before"
) -> Verdict:
    """A launched grant whose Job ended or was stopped, so that no pod of it runs any more.

    Args:
        grant: the open grant.
        workload: its Job.
        shown: the most steps that its progress ever showed, as far as is known.
        why: what stopped it, where the Job does not say.
    """
    if never_started(workload, rank_0_alone=grant.granted.reports_prove):
        return Verdict("NeverStarted", 0, f"no container ever started ({workload.reason or why})")
    return _verdict_of_report(grant, workload, shown)


def may_learn_more(grant: Grant, workload: WorkloadView, shown: int) -> bool:
    """Whether the watch of pods, where it is late, may still tell what changes the verdict.

    It is not late for long: it goes on, with bookmarks if nothing else, or breaks, and then it may
    have missed something, which no other watch will tell.
    """
    later = replace(workload, caught_up=True)
    return verdict_of_ended(grant, workload, shown) != verdict_of_ended(grant, later, shown)


def steps_shown(snapshot: Snapshot, uid: str) -> int:
    """The most steps that a running job was ever seen to have taken.

    The job's status remembers what an operator saw before it was restarted. A wrong status can only
    get a report refused.
    """
    progress, job = snapshot.progress.get(uid), snapshot.jobs.get(uid)
    remembered = job.status.get("stepsDone") if job is not None else None
    return max(progress.step if progress else 0, remembered or 0)


def _verdict_of_report(grant: Grant, workload: WorkloadView, shown: int) -> Verdict:
    full = grant.granted.steps
    if not grant.granted.reports_prove:
        outcome = "Completed" if workload.outcome == "Complete" else "Charged"
        why = f"reports of image {grant.granted.image} prove nothing: full charge"
        return Verdict(outcome, full, why)
    try:
        report = answer(grant, workload, shown)
    except Unanswered as problem:
        return Verdict(problem.outcome, full, str(problem))
    if report.outcome is Outcome.COMPLETED:
        return Verdict("Completed", full, "the plan ran to its end")
    return Verdict(
        report.outcome.value,
        report.mechanism.steps,
        f"{report.mechanism.steps} of {full} steps taken: {report.message}",
    )


def answer(grant: Grant, workload: WorkloadView, shown: int = 0) -> TrainingReport:
    """The report that answers the granted plan and counts all that was ever spent on it.

    Args:
        grant: the grant.
        workload: its Job.
        shown: as in `verdict_of_ended`.

    Raises:
        Unanswered: there is none, or it answers something else.
    """
    pod, report = last_report(workload) if workload.restartable else only_report(workload)
    problem = _contradiction(grant, report, pod, shown)
    if problem is not None:
        raise Unanswered("ReportRefused", problem)
    return report


def _contradiction(grant: Grant, report: TrainingReport, pod: PodView, shown: int) -> str | None:
    """Where the report does not answer the granted plan, or what was seen of it."""
    granted = grant.granted
    if report.job.uid != granted.job.uid:
        return "the report belongs to another job"
    if report.plan_digest != granted.plan_digest:
        return "the report answers another plan"
    if report.mechanism != _mechanism(grant, report):
        return "the report's mechanism is not the plan's"
    if report.mechanism.steps > granted.steps:
        return f"the report counts {report.mechanism.steps} steps of {granted.steps}"
    if report.mechanism.steps < shown:
        return f"the report counts {report.mechanism.steps} steps, its progress showed {shown}"
    if report.outcome is Outcome.COMPLETED and report.mechanism.steps != granted.steps:
        return f"the report claims completion after {report.mechanism.steps} of {granted.steps}"
    if (report.outcome is Outcome.COMPLETED) != (pod.exit_code == 0):
        return f"the report says {report.outcome.value}, the exit code is {pod.exit_code}"
    return None


def _mechanism(grant: Grant, report: TrainingReport) -> Mechanism:
    return Mechanism(
        noise_multiplier=float(grant.granted.noise_multiplier),
        sampling_rate=float(grant.granted.sampling_rate),
        clipping_norm=float(grant.granted.clipping_norm),
        steps=report.mechanism.steps,
    )
