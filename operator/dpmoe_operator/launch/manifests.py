"""Builders of everything that runs one granted job, in the namespace of its blocks.

What holds of every pod built here: it runs one container of a trusted image with the image's own
command, as a non-root user with no capability, no API token, a read-only root and no volume but the
claims that the blocks' owner opened; it reaches the job's own pods, DNS and the configured storage.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpmoe_operator.api.dpmoejob import DPMoEJobSpec
from dpmoe_operator.api.placement import NodeRequirement
from dpmoe_operator.api.privateblock import Table
from dpmoe_operator.launch import paths
from dpmoe_trainer.contract import PROGRESS_PORT, Environment, JobReference

Json = dict[str, Any]

MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGER = "dpmoe"
JOB_NAMESPACE = "dpmoe.dev/job-namespace"
JOB_NAME = "dpmoe.dev/job-name"
JOB_UID = "dpmoe.dev/job-uid"
SELECTOR = f"{MANAGED_BY}={MANAGER}"
"""Label selector of everything that the operator launched."""

RENDEZVOUS_PORT = 29500
CONTAINER = "trainer"


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


def workload_name(job: JobReference) -> str:
    """Name of a job's objects: readable, unique by uid, short enough for pod host names."""
    suffix = hashlib.sha256(job.uid.encode()).hexdigest()[:10]
    return f"dpj-{job.name[:40].rstrip('-.').replace('.', '-')}-{suffix}"


def build_all(launch: Launch) -> list[Json]:
    """The manifests of a granted job, in the order in which they are created, the Job last."""
    return [
        build_config_map(launch),
        build_service(launch),
        build_network_policy(launch),
        build_job(launch),
    ]


def labels(job: JobReference) -> dict[str, str]:
    """Labels that name the job: owner references cannot cross namespaces."""
    return {
        MANAGED_BY: MANAGER,
        JOB_NAMESPACE: job.namespace,
        JOB_NAME: job.name[:63].rstrip("-."),
        JOB_UID: job.uid,
    }


def build_config_map(launch: Launch) -> Json:
    """The plan, immutable, mounted read-only."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(launch),
        "immutable": True,
        "data": {paths.PLAN_FILE: launch.plan_json},
    }


def build_service(launch: Launch) -> Json:
    """Headless Service: the pods find each other by name before they are ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(launch),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {JOB_UID: launch.job.uid},
            "ports": [
                {"name": "rendezvous", "port": RENDEZVOUS_PORT},
                {"name": "progress", "port": PROGRESS_PORT},
            ],
        },
    }


def build_network_policy(launch: Launch) -> Json:
    """In: the job's own pods and the operator's polling. Out: own pods, DNS, storage."""
    own_pods = {"podSelector": {"matchLabels": {JOB_UID: launch.job.uid}}}
    operator = {
        "namespaceSelector": {
            "matchLabels": {"kubernetes.io/metadata.name": launch.operator_namespace}
        },
        "podSelector": {"matchLabels": dict(launch.operator_labels)},
    }
    dns = {
        "to": [
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}
        ],
        "ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}],
    }
    storage = [{"ipBlock": {"cidr": cidr}} for cidr in launch.storage_cidrs]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(launch),
        "spec": {
            "podSelector": {"matchLabels": {JOB_UID: launch.job.uid}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [own_pods]},
                {"from": [operator], "ports": [{"protocol": "TCP", "port": PROGRESS_PORT}]},
            ],
            "egress": [{"to": [own_pods]}, dns, *([{"to": storage}] if storage else [])],
        },
    }


def build_job(launch: Launch) -> Json:
    """The Indexed Job, suspended: it is released once the ledger says that it is launched.

    A failed pod is not replaced: a second attempt would draw a second noise, which the plan did not
    price.
    """
    workers = launch.spec.parallelism.workers
    deadline = launch.spec.active_deadline_seconds
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(launch),
        "spec": {
            "suspend": True,
            "completionMode": "Indexed",
            "completions": workers,
            "parallelism": workers,
            "backoffLimit": 0,
            **({"activeDeadlineSeconds": deadline} if deadline is not None else {}),
            "template": {
                "metadata": {"labels": labels(launch.job)},
                "spec": _pod(launch),
            },
        },
    }


def _metadata(launch: Launch) -> Json:
    return {
        "name": workload_name(launch.job),
        "namespace": launch.namespace,
        "labels": labels(launch.job),
    }


def _pod(launch: Launch) -> Json:
    placement = launch.spec.placement
    pod: Json = {
        "restartPolicy": "Never",
        "subdomain": workload_name(launch.job),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 60,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": launch.user,
            "runAsGroup": launch.user,
            "fsGroup": launch.user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(launch)],
        "volumes": _volumes(launch),
    }
    if placement.node_selector:
        pod["nodeSelector"] = dict(placement.node_selector)
    if placement.tolerations:
        pod["tolerations"] = [toleration.to_object() for toleration in placement.tolerations]
    if placement.required_nodes or placement.preferred_nodes:
        pod["affinity"] = {"nodeAffinity": _node_affinity(launch.spec)}
    if placement.priority_class_name is not None:
        pod["priorityClassName"] = placement.priority_class_name
    if placement.runtime_class_name is not None:
        pod["runtimeClassName"] = placement.runtime_class_name
    return pod


def _node_affinity(spec: DPMoEJobSpec) -> Json:
    def term(requirements: Sequence[NodeRequirement]) -> Json:
        return {"matchExpressions": [requirement.to_object() for requirement in requirements]}

    affinity: Json = {}
    if spec.placement.required_nodes:
        affinity["requiredDuringSchedulingIgnoredDuringExecution"] = {
            "nodeSelectorTerms": [term(spec.placement.required_nodes)]
        }
    if spec.placement.preferred_nodes:
        affinity["preferredDuringSchedulingIgnoredDuringExecution"] = [
            {"weight": 1, "preference": term(spec.placement.preferred_nodes)}
        ]
    return affinity


def _container(launch: Launch) -> Json:
    resources = _resources(launch)
    return {
        "name": CONTAINER,
        "image": launch.image,
        "env": _environment(launch),
        "ports": [{"name": "progress", "containerPort": PROGRESS_PORT}],
        **({"resources": {"requests": resources, "limits": resources}} if resources else {}),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": paths.TERMINATION_LOG,
        "terminationMessagePolicy": "File",
        "volumeMounts": _mounts(launch),
    }


def _resources(launch: Launch) -> dict[str, str]:
    asked = launch.spec.resources
    resources = {
        "cpu": asked.cpu,
        "memory": asked.memory,
        "ephemeral-storage": asked.ephemeral_storage,
        launch.gpu_resource: str(launch.spec.parallelism.gpus_per_worker)
        if launch.spec.parallelism.gpus_per_worker
        else None,
    }
    return {name: quantity for name, quantity in resources.items() if quantity is not None}


def _environment(launch: Launch) -> list[Json]:
    """The trainer's own variables and torchrun's (PET_*), with a static world size."""
    name = workload_name(launch.job)
    processes = max(1, launch.spec.parallelism.gpus_per_worker)
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    fixed = {
        Environment.PLAN: f"{paths.PLAN_FOLDER}/{paths.PLAN_FILE}",
        Environment.TERMINATION_LOG: paths.TERMINATION_LOG,
        Environment.PROGRESS_PORT: str(PROGRESS_PORT),
        "PET_NNODES": str(launch.spec.parallelism.workers),
        "PET_NPROC_PER_NODE": str(processes),
        "PET_MASTER_ADDR": f"{name}-0.{name}",
        "PET_MASTER_PORT": str(RENDEZVOUS_PORT),
        "HOME": "/tmp",
    }
    return [
        *({"name": str(key), "value": value} for key, value in fixed.items()),
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]


def _read_only_claims(launch: Launch) -> list[str]:
    claims = {table.claim.claim_name for table in launch.tables if table.claim is not None}
    if launch.spec.model.claim is not None:
        claims.add(launch.spec.model.claim.claim_name)
    return sorted(claims)


def _host_paths(launch: Launch) -> list[str]:
    return sorted({table.path for table in launch.tables if table.path is not None})


def _volumes(launch: Launch) -> list[Json]:
    output = launch.spec.output.claim
    return [
        {"name": "plan", "configMap": {"name": workload_name(launch.job)}},
        {"name": "scratch", "emptyDir": {}},
        {
            "name": "shared-memory",
            "emptyDir": {"medium": "Memory", "sizeLimit": launch.spec.resources.shared_memory},
        },
        *(
            {
                "name": f"claim-{i}",
                "persistentVolumeClaim": {"claimName": claim, "readOnly": True},
            }
            for i, claim in enumerate(_read_only_claims(launch))
        ),
        *(
            {"name": f"host-{i}", "hostPath": {"path": path}}
            for i, path in enumerate(_host_paths(launch))
        ),
        *(
            [{"name": "output", "persistentVolumeClaim": {"claimName": output.claim_name}}]
            if output is not None
            else []
        ),
    ]


def _mounts(launch: Launch) -> list[Json]:
    output = launch.spec.output.claim
    return [
        {"name": "plan", "mountPath": paths.PLAN_FOLDER, "readOnly": True},
        {"name": "scratch", "mountPath": "/tmp"},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        *(
            {
                "name": f"claim-{i}",
                "mountPath": f"{paths.READ_ONLY_CLAIMS}/{claim}",
                "readOnly": True,
            }
            for i, claim in enumerate(_read_only_claims(launch))
        ),
        *(
            {"name": f"host-{i}", "mountPath": path, "readOnly": True}
            for i, path in enumerate(_host_paths(launch))
        ),
        *(
            [{"name": "output", "mountPath": f"{paths.OUTPUT_CLAIMS}/{output.claim_name}"}]
            if output is not None
            else []
        ),
    ]
