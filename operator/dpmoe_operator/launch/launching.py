"""What the builders need to know of a launch, and what all of its objects are called."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpmoe_operator.api.dpmoejob import DEFAULT_RETRIES, DPMoEJobSpec
from dpmoe_operator.api.privateblock import Table
from dpmoe_trainer.contract import JobReference

Json = dict[str, Any]

MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGER = "dpmoe"
JOB_NAMESPACE = "dpmoe.dev/job-namespace"
JOB_NAME = "dpmoe.dev/job-name"
JOB_UID = "dpmoe.dev/job-uid"
SELECTOR = f"{MANAGED_BY}={MANAGER}"
"""Label selector of everything that the operator launched."""


@dataclass(frozen=True)
class Launch:
    """What the builders need to know.

    Attributes:
        job: the DPMoEJob.
        spec: its spec.
        namespace: the data namespace, where the pods run.
        plan_json: the TrainingPlan, canonical.
        image: the trainer image.
        tables: private and evaluation tables, for their volumes.
        gpu_resource: extended resource name of a GPU.
        storage_cidrs: address ranges that the pods may reach.
        operator_labels: labels of the operator's pods, which poll progress.
        operator_namespace: their namespace.
        user: numeric user and group of the process.
        grace_seconds: how long the process may take from SIGTERM to its end.
        env: variables that the platform team sets, such as NCCL's.
        checkpoints: claim for the run's checkpoints; None where it is never restarted.
        gang: the server's scheduler places groups of pods as a whole or not at all.
    """

    job: JobReference
    spec: DPMoEJobSpec
    namespace: str
    plan_json: str
    image: str
    tables: Sequence[Table]
    gpu_resource: str
    storage_cidrs: Sequence[str]
    operator_labels: Mapping[str, str]
    operator_namespace: str
    user: int
    grace_seconds: int = 60
    env: Sequence[tuple[str, str]] = ()
    checkpoints: str | None = None
    gang: bool = False

    @property
    def retries(self) -> int:
        """How many failures of each index are tried again."""
        asked = self.spec.retries
        return DEFAULT_RETRIES if asked is None else asked


def workload_name(job: JobReference) -> str:
    """Name of a job's objects: readable, unique by uid, short enough for pod host names."""
    suffix = hashlib.sha256(job.uid.encode()).hexdigest()[:10]
    return f"dpj-{job.name[:40].rstrip('-.').replace('.', '-')}-{suffix}"


def labels(job: JobReference) -> dict[str, str]:
    """Labels that name the job: owner references cannot cross namespaces."""
    return {
        MANAGED_BY: MANAGER,
        JOB_NAMESPACE: job.namespace,
        JOB_NAME: job.name[:63].rstrip("-."),
        JOB_UID: job.uid,
    }


def metadata_of(launch: Launch) -> Json:
    """Name, namespace and labels that all objects of a job have."""
    return {
        "name": workload_name(launch.job),
        "namespace": launch.namespace,
        "labels": labels(launch.job),
    }
