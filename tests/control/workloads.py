"""Kubernetes Jobs and pods as an API server stores them, in every state that a trainer's can have.

The states were read off a real kubelet and Job controller (Kubernetes 1.36).
"""

from collections.abc import Mapping
from typing import Any

from tests.builders import OWNER, TEAM, Object, metadata

from dpmoe_operator.control.pods import COMPLETION_INDEX, PodView
from dpmoe_operator.control.views import CANCELLED, RELEASED
from dpmoe_operator.launch.launching import labels, workload_name
from dpmoe_trainer.contract import JobReference, Mechanism, Outcome, TrainingReport

RUNTIME_ID = "containerd://1"
SINCE = "2030-01-01T12:00:00Z"


def workload(
    job_uid: str = "job-1",
    *,
    uid: str = "workload-1",
    suspend: bool = False,
    released: bool = True,
    cancelled: bool = False,
    conditions: Mapping[str, str] | None = None,
    **status: Any,
) -> Object:
    """A Kubernetes Job; `conditions` maps those that are true to their reasons."""
    job = JobReference(namespace=TEAM, name="train", uid=job_uid)
    marks = {RELEASED: SINCE} if released else {}
    marks |= {CANCELLED: SINCE} if cancelled else {}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(
            workload_name(job),
            OWNER,
            uid,
            labels=labels(job),
            annotations=marks,
            generation=1 + (released or not suspend) + (released and suspend),
        ),
        "spec": {"suspend": suspend},
        "status": {
            **status,
            "conditions": [
                {"type": kind, "status": "True", "reason": reason, "message": ""}
                for kind, reason in (conditions or {}).items()
            ],
        },
    }


def pod(
    status: Object | None = None,
    *,
    uid: str = "pod-1",
    node: str | None = "node-1",
    index: str | None = "0",
    job_uid: str = "job-1",
    owner: str = "workload-1",
    version: int = 1,
) -> Object:
    """A trainer pod of a Job, in one of the states below."""
    job = JobReference(namespace=TEAM, name="train", uid=job_uid)
    meta = metadata(uid, OWNER, uid, resourceVersion=str(version), labels=labels(job))
    if index is not None:
        meta["annotations"] = {COMPLETION_INDEX: index}
    meta["ownerReferences"] = [{"kind": "Job", "name": "j", "uid": owner, "controller": True}]
    spec = {"nodeName": node} if node else {}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec, "status": status}


def container(state: Object, **fields: Any) -> Object:
    return {"name": "trainer", "state": state, "lastState": {}, "restartCount": 0, **fields}


UNSCHEDULED: Object = {
    "phase": "Pending",
    "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}],
}
NO_NODE: Object = {
    "phase": "Pending",
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/1 nodes are available",
        }
    ],
}
SCHEDULED: Object = {"phase": "Pending"}
CREATING: Object = {
    "phase": "Pending",
    "containerStatuses": [container({"waiting": {"reason": "ContainerCreating"}})],
}
NO_IMAGE: Object = {
    "phase": "Pending",
    "containerStatuses": [
        container({"waiting": {"reason": "ErrImagePull", "message": "no such image"}})
    ],
}
RUNNING: Object = {
    "phase": "Running",
    "containerStatuses": [
        container({"running": {"startedAt": SINCE}}, containerID=RUNTIME_ID, started=True)
    ],
}
NEVER_FOUND: Object = {
    "phase": "Failed",
    "containerStatuses": [
        container(
            {
                "terminated": {
                    "exitCode": 137,
                    "reason": "ContainerStatusUnknown",
                    "message": "The container could not be located when the pod was terminated",
                    "startedAt": None,
                    "finishedAt": None,
                }
            }
        )
    ],
}
"""The kubelet's last word on a pod that was deleted before its container started."""
REJECTED: Object = {
    "phase": "Failed",
    "reason": "UnexpectedAdmissionError",
    "message": "Pod was rejected: Allocate failed due to no healthy devices present",
    "startTime": SINCE,
}
"""The kubelet's word on a pod that it does not admit."""


def disrupted(state: Object, reason: str = "EvictionByEvictionAPI") -> Object:
    """A state of a pod that is drained, preempted or given up with its node."""
    condition = {"type": "DisruptionTarget", "status": "True", "reason": reason}
    return state | {"conditions": [*state.get("conditions", []), condition]}


def ended(exit_code: int, message: str | None = None, *, reason: str | None = None) -> Object:
    """The trainer ran and ended."""
    terminated: Object = {
        "exitCode": exit_code,
        "reason": reason or ("Completed" if exit_code == 0 else "Error"),
        "startedAt": SINCE,
        "finishedAt": SINCE,
        "containerID": RUNTIME_ID,
    }
    if message is not None:
        terminated["message"] = message
    return {
        "phase": "Succeeded" if exit_code == 0 else "Failed",
        "containerStatuses": [container({"terminated": terminated})],
    }


def history(*states: Object, gone: bool = True, **fields: Any) -> PodView:
    """How an operator that watched a pod from its creation on sees it after its last state."""
    view: PodView | None = None
    for number, state in enumerate(states):
        last = number == len(states) - 1
        unbound = state is UNSCHEDULED
        manifest = pod(state, **{"node": None if unbound else "node-1"} | fields)
        view = PodView.of(manifest, gone=gone and last).following(view)
    assert view is not None
    return view


def report(
    plan_digest: str = "0" * 64,
    *,
    job_uid: str = "job-1",
    outcome: Outcome = Outcome.COMPLETED,
    steps: int = 100,
    noise_multiplier: float = 1.0,
    sampling_rate: float = 0.01,
    clipping_norm: float = 1.0,
    **fields: Any,
) -> str:
    """A termination message. By default it answers `builders.granted()`."""
    return TrainingReport(
        job=JobReference(namespace=TEAM, name="train", uid=job_uid),
        plan_digest=plan_digest,
        outcome=outcome,
        mechanism=Mechanism(
            noise_multiplier=noise_multiplier,
            sampling_rate=sampling_rate,
            clipping_norm=clipping_norm,
            steps=steps,
        ),
        epsilon=1.0,
        **fields,
    ).to_json()
