"""The Job controller: carries out what `job_plan` plans, and deletes finished Jobs in time.

It makes and counts pods; it runs none. Somebody else runs them as an ordinary API client, and
reports by `pods/status`. Failed pods are replaced after one second, doubling, and not after ten
as in Kubernetes, so that demos and tests need not wait.
"""

from datetime import UTC, datetime, timedelta

from .cluster import Cluster
from .deletion import Deletion
from .garbage import OwnerIndex, Ref, owner_uids
from .job_plan import JobPlan, finish_time, is_finished, plan_job
from .job_pods import TRACKING_FINALIZER, build_pod
from .resources import JOBS, PODS, Object
from .store import Event
from .workqueue import WorkQueue

FIRST_BACKOFF_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 60.0
BACKOFF = FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS


class JobController:
    """Runs all Jobs. A key of its queue is a Job's uid, or the place of a pod without a Job."""

    def __init__(self, cluster: Cluster, owners: OwnerIndex) -> None:
        self._cluster = cluster
        self._owners = owners
        self._failures: dict[str, int] = {}
        self._no_pods_before: dict[str, datetime] = {}
        self.queue: WorkQueue[str | Ref] = WorkQueue(self._work)

    def observe(self, ref: Ref, event: Event) -> None:
        """Notes which Job a write is about. Call after the index has recorded it."""
        obj = event.current.object
        if ref.storage == JOBS.storage:
            self.queue.add(obj["metadata"]["uid"])
        if ref.storage == PODS.storage:
            before = owner_uids(event.previous.object) if event.previous else set()
            for uid in before | owner_uids(obj):
                self.queue.add(uid)
            if event.type != "DELETED" and not owner_uids(obj) and _is_tracked(obj):
                self.queue.add(ref)

    def _work(self, key: str | Ref) -> None:
        if isinstance(key, Ref):
            self._cluster.release(PODS, key.namespace, key.name, TRACKING_FINALIZER)
            return
        pods = self._pods(key)
        ref = self._owners.by_uid.get(key)
        if ref is None or ref.storage != JOBS.storage:
            self._forget(key, pods)
            return
        job = self._cluster.get(JOBS, ref.namespace, ref.name).object
        if is_finished(job):
            self._release(pods)
            self._expire(job)
        elif "deletionTimestamp" in job["metadata"]:
            self._release(pods)
        else:
            self._sync(job, pods)

    def _pods(self, uid: str) -> list[Object]:
        refs = [ref for ref in self._owners.dependents(uid) if ref.storage == PODS.storage]
        return [self._cluster.get(PODS, ref.namespace, ref.name).object for ref in refs]

    def _sync(self, job: Object, pods: list[Object]) -> None:
        uid, namespace = job["metadata"]["uid"], job["metadata"]["namespace"]
        now = datetime.now(UTC)
        wait = (self._no_pods_before.get(uid, now) - now).total_seconds()
        plan = plan_job(job, pods, now, wait, BACKOFF)
        if plan.failures:
            plan = self._back_off(uid, job, pods, plan, now)
        for index in plan.create:
            told = None if index is None else plan.told.get(index)
            self._cluster.create(PODS, namespace, build_pod(job, index, told))
        self._cluster.modify(
            JOBS, namespace, job["metadata"]["name"], lambda old: {**old, "status": plan.status},
            "status",
        )  # fmt: skip
        self._release([*plan.release, *plan.delete])
        for pod in [*plan.delete, *plan.stop]:
            name = pod["metadata"]["name"]
            if self._cluster.store.get(PODS.storage, namespace, name) is not None:
                self._cluster.delete(PODS, namespace, name)
        if plan.check_after is not None:
            self.queue.add_after(uid, plan.check_after)

    def _back_off(
        self, uid: str, job: Object, pods: list[Object], plan: JobPlan, now: datetime
    ) -> JobPlan:
        """Pods have failed: replans with the delay that follows from how many have so far."""
        failures = self._failures[uid] = self._failures.get(uid, 0) + plan.failures
        delay = min(FIRST_BACKOFF_SECONDS * 2 ** (failures - 1), LONGEST_BACKOFF_SECONDS)
        self._no_pods_before[uid] = now + timedelta(seconds=delay)
        return plan_job(job, pods, now, delay, BACKOFF)

    def _release(self, pods: list[Object]) -> None:
        for pod in pods:
            if _is_tracked(pod):
                place = pod["metadata"]
                self._cluster.release(PODS, place["namespace"], place["name"], TRACKING_FINALIZER)

    def _forget(self, uid: str, pods: list[Object]) -> None:
        """The Job is gone: nobody counts its pods any more."""
        self._release(pods)
        self._failures.pop(uid, None)
        self._no_pods_before.pop(uid, None)

    def _expire(self, job: Object) -> None:
        ttl = job["spec"].get("ttlSecondsAfterFinished")
        if ttl is None or "deletionTimestamp" in job["metadata"]:
            return
        expiry = finish_time(job) + timedelta(seconds=ttl)
        left = (expiry - datetime.now(UTC)).total_seconds()
        if left > 0:
            self.queue.add_after(job["metadata"]["uid"], left)
        else:
            place = job["metadata"]
            self._cluster.delete(JOBS, place["namespace"], place["name"], Deletion("Foreground"))


def _is_tracked(pod: Object) -> bool:
    return TRACKING_FINALIZER in pod["metadata"].get("finalizers", ())
