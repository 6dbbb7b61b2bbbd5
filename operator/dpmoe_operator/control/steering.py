"""What is done to the Job of a launched grant: released, paused and let go on, given up.

Budget comes first, then GPUs: a Job is released, to its pods or to Kueue's queue, once its launch
is in the ledger. Only a Job that keeps checkpoints may be suspended and go on.
"""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from dpmoe_operator.control.actions import Action, MarkStarted, Pause, Release, Stop
from dpmoe_operator.control.settings import Settings
from dpmoe_operator.control.views import (
    CANCELLED,
    PAUSED,
    QUEUE_NAME,
    RELEASED,
    JobView,
    Snapshot,
    WorkloadView,
)
from dpmoe_operator.ledger.account import Grant
from dpmoe_trainer.contract import JobReference


def steer(
    snapshot: Snapshot, grant: Grant, workload: WorkloadView, settings: Settings
) -> Iterator[Action]:
    """What a Job needs so that it runs as its DPMoEJob says.

    Args:
        snapshot: what the operator sees.
        grant: its open grant, which the ledger shows as launched.
        workload: the Job.
        settings: for the default start timeout.
    """
    meta, uid = workload.meta, grant.granted.job.uid
    job = snapshot.jobs.get(uid)
    if workload.cancelled:
        return
    if job is None or start_timed_out(job, workload, snapshot, settings):
        watch = workload.watch if workload.podless else None
        yield Stop(uid, meta.namespace, meta.name, meta.resource_version, watch)
        return
    suspend = bool(job.spec and job.spec.suspend)
    queue = job.spec.placement.queue_name if job.spec else None
    place = uid, meta.namespace, meta.name, meta.resource_version
    if workload.released is None:
        if not (suspend and workload.restartable):
            watch = workload.watch if workload.untouched else None
            yield Release(*place, queue=queue, watch=watch)
    elif workload.restartable and workload.outcome is None:
        if uid not in snapshot.marked and _has_started(workload):
            owner = meta.name, meta.uid
            yield MarkStarted(JobReference(**grant.granted.job.model_dump()), meta.namespace, owner)
        elif suspend and not workload.paused:
            yield Pause(*place)
        elif workload.paused and not suspend and workload.suspended:
            yield Release(*place, queue=queue, again=True)


def _has_started(workload: WorkloadView) -> bool:
    """Whether a container of rank 0 is known to have run.

    An exit code alone does not say so: the kubelet gives one to a container that it never had.
    """
    return any(
        pod.running or (pod.exit_code is not None and pod.may_have_started)
        for pod in workload.first_pods
    )


def start_timed_out(
    job: JobView, workload: WorkloadView, snapshot: Snapshot, settings: Settings
) -> bool:
    """Whether a released Job waits too long for its first start, with all of its pods.

    A Job that was suspended meanwhile has been started, so it is not timed any more.
    """
    if job.spec is None or workload.released is None or workload.outcome is not None:
        return False
    limit = job.spec.placement.start_timeout_seconds or settings.start_timeout_seconds
    if limit is None or workload.meta.generation > 2:
        return False
    since = _to_be_placed_since(workload)
    if since is None:
        return False
    started = {pod.index for pod in workload.pods if pod.may_have_started or pod.failures}
    waited = (snapshot.now - since).total_seconds()
    return len(started) < job.spec.parallelism.workers and waited > limit


def _to_be_placed_since(workload: WorkloadView) -> datetime | None:
    """From when on the pods of a released Job wait for nodes; None as long as Kueue holds it back.

    Kueue says nothing of when it started a Job, but its pods were created then.
    """
    if not workload.queued:
        return workload.released
    if workload.asked_to_suspend:
        return None
    return min((pod.created for pod in workload.pods), default=None)


def release_patch(action: Release, now: str) -> dict[str, Any]:
    """The write by which a Job's pods may run, or by which Kueue takes it.

    The first one also says when it was; later ones do not change that.
    """
    metadata: dict[str, Any] = {"resourceVersion": action.resource_version}
    metadata["annotations"] = {PAUSED: None} if action.again else {RELEASED: now}
    if action.queue is None:
        return {"metadata": metadata, "spec": {"suspend": False}}
    return {"metadata": metadata | {"labels": {QUEUE_NAME: action.queue}}}


def pause_patch(action: Pause, now: str) -> dict[str, Any]:
    """The write by which a Job is suspended for a while, and taken from Kueue's queue."""
    metadata = {
        "resourceVersion": action.resource_version,
        "annotations": {PAUSED: now},
        "labels": {QUEUE_NAME: None},
    }
    return {"metadata": metadata, "spec": {"suspend": True}}


def stop_patch(action: Stop, now: str) -> dict[str, Any]:
    """The write by which a Job is given up."""
    metadata: dict[str, Any] = {"annotations": {CANCELLED: now}, "labels": {QUEUE_NAME: None}}
    if action.watch is not None:
        metadata["resourceVersion"] = action.resource_version
    return {"metadata": metadata, "spec": {"suspend": True}}
