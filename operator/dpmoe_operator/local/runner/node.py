"""The Node that stands for this machine, and which pods fit on it, as pure functions."""

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal

from dpmoe_operator.kube.client import Object
from dpmoe_operator.local.runner.quantity import parse, pod_requests
from dpmoe_operator.local.runner.sources import LOCAL_ADDRESS
from dpmoe_operator.local.runner.status import timestamp

GPU = "nvidia.com/gpu"
_UNCOUNTED = "10Ti"
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Capacity:
    """What the node claims to have, as Kubernetes quantities; nothing enforces it.

    Attributes:
        cpu: processors.
        memory: memory.
        gpus: how many `nvidia.com/gpu`, real or not.
        pods: how many pods at a time.
    """

    cpu: str
    memory: str
    gpus: int = 0
    pods: int = 110

    @classmethod
    def of_this_machine(cls, gpus: int = 0) -> "Capacity":
        """All processors and memory of the machine."""
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return cls(cpu=str(os.cpu_count() or 1), memory=f"{pages * size // 1024}Ki", gpus=gpus)

    def resources(self) -> dict[str, str]:
        """As a Node writes it. Disk is not counted, so there is always enough."""
        resources = {
            "cpu": self.cpu,
            "memory": self.memory,
            "ephemeral-storage": _UNCOUNTED,
            "pods": str(self.pods),
        }
        return resources | ({GPU: str(self.gpus)} if self.gpus else {})


def build_node(name: str) -> Object:
    """The Node without its status."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {
                "kubernetes.io/arch": _MACHINES.get(platform.machine(), platform.machine()),
                "kubernetes.io/hostname": name,
                "kubernetes.io/os": platform.system().lower(),
                "dpmoe.dev/emulated": "true",
            },
        },
    }


def build_node_status(capacity: Capacity, ready_since: str, stopped: bool = False) -> Object:
    """The Node's status: ready as long as the runner runs."""
    condition = {
        "type": "Ready",
        "status": "False" if stopped else "True",
        "reason": "RunnerStopped" if stopped else "RunnerReady",
        "message": "emulated node: local processes, no isolation",
        "lastHeartbeatTime": timestamp(),
        "lastTransitionTime": timestamp() if stopped else ready_since,
    }
    return {
        "capacity": capacity.resources(),
        "allocatable": capacity.resources(),
        "conditions": [condition],
        "addresses": [{"type": "InternalIP", "address": LOCAL_ADDRESS}],
    }


def wants_a_node(pod: Object) -> bool:
    """Whether the pod waits for a scheduler, and for the default one."""
    spec = pod["spec"]
    return not (
        spec.get("nodeName")
        or spec.get("schedulingGates")
        or spec.get("schedulerName", "default-scheduler") != "default-scheduler"
        or "deletionTimestamp" in pod["metadata"]
        or has_ended(pod)
    )


def has_ended(pod: Object) -> bool:
    """Whether the pod's phase is one that it never leaves."""
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def why_not(
    pod: Object, labels: Mapping[str, str], capacity: Capacity, others: Iterable[Object]
) -> str | None:
    """Why the pod can't be bound to the node now; `None` where it can.

    Args:
        pod: the pod.
        labels: the node's labels.
        capacity: what the node has.
        others: the pods that are bound to it and have not ended.
    """
    if not _selected(pod["spec"], labels):
        return "1 node(s) didn't match Pod's node affinity/selector"
    used: dict[str, Decimal] = {"pods": Decimal(0)}
    for other in others:
        for name, amount in (pod_requests(other) | {"pods": Decimal(1)}).items():
            used[name] = used.get(name, Decimal(0)) + amount
    available = capacity.resources()
    lacking = [
        f"Insufficient {name}"
        for name, amount in sorted((pod_requests(pod) | {"pods": Decimal(1)}).items())
        if used.get(name, Decimal(0)) + amount > parse(available.get(name, 0))
    ]
    return "1 " + ", 1 ".join(lacking) if lacking else None


def _selected(spec: Object, labels: Mapping[str, str]) -> bool:
    """Whether the node has the labels that the pod's selector and required affinity ask for."""
    selector = spec.get("nodeSelector") or {}
    if any(labels.get(key) != value for key, value in selector.items()):
        return False
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is None:
        return True
    return any(_term_holds(term, labels) for term in required.get("nodeSelectorTerms") or [])


def _term_holds(term: Object, labels: Mapping[str, str]) -> bool:
    expressions = term.get("matchExpressions") or []
    # A term over node fields, or an empty one, chooses no node here.
    if "matchFields" in term or not expressions:
        return False
    return all(_holds(expression, labels) for expression in expressions)


def _holds(expression: Object, labels: Mapping[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values") or []
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt":
            return value is not None and value.isdigit() and int(value) > int(values[0])
        case "Lt":
            return value is not None and value.isdigit() and int(value) < int(values[0])
    raise ValueError(f"unknown operator {expression['operator']!r} in a node affinity")
