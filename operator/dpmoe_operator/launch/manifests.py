"""Builders of everything that runs one granted job, in the namespace of its blocks.

What holds of every pod built here: it runs one container of a trusted image with the image's own
command, as a non-root user with no capability, no API token, a read-only root and no volume but the
claims that the blocks' owner opened; it reaches the job's own pods, DNS and the configured storage.
"""

from collections.abc import Sequence

from dpmoe_operator.api.dpmoejob import DPMoEJobSpec
from dpmoe_operator.api.placement import NodeRequirement
from dpmoe_operator.launch import paths
from dpmoe_operator.launch.launching import (
    JOB_UID,
    Json,
    Launch,
    labels,
    metadata_of,
    workload_name,
)
from dpmoe_operator.launch.volumes import mounts, volumes
from dpmoe_trainer.contract import (
    FINAL_CODES,
    OTHERS_CODES,
    PROGRESS_PORT,
    Environment,
    ExitCode,
    JobReference,
)

RENDEZVOUS_PORT = 29500
CONTAINER = "trainer"


def build_owned(launch: Launch) -> list[Json]:
    """What the Job owns, in the order of creation; the Job comes first, and waits suspended."""
    return [
        build_config_map(launch),
        build_service(launch),
        build_network_policy(launch),
        *([build_pod_group(launch)] if needs_gang(launch) else []),
    ]


def build_config_map(launch: Launch) -> Json:
    """The plan, immutable, mounted read-only."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata_of(launch),
        "immutable": True,
        "data": {paths.PLAN_FILE: launch.plan_json},
    }


def build_service(launch: Launch) -> Json:
    """Headless Service: the pods find each other by name before they are ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata_of(launch),
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
        "metadata": metadata_of(launch),
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


def build_start_mark(job: JobReference, namespace: str) -> Json:
    """The ConfigMap by which later pods of a run know that there was an earlier one."""
    name = _start_mark(workload_name(job))
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace, "labels": labels(job)},
        "immutable": True,
        "data": {"started": "true"},
    }


def _start_mark(workload: str) -> str:
    return f"{workload}-started"


def needs_gang(launch: Launch) -> bool:
    """Whether the pods are placed all together or not at all."""
    return launch.gang and launch.spec.parallelism.workers > 1


def build_pod_group(launch: Launch) -> Json:
    """The gang of the pods (Kubernetes' own, scheduling.k8s.io/v1alpha2).

    Pods that name a group themselves get none from the Job controller, whatever its features are.
    """
    workers = launch.spec.parallelism.workers
    return {
        "apiVersion": "scheduling.k8s.io/v1alpha2",
        "kind": "PodGroup",
        "metadata": metadata_of(launch),
        "spec": {"schedulingPolicy": {"gang": {"minCount": workers}}},
    }


def build_job(launch: Launch) -> Json:
    """The Indexed Job, suspended: it is released once the ledger says that it is launched."""
    workers = launch.spec.parallelism.workers
    deadline = launch.spec.active_deadline_seconds
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata_of(launch),
        "spec": {
            "suspend": True,
            "completionMode": "Indexed",
            "completions": workers,
            "parallelism": workers,
            **_failure_handling(launch),
            # Rank 0 ends last of all that matters; who crashes on the way out changes nothing.
            **({"successPolicy": {"rules": [{"succeededIndexes": "0"}]}} if workers > 1 else {}),
            **({"activeDeadlineSeconds": deadline} if deadline is not None else {}),
            "template": {
                "metadata": {"labels": labels(launch.job)},
                "spec": _pod(launch),
            },
        },
    }


def _failure_handling(launch: Launch) -> Json:
    """Which failed pods are replaced.

    With checkpoints and a journal, as many of each index as the job asks for, once the failed one
    has ended; those that were disrupted do not count, nor those that ended since another one did.
    Without, none: a second attempt would draw a second noise, which the plan did not price.
    """
    if launch.checkpoints is None:
        return {"backoffLimit": 0}
    disrupted = {"type": "DisruptionTarget", "status": "True"}
    return {
        "backoffLimitPerIndex": launch.retries,
        "maxFailedIndexes": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": _ended_with(FINAL_CODES)},
                {"action": "Ignore", "onPodConditions": [disrupted]},
                {"action": "Ignore", "onExitCodes": _ended_with(OTHERS_CODES)},
            ]
        },
    }


def _ended_with(codes: Sequence[ExitCode]) -> Json:
    values = [int(code) for code in codes]
    return {"containerName": CONTAINER, "operator": "In", "values": values}


def _pod(launch: Launch) -> Json:
    placement = launch.spec.placement
    pod: Json = {
        "restartPolicy": "Never",
        "subdomain": workload_name(launch.job),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": launch.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": launch.user,
            "runAsGroup": launch.user,
            "fsGroup": launch.user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(launch)],
        "volumes": volumes(launch),
    }
    if needs_gang(launch):
        pod["schedulingGroup"] = {"podGroupName": workload_name(launch.job)}
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
        "volumeMounts": mounts(launch),
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
    """The platform team's variables, the trainer's, and torchrun's (PET_*) for a static world."""
    name = workload_name(launch.job)
    parallelism = launch.spec.parallelism
    fixed = {
        **dict(launch.env),
        Environment.PLAN: f"{paths.PLAN_FOLDER}/{paths.PLAN_FILE}",
        Environment.TERMINATION_LOG: paths.TERMINATION_LOG,
        Environment.PROGRESS_PORT: str(PROGRESS_PORT),
        "PET_NNODES": str(parallelism.workers),
        "PET_NPROC_PER_NODE": str(parallelism.processes),
        "PET_MASTER_ADDR": f"{name}-0.{name}",
        "PET_MASTER_PORT": str(RENDEZVOUS_PORT),
        "HOME": "/tmp",
    }
    fields = {
        "PET_NODE_RANK": _annotation("job-completion-index"),
        Environment.POD_UID: "metadata.uid",
    }
    if launch.checkpoints is not None:
        fields |= {
            Environment.FAILURES: _annotation("job-index-failure-count"),
            Environment.DISRUPTIONS: _annotation("job-index-ignored-failure-count"),
        }
    return [
        *({"name": str(key), "value": value} for key, value in fixed.items()),
        *(
            {"name": str(key), "valueFrom": {"fieldRef": {"fieldPath": path}}}
            for key, path in fields.items()
        ),
        *([_resumed(name)] if launch.checkpoints is not None else []),
    ]


def _annotation(key: str) -> str:
    return f"metadata.annotations['batch.kubernetes.io/{key}']"


def _resumed(workload: str) -> Json:
    reference = {"name": _start_mark(workload), "key": "started", "optional": True}
    return {"name": str(Environment.RESUMED), "valueFrom": {"configMapKeyRef": reference}}
