"""A tiny cluster around the real decisions: what is true, whoever knows it.

`Cluster` holds objects, the Job controller, a kubelet, and trainers that take steps.
"""

from collections.abc import Mapping
from copy import deepcopy
from datetime import datetime
from typing import Any

from tests.builders import NOW, OWNER, MemoryStore, Object, merged, metadata, run
from tests.control.workloads import (
    CREATING,
    NEVER_FOUND,
    RUNNING,
    SCHEDULED,
    UNSCHEDULED,
    ended,
    pod,
    report,
)

from dpmoe_operator.api.crd import structural_schema
from dpmoe_operator.api.dpmoejob import DPMoEJobStatus
from dpmoe_operator.api.privateblock import PrivateBlockStatus
from dpmoe_operator.control.actions import SetStatus
from dpmoe_operator.control.pods import INDEX_DISRUPTIONS, INDEX_FAILURES, TRACKING
from dpmoe_operator.control.times import format_time
from dpmoe_operator.launch.launching import JOB_UID, Launch
from dpmoe_operator.launch.manifests import build_job
from dpmoe_operator.ledger.fold import LedgerState
from dpmoe_operator.local.apiserver.job_policies import failure_action
from dpmoe_operator.local.apiserver.schema import prune_object, validate
from dpmoe_trainer.contract import FINAL_CODES, Outcome, TrainingPlan

STATUS_SCHEMAS = {
    "privateblocks": structural_schema(PrivateBlockStatus),
    "dpmoejobs": structural_schema(DPMoEJobStatus),
}
FINISHED = ("Complete", "Failed")

Event = tuple[str, str, Object]
"""Kind, event type, object."""


class Cluster:
    """Everything that is true, whether the operator knows it or not.

    Attributes:
        steps: steps that trainers of a DPMoEJob really took, over all of its pods.
        journals: by DPMoEJob, the pods that ever started, as its checkpoint volume knows them.
        told: by Kubernetes Job, the counts of failures that its next pod is told.
        version: of the last write.
        refuse_pods: no pod can be created, for a quota or a class that is not there.
        pending: events that the operator's watches have not brought yet.
    """

    def __init__(self) -> None:
        self.now: datetime = NOW
        self.blocks: dict[str, Object] = {}
        self.jobs: dict[str, Object] = {}
        self.workloads: dict[str, Object] = {}
        self.pods: dict[str, Object] = {}
        self.plans: dict[str, TrainingPlan] = {}
        self.steps: dict[str, int] = {}
        self.journals: dict[str, list[str]] = {}
        self.told: dict[str, dict[str, int]] = {}
        self.refuse_pods = False
        self.store = MemoryStore()
        self.pending: list[Event] = []
        self.version = 100
        self._truth = LedgerState()

    @property
    def ledger(self) -> LedgerState:
        """The fold of the log; raises `LedgerError` if it breaks a rule."""
        for manifest in run(self.store.entries())[self._truth.sequence :]:
            self._truth.apply(manifest)
        return self._truth

    def lose_entries(self, keep: int = 0) -> None:
        """The log ends after its first entries, as one from an older backup does."""
        for name in sorted(self.store.log)[keep:]:
            del self.store.log[name]
        self._truth = LedgerState()

    def changed(self, kind: str, event: str, manifest: Object) -> None:
        """A write: a new resource version, and an event for whoever watches."""
        self.version += 1
        manifest["metadata"]["resourceVersion"] = str(self.version)
        self.pending.append((kind, event, deepcopy(manifest)))

    # What people do

    def apply(self, manifest: Object) -> str:
        """Create a block or a job, or change the spec of the one with that uid; its uid."""
        kind = "block" if manifest["kind"] == "PrivateBlock" else "job"
        known = self.of(kind)
        uid: str = manifest["metadata"]["uid"]
        if uid in known:
            stored = known[uid]
            stored["spec"] = deepcopy(manifest["spec"])
            stored["metadata"]["generation"] += 1
        else:
            stored = known[uid] = deepcopy(manifest)
        self.changed(kind, "MODIFIED", stored)
        return uid

    def edit(self, uid: str, **spec: Any) -> None:
        """Change some fields of a block's or job's spec."""
        stored = self.blocks.get(uid) or self.jobs[uid]
        self.apply(stored | {"spec": merged(stored["spec"], spec)})

    def delete(self, kind: str, uid: str) -> None:
        """Delete a block, a job, or a workload by hand."""
        gone = self.of(kind).pop(uid, None)
        if gone is None:
            return
        self.changed(kind, "DELETED", gone)
        if kind == "workload":
            for name in self.pods_of(uid):
                self.vanish(name)

    def of(self, kind: str) -> dict[str, Object]:
        """All objects of a kind by uid."""
        return {"block": self.blocks, "job": self.jobs, "workload": self.workloads}[kind]

    # Kubernetes Jobs

    def workload_of(self, job_uid: str) -> Object | None:
        """The Kubernetes Job that runs a DPMoEJob."""
        return next(
            (w for w in self.workloads.values() if w["metadata"]["labels"][JOB_UID] == job_uid),
            None,
        )

    def pods_of(self, workload_uid: str) -> list[str]:
        """Uids of a workload's pods."""
        return [
            uid
            for uid, each in self.pods.items()
            if each["metadata"]["ownerReferences"][0]["uid"] == workload_uid
        ]

    def create_workload(self, launch: Launch) -> Object:
        """Create the suspended Job, or find the one that is there."""
        known = self.workload_of(launch.job.uid)
        if known is not None:
            return deepcopy(known)
        manifest = build_job(launch)
        uid = f"workload-{self.version}"
        manifest["metadata"] = metadata(
            manifest["metadata"]["name"],
            OWNER,
            uid,
            labels=manifest["metadata"]["labels"],
            annotations={},
        )
        manifest["status"] = {}
        self.plans[launch.job.uid] = TrainingPlan.model_validate_json(launch.plan_json)
        self.workloads[uid] = manifest
        self.changed("workload", "ADDED", manifest)
        return deepcopy(manifest)

    def suspend(self, workload_uid: str, *, suspend: bool = True) -> None:
        """Change a workload's `suspend`, as others may, Kueue for one."""
        self.patch_workload(workload_uid, {"spec": {"suspend": suspend}})

    def patch_workload(self, workload_uid: str, patch: Object) -> Object:
        """Merge a patch into a workload; a change of its spec is a new generation."""
        manifest = self.workloads[workload_uid]
        for kind in ("annotations", "labels"):
            values = manifest["metadata"][kind]
            for key, value in patch.get("metadata", {}).get(kind, {}).items():
                if value is None:
                    values.pop(key, None)
                else:
                    values[key] = value
        spec = manifest["spec"] | patch.get("spec", {})
        manifest["metadata"]["generation"] += spec != manifest["spec"]
        manifest["spec"] = spec
        self.changed("workload", "MODIFIED", manifest)
        return deepcopy(manifest)

    def job_controller(self) -> None:
        """Bring every Job's pods and status to what its spec says, as kube-controller-manager."""
        for uid, manifest in self.workloads.items():
            before = deepcopy(manifest["status"])
            if not any(_has(before, kind) for kind in FINISHED):
                manifest["status"] = self._job_status(uid, manifest)
            if manifest["status"] != before:
                self.changed("workload", "MODIFIED", manifest)

    def _job_status(self, uid: str, manifest: Object) -> Object:
        pods = [self.pods[name] for name in self.pods_of(uid)]
        alive = [each for each in pods if not _is_over(each)]
        if manifest["spec"]["suspend"]:
            self.told.pop(uid, None)
            for each in alive:
                self.let_go(each)
                self.terminate(each["metadata"]["uid"])
            left = [name for name in self.pods_of(uid) if not _is_over(self.pods[name])]
            kept = {k: v for k, v in manifest["status"].items() if k == "failed"}
            return {"terminating": len(left), "conditions": [_condition("Suspended")], **kept}
        if _restarts(manifest):
            return self._status_by_index(uid, manifest, pods, alive)
        failed = manifest["status"].get("failed", 0)
        failed += sum(each["status"]["phase"] == "Failed" for each in pods)
        failed += sum("deletionTimestamp" in each["metadata"] for each in alive)
        if any(each["status"]["phase"] == "Succeeded" for each in pods):
            return {"succeeded": 1, "conditions": [_condition("Complete")]}
        if failed:
            # Failed comes once the pods have ended; until then FailureTarget says that it will.
            kind = "FailureTarget" if alive else "Failed"
            return {"failed": failed if not alive else 0, "conditions": [_condition(kind)]}
        if not alive:
            self.create_pod(manifest)
        return {"active": int(not self.refuse_pods), "conditions": []}

    def _status_by_index(
        self, uid: str, manifest: Object, pods: list[Object], alive: list[Object]
    ) -> Object:
        """Failed pods are replaced, but for final exit codes, until there are too many of them."""
        if any(each["status"]["phase"] == "Succeeded" for each in pods):
            return {"succeeded": 1, "conditions": [_condition("Complete")]}
        for each in pods:
            if each["status"]["phase"] == "Failed":
                self._count(manifest, each)
        failed = {"failed": manifest["status"].get("failed", 0)}
        if any(_exit_code(each) in FINAL_CODES for each in pods):
            return {**failed, "conditions": [_condition("Failed")]}
        if self.told.get(uid, {}).get(INDEX_FAILURES, 0) > manifest["spec"]["backoffLimitPerIndex"]:
            return {**failed, "failedIndexes": "0", "conditions": [_condition("Failed")]}
        if not alive:
            self.create_pod(manifest)
        return {**failed, "active": int(not self.refuse_pods), "conditions": []}

    def _count(self, owner: Object, each: Object) -> None:
        """The Job controller counts a failed pod, once."""
        if each.get("counted"):
            return
        each["counted"] = True
        ignored = failure_action(owner, each)[0] == "Ignore"
        key = INDEX_DISRUPTIONS if ignored else INDEX_FAILURES
        told = self.told.setdefault(owner["metadata"]["uid"], {})
        told[key] = told.get(key, 0) + 1
        if not ignored:
            owner["status"]["failed"] = owner["status"].get("failed", 0) + 1

    def create_pod(self, workload: Object) -> None:
        if self.refuse_pods:
            return
        uid = f"pod-{self.version}"
        job_uid, owner = workload["metadata"]["labels"][JOB_UID], workload["metadata"]["uid"]
        self.pods[uid] = pod(UNSCHEDULED, uid=uid, node=None, job_uid=job_uid, owner=owner)
        self.pods[uid]["metadata"]["finalizers"] = [TRACKING]
        self.pods[uid]["metadata"]["labels"] = dict(workload["metadata"]["labels"])
        self.pods[uid]["metadata"]["creationTimestamp"] = format_time(self.now)
        for key, count in self.told.get(owner, {}).items():
            self.pods[uid]["metadata"]["annotations"][key] = str(count)
        self.changed("pod", "ADDED", self.pods[uid])

    def let_go(self, each: Object) -> None:
        """The Job controller will not count how a living pod ends, since it deletes it itself."""
        if "deletionTimestamp" not in each["metadata"] and each["metadata"]["finalizers"]:
            each["metadata"]["finalizers"] = []
            self.changed("pod", "MODIFIED", each)

    # Pods

    def set_pod(self, uid: str, status: Object) -> None:
        """The kubelet's word."""
        each = self.pods[uid]
        each["status"] = deepcopy(status)
        if status is not UNSCHEDULED:
            each["spec"]["nodeName"] = "node-1"
        self.changed("pod", "MODIFIED", each)

    def advance(self, uid: str) -> None:
        """One step of a pod's way from its creation to a running trainer."""
        phase = self.pods[uid]["status"]
        if phase == UNSCHEDULED:
            self.set_pod(uid, SCHEDULED)
        elif phase == SCHEDULED:
            self.set_pod(uid, CREATING)
        elif phase == CREATING:
            job_uid, plan = self._plan_of(uid)
            if plan.checkpoint is not None:
                self.journals.setdefault(job_uid, []).append(uid)
                self.pods[uid]["steps"] = self.steps.get(job_uid, 0)
            self.set_pod(uid, RUNNING)

    def train(self, uid: str, steps: int = 1) -> None:
        """Let a running trainer take steps, never more than its plan has."""
        job_uid, plan = self._plan_of(uid)
        taken = min(self.pods[uid].get("steps", 0) + steps, plan.privacy.steps)
        self.steps[job_uid] = self.steps.get(job_uid, 0) + taken - self.pods[uid].get("steps", 0)
        self.pods[uid]["steps"] = taken

    def finish(self, uid: str, *, crash: bool = False) -> None:
        """End a running trainer: with its report, or killed without one."""
        job_uid, plan = self._plan_of(uid)
        taken = self.pods[uid].get("steps", 0)
        done = taken == plan.privacy.steps
        if crash:
            self.set_pod(uid, ended(137))
            return
        privacy = plan.privacy
        message = report(
            plan.digest(),
            job_uid=job_uid,
            outcome=Outcome.COMPLETED if done else Outcome.STOPPED,
            steps=taken,
            noise_multiplier=privacy.noise_multiplier,
            sampling_rate=privacy.sampling_rate,
            clipping_norm=privacy.clipping_norm,
            attempts=tuple(self.journals.get(job_uid, ())),
        )
        self.set_pod(uid, ended(0 if done else 143, message))

    def terminate(self, uid: str) -> None:
        """Ask a pod to end; one without a node goes at once."""
        each = self.pods[uid]
        if each["status"] == UNSCHEDULED:
            self.vanish(uid)
        elif "deletionTimestamp" not in each["metadata"]:
            each["metadata"]["deletionTimestamp"] = "2030-01-01T12:00:00Z"
            self.changed("pod", "MODIFIED", each)

    def kubelet(self) -> None:
        """End every pod that was asked to, and delete it with its last word."""
        for uid, each in list(self.pods.items()):
            if "deletionTimestamp" not in each["metadata"]:
                continue
            if self.is_running(uid):
                self.finish(uid)
            elif not _is_over(each):
                self.set_pod(uid, NEVER_FOUND)
            self.vanish(uid)

    def vanish(self, uid: str) -> None:
        """The pod object goes as it is, and whatever ran is dead."""
        each = self.pods.pop(uid)
        owner = self.workloads.get(each["metadata"]["ownerReferences"][0]["uid"])
        if owner is not None and _restarts(owner):
            if not owner["spec"]["suspend"] and not _finished(owner):
                self._count(owner, each)
        elif owner is not None and not owner["spec"]["suspend"] and not _finished(owner):
            # The Job controller holds a pod back until it has counted its end.
            owner["status"] = {"failed": owner["status"].get("failed", 0) + 1, "conditions": []}
        self.changed("pod", "DELETED", each)

    def is_running(self, uid: str) -> bool:
        """Whether the pod's trainer runs."""
        return bool(self.pods[uid]["status"] == RUNNING)

    def _plan_of(self, pod_uid: str) -> tuple[str, TrainingPlan]:
        job_uid = self.pods[pod_uid]["metadata"]["labels"][JOB_UID]
        return job_uid, self.plans[job_uid]

    # Statuses

    def set_status(self, action: SetStatus) -> Object | None:
        """Merge a status patch, refuse what the schema refuses, drop what it does not know."""
        stored = self.of("block" if action.plural == "privateblocks" else "job").get(action.uid)
        if stored is None:
            return None
        status = dict(stored.get("status") or {})
        for name, value in action.patch.items():
            if value is None:
                status.pop(name, None)
            else:
                status[name] = deepcopy(value)
        schema = {"type": "object", "properties": {"status": STATUS_SCHEMAS[action.plural]}}
        problems = validate(STATUS_SCHEMAS[action.plural], status, "status")
        assert not problems, problems
        pruned, _ = prune_object(schema, {"metadata": {}, "status": status})
        stored["status"] = pruned["status"]
        self.changed("block" if action.plural == "privateblocks" else "job", "MODIFIED", stored)
        return deepcopy(stored)


def _condition(kind: str) -> Object:
    return {"type": kind, "status": "True", "reason": kind, "message": ""}


def _has(status: Mapping[str, Any], kind: str) -> bool:
    return any(condition["type"] == kind for condition in status.get("conditions", []))


def _restarts(workload: Object) -> bool:
    return workload["spec"].get("backoffLimitPerIndex") is not None


def _exit_code(each: Object) -> int | None:
    for container in each["status"].get("containerStatuses", []):
        code: int | None = container["state"].get("terminated", {}).get("exitCode")
        return code
    return None


def _finished(workload: Object) -> bool:
    return any(_has(workload["status"], kind) for kind in FINISHED)


def _is_over(each: Object) -> bool:
    return each["status"]["phase"] in ("Succeeded", "Failed")
