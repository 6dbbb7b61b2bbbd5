"""The helm program and rendered charts."""

from typing import Any

import pytest
from tests.chart.helm import Helm, Manifest, kubernetes_binary

FULL: dict[str, Any] = {
    "dataNamespaces": ["clinic-data", "shop-data"],
    "image": {
        "repository": "registry.example:5000/dpmoe/operator",
        "digest": f"sha256:{'a' * 64}",
        "pullPolicy": "Always",
    },
    "imagePullSecrets": ["registry"],
    "trainer": {
        "image": {"repository": "registry.example/trainer", "tag": "1.2", "digest": ""},
        "gpuResource": "amd.com/gpu",
        "storageCidrs": ["10.1.0.0/16", "fd00::/8"],
        "hostPaths": ["/srv/data", "/mnt/reviews"],
        "env": {"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"},
        "terminationGracePeriodSeconds": 300,
        "startTimeoutSeconds": 600,
        "gangs": False,
    },
    "scheduling": {
        "policy": "fcfs",
        "fairness": 0.25,
        "foresightSeconds": 86400,
        "roundSeconds": 0.5,
    },
    "anchor": {"size": "10Gi", "storageClassName": "fast"},
    "resources": {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "control", "operator": "Exists", "effect": "NoSchedule"}],
    "priorityClassName": "system-cluster-critical",
    "networkPolicy": {"enabled": True, "apiServerCidrs": ["10.0.0.1/32"], "apiServerPorts": [6443]},
    "podDisruptionBudget": {"enabled": True},
}
"""Every value that the chart knows, set to something else than its default where that matters."""


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(kubernetes_binary("helm"), tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def default(helm: Helm) -> list[Manifest]:
    """The manifests of the chart's own values."""
    return helm.render({})


@pytest.fixture(scope="session")
def full(helm: Helm) -> list[Manifest]:
    """The manifests of `FULL`."""
    return helm.render(FULL, namespace="privacy")
