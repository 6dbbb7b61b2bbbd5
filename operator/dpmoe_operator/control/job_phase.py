"""Where a launched job is, in words: `kubectl get dpj` must answer that."""

from typing import Literal

from dpmoe_operator.control.pods import PodView
from dpmoe_operator.control.views import JobView, WorkloadView
from dpmoe_trainer.contract import ExitCode, Progress

State = Literal["Pending", "Rejected", "Reserved", "Running", "Completed", "Failed", "Suspended"]

MINUTE, HOUR, DAY = 60, 3600, 86_400


def phase_of(
    job: JobView, workload: WorkloadView, restarts: int | None, at: str
) -> tuple[State, str, str]:
    """State, reason and message of a launched job that is not settled.

    Args:
        job: the job.
        workload: its Kubernetes Job.
        restarts: how often it was restarted; None where it never is.
        at: how far it is.
    """
    times = f"restarted {restarts} time{'s' if restarts != 1 else ''}; " if restarts else ""
    if workload.restartable and workload.paused:
        queued = job.spec is not None and job.spec.placement.queue_name is not None
        what = "its budget and its quota in Kueue stay" if queued else "its budget stays"
        return "Suspended", "Suspended", f"spec.suspend is true; {what} reserved; {at}"
    if workload.queued and workload.asked_to_suspend and not workload.cancelled:
        if workload.starts == 0:
            return (
                "Reserved",
                "Queued",
                "budget is reserved; it waits for GPUs in Kueue's queue",
            )
        return "Suspended", "Preempted", f"Kueue gave its GPUs away; it goes on later; {at}"
    workers = job.spec.parallelism.workers if job.spec else 1
    running = {pod.index for pod in workload.pods if pod.running and not pod.gone}
    done = {pod.index for pod in workload.pods if pod.exit_code == ExitCode.COMPLETED}
    if running and len(running | done) >= workers:
        return "Running", "Training", f"the trainer runs; {times}{at}{_no_pause(job, workload)}"
    ended = next((p for p in reversed(workload.pods) if p.exit_code is not None), None)
    stuck = next((pod.waiting for pod in workload.pods if pod.waiting and not pod.gone), None)
    if ended is not None and workload.restartable and not workload.over:
        waits = f"; the next one waits: {stuck}" if stuck else ""
        return "Running", "Restarting", f"{_how(ended)} and is replaced; {times}{at}{waits}"
    if ended is not None:
        return "Running", "Settling", "the trainer ended; what it spent is being settled"
    if running:
        waits = f": {stuck}" if stuck else ""
        only = f"{len(running)} of {workers} trainer pods run, the others wait{waits}"
        return "Running", "PodWaiting", f"{only}; {times}{at}{_no_pause(job, workload)}"
    if stuck is not None:
        return "Reserved", "PodWaiting", f"the trainer pod waits: {stuck}"
    if not workload.pods:
        return "Reserved", "PodPending", _no_pod(workload)
    return "Reserved", "PodPending", "budget is reserved; the trainer pods wait for a node"


def _no_pod(workload: WorkloadView) -> str:
    """Quotas, admission and classes that do not exist speak to the Job controller alone."""
    meta = workload.meta
    return (
        "budget is reserved; no trainer pod was created yet: if that lasts, see `kubectl describe"
        f" job {meta.name} -n {meta.namespace}`"
    )


def _no_pause(job: JobView, workload: WorkloadView) -> str:
    if workload.restartable or not (job.spec and job.spec.suspend):
        return ""
    return "; spec.suspend does nothing to it, since its blocks open no claim for checkpoints"


def _how(pod: PodView) -> str:
    by = f" ({pod.ended_by})" if pod.ended_by else ""
    return f"trainer pod {pod.index} ended with exit code {pod.exit_code}{by}"


def restarts_of(job: JobView, workload: WorkloadView | None) -> int | None:
    """How often the job was restarted, as far as any operator saw; None where it never is."""
    known: int | None = job.status.get("restarts")
    if workload is None or not workload.restartable:
        return known
    return max(known or 0, workload.restarts)


def eta_of(progress: Progress | None) -> str | None:
    """How long the rest of the steps will take; so coarse that it changes at most each minute."""
    if progress is None or progress.steps_per_second <= 0:
        return None
    seconds = (progress.steps - progress.step) / progress.steps_per_second
    if seconds < MINUTE:
        return "<1m"
    if seconds < HOUR:
        return f"{seconds // MINUTE:.0f}m"
    if seconds < DAY:
        return f"{seconds // HOUR:.0f}h{seconds % HOUR // MINUTE:.0f}m"
    return f"{seconds // DAY:.0f}d{seconds % DAY // HOUR:.0f}h"
