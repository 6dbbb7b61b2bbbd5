"""What the pods of a Job prove: that nothing started, or which report counts all that did.

Where a failed pod is replaced, no single pod knows all. The run's journal does: it lies beside the
checkpoints, every pod that runs rank 0 writes its uid into it before it touches data, and each
report says whom it lists. So a report counts everything if it lists every pod that may have run
rank 0, its own last. What may have gone unseen is a doubt, and doubts end closed.
"""

from collections.abc import Iterable

from pydantic import ValidationError

from dpmoe_operator.control.pods import LOST, PodView
from dpmoe_operator.control.views import WorkloadView
from dpmoe_trainer.contract import (
    FINAL_CODES,
    TERMINATION_MESSAGE_BYTES,
    ExitCode,
    Outcome,
    TrainingReport,
)


class Unanswered(Exception):
    """No report answers the granted plan. `outcome` is the settlement's word for it."""

    def __init__(self, outcome: str, problem: str) -> None:
        self.outcome = outcome
        super().__init__(problem)


def never_started(workload: WorkloadView, *, rank_0_alone: bool) -> bool:
    """Whether nothing that the Job ran can have spent anything.

    Args:
        workload: a Job that is over.
        rank_0_alone: its image is the operator's own. There is no step without rank 0, which makes
            the key of the noise, so it is enough that rank 0 never started.
    """
    pods = workload.first_pods if rank_0_alone else workload.pods
    if workload.active > 0 or workload.ended > len(workload.pods):
        return False
    if not pods:
        return workload.all_pods_known or (workload.untouched and not workload.pods)
    if workload.all_pods_known:
        all_seen = True
    elif workload.restartable:
        all_seen = _all_seen(workload, rank_0_alone=rank_0_alone)
    else:
        all_seen = workload.starts <= 1
    return all_seen and not any(pod.may_have_started for pod in pods)


def _all_seen(workload: WorkloadView, *, rank_0_alone: bool) -> bool:
    """Whether no pod of a Job that replaces its pods can have come and gone unseen."""
    indexes = {0} if rank_0_alone else {pod.index for pod in workload.pods}
    for index in indexes:
        pods = [pod for pod in workload.pods if pod.index == index]
        followed = max(pod.failures for pod in pods)
        last = max(pods, key=lambda pod: (pod.created, pod.failures))
        starts = _beginnings(pods)
        if len(pods) <= followed or starts < workload.starts:
            return False
        if not _unfollowed(workload, last, starts):
            return False
    return True


def _beginnings(pods: Iterable[PodView]) -> int:
    """How many starts of the Job are known by their first pods: no pod of that start failed before.

    Args:
        pods: of one index, all of those that were seen.
    """
    return sum(pod.failures == 0 for pod in pods)


def _unfollowed(workload: WorkloadView, last: PodView, starts: int) -> bool:
    """Whether no pod of its index can have followed it unseen.

    Args:
        workload: the Job.
        last: the last pod of an index that is known.
        starts: of the Job, how many are known for certain, the last pod's the last of them.
    """
    within_start = last.let_go and starts >= workload.starts
    return within_start or (last.witnessed and workload.caught_up)


def _is_final(workload: WorkloadView, last: PodView) -> bool:
    """Whether the Job is over because of how that pod of rank 0, its last known one, ended."""
    return workload.outcome == "Complete" or workload.failed_first or last.exit_code in FINAL_CODES


def only_report(workload: WorkloadView) -> tuple[PodView, TrainingReport]:
    """The report of the only pod that ever ran as rank 0, where failed pods are not replaced.

    Raises:
        Unanswered: there is none, or there may have been another pod.
    """
    pods, known = workload.first_pods, len(workload.pods)
    if workload.ended > known:
        raise Unanswered("ReportMissing", f"{workload.ended} pods ended, {known} of them were seen")
    if workload.starts > 1:
        raise Unanswered("ReportMissing", f"the Job may have been started {workload.starts} times")
    if len(pods) != 1:
        raise Unanswered("ReportMissing", f"rank 0 ran in {len(pods)} known pods, not in one")
    return pods[0], _read_report(pods[0])


def last_report(workload: WorkloadView) -> tuple[PodView, TrainingReport]:
    """The report that counts all pods that ever ran rank 0, where failed ones are replaced.

    Raises:
        Unanswered: there is none, or it may not count all of them.
    """
    started = [pod for pod in workload.first_pods if pod.may_have_started]
    if not started:
        raise Unanswered("ReportMissing", "no pod that may have run rank 0 was seen")
    last = started[-1]
    first_try = _was_first(workload, last)
    if last.exit_code == ExitCode.JOURNAL_LOST and not first_try:
        raise Unanswered("JournalLost", "the run's journal is gone: nothing shows what was spent")
    report = _read_report(last)
    # Whoever refuses its plan or its volume has no journal, and needs none if nobody was before.
    attempts = report.attempts or ((last.uid,) if first_try else ())
    if not attempts or attempts[-1] != last.uid:
        raise Unanswered("ReportMissing", "the report does not list its own pod last")
    missing = [pod.uid for pod in started if pod.uid not in attempts]
    if missing:
        raise Unanswered(
            "ReportMissing",
            f"the report does not count {len(missing)} of {len(started)} pods that may have run"
            f" rank 0: {missing[0]}",
        )
    doubt = _may_have_missed(workload, last, report, attempts)
    if doubt is not None:
        raise Unanswered("ReportMissing", doubt)
    return last, report


def _was_first(workload: WorkloadView, last: PodView) -> bool:
    """Whether every pod of rank 0 before that one is known, and none of them started."""
    others = [pod for pod in workload.first_pods if pod.uid != last.uid]
    return (
        (workload.starts <= 1 or workload.all_pods_known)
        and len(others) >= last.failures
        and not any(pod.may_have_started for pod in others)
    )


def _may_have_missed(
    workload: WorkloadView, last: PodView, report: TrainingReport, attempts: tuple[str, ...]
) -> str | None:
    """Why a pod that ran rank 0 may have gone both unseen and unlisted, or None.

    Kueue changes a Job's spec twice where it stops it, so the bound on its starts grows too large
    with every preemption. A run that completed pays its whole plan, whatever went unseen.
    """
    seen = {pod.uid for pod in workload.first_pods}
    first = seen.union(attempts)
    known = first | {pod.uid for pod in workload.pods}
    if len(first) <= last.failures:
        return f"{last.failures} pods of rank 0 failed before, {len(first) - 1} of them are known"
    if workload.ended > len(known):
        return f"{workload.ended} pods ended, {len(known)} of them are known"
    if workload.all_pods_known:
        return None
    beginnings = _beginnings(workload.first_pods)
    possible = beginnings + len(first - seen)
    if possible < workload.starts and report.outcome is not Outcome.COMPLETED:
        return f"the Job was started {workload.starts} times, {possible} starts are known"
    if _is_final(workload, last):
        return None
    # What only the report knows may all have run in one start, and no other than those seen unless
    # it was there before them.
    earlier = workload.first_pods[0].uid in attempts[1:]
    if not _unfollowed(workload, last, beginnings + earlier):
        return "rank 0 ended while no operator watched: another pod of it may have followed unseen"
    return None


def _read_report(pod: PodView) -> TrainingReport:
    if pod.exit_code is None:
        raise Unanswered("ReportMissing", "rank 0 ended without an exit code")
    if pod.ended_by == LOST:
        problem = f"rank 0 left no report: its kubelet found no container of it ({LOST})"
        raise Unanswered("ReportMissing", problem)
    if not pod.message:
        how = f"exit code {pod.exit_code}" + (f" ({pod.ended_by})" if pod.ended_by else "")
        raise Unanswered("ReportMissing", f"rank 0 ended with {how} and wrote no report")
    if len(pod.message.encode()) > TERMINATION_MESSAGE_BYTES:
        raise Unanswered("ReportMissing", "the report is longer than a termination message")
    try:
        return TrainingReport.model_validate_json(pod.message)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "report"
        problem = f"the report is malformed at {where}: {first['msg']}"
        raise Unanswered("ReportMissing", problem) from None
