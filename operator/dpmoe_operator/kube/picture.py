"""What the operator last saw of the cluster, kept in memory and thrown away with the process.

Handlers and watches put objects in; a round takes a snapshot out. Nothing is decided here. What
holds: an older version of an object never replaces a newer one, and pods stay known after their
deletion until their job is forgotten, since their last word may prove what a job did.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import uuid4

from dpmoe_operator.control.decide import data_namespaces
from dpmoe_operator.control.pods import PodView
from dpmoe_operator.control.views import (
    BlockView,
    JobView,
    Snapshot,
    WorkloadView,
    stop_was_observed,
)
from dpmoe_operator.launch.launching import JOB_NAME, JOB_NAMESPACE, JOB_UID, workload_name
from dpmoe_operator.ledger.fold import LedgerState
from dpmoe_trainer.contract import JobReference, Progress

Object = dict[str, Any]
Listed = tuple[list[Object], str]
"""Objects, and the resource version of the state of the storage that they are from."""


@dataclass(frozen=True)
class _SeenPod:
    """A pod as last seen, its resource version, and the uid of the Job that controls it."""

    namespace: str
    view: PodView
    version: int
    owner: str | None


class Rewound(RuntimeError):
    """The cluster went back in time. Only a new process, which lists everything, sees it right."""


class Picture:
    """Blocks, jobs, workloads and pods by uid.

    Attributes:
        changed: set whenever something happened that a round should look at.
    """

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.prepared: set[str] = set()
        self.marked: set[str] = set()
        self.launch_errors: dict[str, str] = {}
        self.progress: dict[str, Progress] = {}
        self._blocks: dict[str, BlockView] = {}
        self._jobs: dict[str, JobView] = {}
        self._gone: set[str] = set()
        self._workloads: dict[str, Object] = {}
        self._pods: dict[str, dict[str, _SeenPod]] = {}
        self._pod_objects: dict[str, Object] = {}
        self._told: dict[str, int] = {}
        self._confirmed: dict[str, tuple[str, int]] = {}
        self._watches: dict[str, str] = {}
        self._watched: dict[str, tuple[str, str]] = {}
        self._stopped: dict[str, int] = {}
        self._listed = 0

    def put_block(self, manifest: Object) -> None:
        """A PrivateBlock was seen."""
        self._put(self._blocks, BlockView.of(manifest, self._blocks.get(_uid(manifest))))

    def put_job(self, manifest: Object) -> None:
        """A DPMoEJob was seen."""
        self._put(self._jobs, JobView.of(manifest, self._jobs.get(_uid(manifest))))

    def drop_block(self, uid: str) -> None:
        """A PrivateBlock was deleted."""
        self._gone.add(uid)
        if self._blocks.pop(uid, None) is not None:
            self.changed.set()

    def drop_job(self, uid: str) -> None:
        """A DPMoEJob was deleted."""
        self._gone.add(uid)
        if self._jobs.pop(uid, None) is not None:
            self.changed.set()

    def replace_all(self, blocks: Listed, jobs: Listed) -> None:
        """Take over two fresh lists, one call after the other: what is not in them is gone.

        Not so what was created after the list; nor is what was deleted after it there again.

        Raises:
            Rewound: the lists are older than what was seen before.
        """
        version = int(blocks[1] or 0)
        if version < self._listed:
            raise Rewound(
                f"the API server's history went back from {self._listed} to {version}, as after a"
                " restored backup: nothing that was seen before can be relied on"
            )
        self._listed = version
        for uid in _missing(self._blocks, blocks):
            self.drop_block(uid)
        for uid in _missing(self._jobs, jobs):
            self.drop_job(uid)
        for block in blocks[0]:
            self.put_block(block)
        for job in jobs[0]:
            self.put_job(job)
        self._gone.clear()

    def on_workload(self, event: str, manifest: Object) -> None:
        """A Kubernetes Job of ours was added, modified or deleted."""
        job_uid = _job_of(manifest)
        if job_uid is None:
            return
        known = self._workloads.get(job_uid)
        same = known is not None and known["metadata"]["uid"] == manifest["metadata"]["uid"]
        if event == "DELETED":
            if same:
                del self._workloads[job_uid]
                self.prepared.discard(job_uid)
        elif known is None or not same or _version(known) < _version(manifest):
            self._note_stop(job_uid, known if same else None, manifest)
            self._workloads[job_uid] = manifest
        self.changed.set()

    def _note_stop(self, job_uid: str, known: Object | None, manifest: Object) -> None:
        """Remember for which generation of a Job its controller was seen to have stopped it."""
        stopped = self._stopped.pop(job_uid, None)
        if known is not None:
            already = stopped == known["metadata"].get("generation")
            if stop_was_observed(known, manifest, already=already):
                self._stopped[job_uid] = manifest["metadata"].get("generation")

    def on_watched(self, job_uid: str, manifest: Object, watch: str | None) -> None:
        """A Job was written to that had no pod before that watch of pods, if one is named."""
        if watch is not None:
            self._watched[job_uid] = manifest["metadata"]["uid"], watch

    def on_pod(self, event: str, manifest: Object) -> None:
        """A pod of ours was added, modified or deleted.

        The last object of a deleted pod is its last word only if the watch delivered it: after a
        gap it is the version known before, and then nothing is proven by it.
        """
        meta = manifest["metadata"]
        job_uid = meta.get("labels", {}).get(JOB_UID)
        if job_uid is None:
            return
        pods = self._pods.setdefault(job_uid, {})
        version = _version(manifest)
        known = pods.get(meta["uid"])
        earlier = known.view if known else None
        view = PodView.of(manifest, gone=event == "DELETED").following(earlier)
        if event == "DELETED":
            self._pod_objects.pop(meta["uid"], None)
            if known is not None and known.version >= version:
                view = replace(view, may_have_started=True, witnessed=False)
        elif known is not None and (known.view.gone or known.version > version):
            return
        else:
            self._pod_objects[meta["uid"]] = manifest
        owners = [ref["uid"] for ref in meta.get("ownerReferences") or [] if ref.get("controller")]
        owner = owners[0] if owners else None
        pods[meta["uid"]] = _SeenPod(meta["namespace"], view, version, owner)
        self.changed.set()

    def on_pods_told(self, namespace: str, version: str, listed: bool) -> None:
        """The watch of a namespace's pods has come to a version.

        By a list, it may have skipped pods that came and went, and any of the pods that are over
        may have been followed by one of them. It counts as another watch then.
        """
        self._told[namespace] = int(version or 0)
        if not listed:
            return
        self._watches[namespace] = uuid4().hex
        for pods in self._pods.values():
            for uid, pod in pods.items():
                if pod.namespace == namespace and not pod.view.alive:
                    pods[uid] = replace(pod, view=replace(pod.view, witnessed=False))

    def confirm_pods(
        self, workload: WorkloadView, manifests: Iterable[Object], version: str
    ) -> None:
        """All pods of a Job that is over, as the server has them now, and the list's version.

        They are not confirmed for what the Job was since, or will be: it may have gone on.
        """
        for manifest in manifests:
            self.on_pod("MODIFIED", manifest)
        uid = workload.meta.labels[JOB_UID]
        self._confirmed[uid] = workload.meta.resource_version, int(version or 0)

    def running_pods(self) -> list[tuple[str, Object]]:
        """Rank-0 pods that run, with the uid of their DPMoEJob."""
        return [
            (manifest["metadata"]["labels"][JOB_UID], manifest)
            for manifest in self._pod_objects.values()
            if PodView.of(manifest).index == 0 and PodView.of(manifest).running
        ]

    def unconfirmed(self, ledger: LedgerState) -> list[WorkloadView]:
        """Workloads that are over, unsettled, and whose pods were not read since they ended."""
        return [
            view
            for uid, view in self._workload_views().items()
            if view.over
            and not view.confirmed
            and (grant := ledger.grants.get(uid)) is not None
            and grant.settled is None
        ]

    def data_namespaces(self, ledger: LedgerState) -> set[str]:
        """Namespaces in which launched objects may be."""
        blocks = self._blocks.values()
        places = {block.meta.namespace for block in blocks}
        for grant in ledger.grants.values():
            if grant.settled is None:
                places |= data_namespaces(ledger, grant, self._jobs, blocks)
        return places

    def job_uids(self) -> set[str]:
        """Uids of all DPMoEJobs."""
        return set(self._jobs)

    def pod_owners(self) -> list[str]:
        """Uids of the DPMoEJobs of all pods that are remembered."""
        return list(self._pods)

    def forget_pods_of(self, job_uids: Iterable[str]) -> None:
        """Pods of jobs that are settled and gone prove nothing any more."""
        for uid in job_uids:
            self._pods.pop(uid, None)
            self._confirmed.pop(uid, None)
            self._watched.pop(uid, None)
            self._stopped.pop(uid, None)
            self.marked.discard(uid)
            self.progress.pop(uid, None)
            self.launch_errors.pop(uid, None)

    def snapshot(
        self, ledger: LedgerState, now: datetime, unserved: Mapping[str, str] | None = None
    ) -> Snapshot:
        """Everything a round may look at, as it is now."""
        return Snapshot(
            blocks={view.meta.key: view for view in self._blocks.values()},
            jobs=dict(self._jobs),
            workloads=self._workload_views(),
            ledger=ledger,
            now=now,
            prepared=frozenset(self.prepared),
            marked=frozenset(self.marked),
            launch_errors=dict(self.launch_errors),
            progress=dict(self.progress),
            unserved=unserved or {},
        )

    def _workload_views(self) -> Mapping[str, WorkloadView]:
        return {uid: self._workload_view(uid, each) for uid, each in self._workloads.items()}

    def _workload_view(self, uid: str, manifest: Object) -> WorkloadView:
        meta = manifest["metadata"]
        pods = self._pods.get(uid, {}).values()
        job_version, version = self._confirmed.get(uid, (None, 0))
        confirmed = job_version == meta["resourceVersion"]
        watch = self._watches.get(meta["namespace"])
        return WorkloadView.of(
            manifest,
            tuple(pod.view for pod in pods if pod.owner == meta["uid"]),
            confirmed=confirmed,
            caught_up=confirmed and self._told.get(meta["namespace"], -1) >= version,
            watch=watch,
            watched=watch is not None and self._watched.get(uid) == (meta["uid"], watch),
            stop_observed=uid in self._stopped,
        )

    def _put(self, views: dict[str, Any], view: BlockView | JobView) -> None:
        known = views.get(view.meta.uid)
        if view.meta.uid in self._gone:
            return
        if known is not None and int(known.meta.resource_version or 0) > int(
            view.meta.resource_version or 0
        ):
            return
        views[view.meta.uid] = view
        if known is None or _decisive(known) != _decisive(view):
            self.changed.set()


def _uid(manifest: Object) -> str:
    return str(manifest["metadata"]["uid"])


def _job_of(manifest: Object) -> str | None:
    """Uid of the DPMoEJob that a Kubernetes Job runs; None where its name is not the one we give.

    Somebody may copy our labels onto another Job; it is not the one that the ledger launched.
    """
    meta = manifest["metadata"]
    labels = meta.get("labels") or {}
    try:
        job = JobReference(
            namespace=labels[JOB_NAMESPACE], name=labels[JOB_NAME], uid=labels[JOB_UID]
        )
    except (KeyError, ValueError):
        return None
    return job.uid if meta["name"] == workload_name(job) else None


def _missing(views: Mapping[str, BlockView | JobView], listed: Listed) -> list[str]:
    """Uids of views that a list does not show, though it is no older than they are."""
    objects, version = listed
    present = {each["metadata"]["uid"] for each in objects}
    return [
        uid
        for uid, view in views.items()
        if uid not in present and int(view.meta.resource_version or 0) <= int(version or 0)
    ]


def _version(manifest: Object) -> int:
    """Resource versions grow as numbers, which Kubernetes guarantees since 1.35."""
    return int(manifest["metadata"].get("resourceVersion") or 0)


def _decisive(view: BlockView | JobView) -> tuple[object, ...]:
    """What of an object makes a round necessary: everything but its status."""
    return view.meta.generation, tuple(sorted(view.meta.labels.items()))
