"""The operator's Deployment: restricted, and configured by variables that the operator reads."""

from pathlib import Path
from typing import Any

import pytest
import typer
from tests.chart.conftest import FULL
from tests.chart.helm import Helm, Manifest, only

from dpmoe_operator.cli.main import app
from dpmoe_operator.control.settings import Settings
from dpmoe_operator.kube.lease import LEASE_SECONDS
from dpmoe_operator.kube.operator import LEASE_NAME
from dpmoe_operator.launch.launching import MANAGED_BY, MANAGER
from dpmoe_trainer.contract import PROGRESS_PORT

DEFAULTS = Settings(namespace="", trainer_image="")

CACHE = "NUMBA_CACHE_DIR"
"""A variable that numba reads, not the operator."""


def pod(manifests: list[Manifest]) -> Manifest:
    spec: Manifest = only(manifests, "Deployment", "dpmoe-operator")["spec"]["template"]["spec"]
    return spec


def container(manifests: list[Manifest]) -> Manifest:
    containers: list[Manifest] = pod(manifests)["containers"]
    [operator] = containers
    return operator


def parameters(manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `dpmoe operator` understands of the container's arguments and variables."""
    spec = container(manifests)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    for variable in spec["env"]:
        value = variable.get("value", "from-the-field")
        monkeypatch.setenv(variable["name"], value)
    group: Any = typer.main.get_command(app)
    command = group.commands[spec["args"][0]]
    known = {option.envvar for option in command.params}
    assert {variable["name"] for variable in spec["env"]} - {CACHE} <= known
    understood: dict[str, Any] = command.make_context("operator", list(spec["args"][1:])).params
    return understood


def test_the_operator_understands_what_the_default_values_say(
    default: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parameters(default, monkeypatch) == {
        "namespace": "from-the-field",
        "trainer_image": "ghcr.io/dpmoe/trainer:0.1.0",
        "policy": DEFAULTS.policy,
        "fairness": DEFAULTS.fairness,
        "foresight_seconds": DEFAULTS.foresight_seconds,
        "round_seconds": 5.0,
        "anchor": Path("/var/lib/dpmoe/anchor"),
        "no_anchor": False,
        "lease_seconds": LEASE_SECONDS,
        "pod_uid": "from-the-field",
        "gpu_resource": DEFAULTS.gpu_resource,
        "storage_cidr": (),
        "host_path": (),
        "trainer_env": (),
        "grace_seconds": DEFAULTS.grace_seconds,
        "start_timeout_seconds": 3600,
        "gangs": True,
        "liveness": "http://0.0.0.0:8080/healthz",
        "kubeconfig": None,
        "verbose": False,
    }


def test_the_operator_understands_what_other_values_say(
    full: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    understood = parameters(full, monkeypatch)
    assert understood["trainer_image"] == "registry.example/trainer:1.2"
    assert understood["policy"] == "fcfs"
    assert understood["foresight_seconds"] == 86400
    assert understood["round_seconds"] == 0.5
    assert understood["gpu_resource"] == "amd.com/gpu"
    assert list(understood["storage_cidr"]) == ["10.1.0.0/16", "fd00::/8"]
    assert list(understood["host_path"]) == ["/srv/data", "/mnt/reviews"]
    assert list(understood["trainer_env"]) == ["GLOO_SOCKET_IFNAME=eth0", "NCCL_SOCKET_IFNAME=eth0"]
    assert (understood["grace_seconds"], understood["start_timeout_seconds"]) == (300, 600)
    assert understood["gangs"] is False


def test_the_operator_knows_its_own_pod(full: list[Manifest]) -> None:
    fields = {
        variable["name"]: variable["valueFrom"]["fieldRef"]["fieldPath"]
        for variable in container(full)["env"]
        if "valueFrom" in variable
    }
    assert fields == {
        "DPMOE_NAMESPACE": "metadata.namespace",
        "DPMOE_POD_UID": "metadata.uid",
    }
    # The ledger is where the operator is.
    assert only(full, "Deployment", "dpmoe-operator")["metadata"]["namespace"] == "privacy"


def test_a_digest_goes_before_a_tag(default: list[Manifest], full: list[Manifest]) -> None:
    assert container(default)["image"] == "ghcr.io/dpmoe/operator:0.1.0"
    assert container(full)["image"] == f"registry.example:5000/dpmoe/operator@sha256:{'a' * 64}"


def test_the_pod_passes_the_restricted_security_standard(full: list[Manifest]) -> None:
    for each in (pod(full), container(full)):
        assert not set(each) & {"hostNetwork", "hostPID", "hostIPC", "hostAliases"}
    assert pod(full)["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "fsGroup": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container(full)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not any("hostPort" in port for port in container(full)["ports"])
    assert "initContainers" not in pod(full)
    assert [set(volume) for volume in pod(full)["volumes"]] == [
        {"name", "emptyDir"},
        {"name", "persistentVolumeClaim"},
    ]


def test_machine_code_outlives_the_container(full: list[Manifest]) -> None:
    volume, mount = pod(full)["volumes"][0], container(full)["volumeMounts"][0]
    [path] = [v["value"] for v in container(full)["env"] if v["name"] == CACHE]
    assert mount == {"name": volume["name"], "mountPath": path}
    assert volume["emptyDir"] == {"sizeLimit": "64Mi"}


def test_the_anchors_volume_is_where_the_operator_looks(full: list[Manifest]) -> None:
    volume, mount = pod(full)["volumes"][1], container(full)["volumeMounts"][1]
    [path] = [v["value"] for v in container(full)["env"] if v["name"] == "DPMOE_ANCHOR"]
    assert mount == {"name": volume["name"], "mountPath": path}
    name = volume["persistentVolumeClaim"]["claimName"]
    claim = only(full, "PersistentVolumeClaim", name, "privacy")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert claim["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "fast",
        "resources": {"requests": {"storage": "10Gi"}},
    }


def test_the_default_storage_class_is_the_clusters(default: list[Manifest]) -> None:
    claim = only(default, "PersistentVolumeClaim", "dpmoe-operator-anchor")
    assert claim["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "1Gi"}},
    }


def test_the_anchor_may_be_on_a_claim_that_is_there(helm: Helm) -> None:
    manifests = helm.render({"anchor": {"existingClaim": "offsite"}})
    assert "PersistentVolumeClaim" not in {manifest["kind"] for manifest in manifests}
    _, volume = pod(manifests)["volumes"]
    assert volume["persistentVolumeClaim"] == {"claimName": "offsite"}


def test_without_an_anchor_the_operator_is_told_so(
    helm: Helm, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = helm.render({"anchor": {"enabled": False}})
    understood = parameters(manifests, monkeypatch)
    assert (understood["anchor"], understood["no_anchor"]) == (None, True)
    assert "PersistentVolumeClaim" not in {manifest["kind"] for manifest in manifests}
    assert [set(volume) for volume in pod(manifests)["volumes"]] == [{"name", "emptyDir"}]
    assert len(container(manifests)["volumeMounts"]) == 1
    assert "fsGroup" not in pod(manifests)["securityContext"]


def test_one_operator_at_a_time(full: list[Manifest]) -> None:
    spec = only(full, "Deployment", "dpmoe-operator")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_probes_ask_what_the_operator_serves(
    default: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    liveness = parameters(default, monkeypatch)["liveness"]
    [port] = container(default)["ports"]
    for probe in ("startupProbe", "livenessProbe"):
        get = container(default)[probe]["httpGet"]
        assert get["port"] == port["name"]
        assert liveness == f"http://0.0.0.0:{port['containerPort']}{get['path']}"


def test_trainers_network_policies_know_the_operator_by_its_labels(full: list[Manifest]) -> None:
    template = only(full, "Deployment", "dpmoe-operator")["spec"]["template"]
    assert dict(DEFAULTS.progress_labels).items() <= template["metadata"]["labels"].items()


def test_selectors_select_the_operator(full: list[Manifest]) -> None:
    labels = only(full, "Deployment", "dpmoe-operator")["spec"]["template"]["metadata"]["labels"]
    for kind, field in (
        ("Deployment", "selector"),
        ("PodDisruptionBudget", "selector"),
        ("NetworkPolicy", "podSelector"),
    ):
        selector = only(full, kind, "dpmoe-operator")["spec"][field]["matchLabels"]
        assert selector.items() <= labels.items(), kind


def test_the_network_policy_lets_the_operator_work_and_no_more(full: list[Manifest]) -> None:
    spec = only(full, "NetworkPolicy", "dpmoe-operator")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["ingress"] == []
    dns, server, trainers = spec["egress"]
    assert {port["port"] for port in dns["ports"]} == {53}
    assert server == {
        "ports": [{"protocol": "TCP", "port": 6443}],
        "to": [{"ipBlock": {"cidr": "10.0.0.1/32"}}],
    }
    assert trainers["ports"] == [{"protocol": "TCP", "port": PROGRESS_PORT}]
    [to] = trainers["to"]
    [expression] = to["namespaceSelector"]["matchExpressions"]
    assert expression["values"] == FULL["dataNamespaces"]
    assert to["podSelector"] == {"matchLabels": {"app.kubernetes.io/managed-by": "dpmoe"}}


def test_trainers_reach_nothing_but_by_their_jobs_own_policies(full: list[Manifest]) -> None:
    for namespace in FULL["dataNamespaces"]:
        policy = only(full, "NetworkPolicy", "dpmoe-operator-data", namespace)
        assert policy["spec"] == {
            "podSelector": {"matchLabels": {MANAGED_BY: MANAGER}},
            "policyTypes": ["Ingress", "Egress"],
        }


def test_placement_and_pull_secrets_are_passed_on(full: list[Manifest]) -> None:
    spec = pod(full)
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert container(full)["imagePullPolicy"] == "Always"
    assert container(full)["resources"] == FULL["resources"]
    for field in ("nodeSelector", "tolerations", "priorityClassName"):
        assert spec[field] == FULL[field]


def test_what_is_off_is_absent(default: list[Manifest]) -> None:
    kinds = {manifest["kind"] for manifest in default}
    assert not kinds & {"NetworkPolicy", "PodDisruptionBudget", "Secret", "Namespace"}


def test_the_role_names_the_lease_that_the_operator_takes(default: list[Manifest]) -> None:
    rules = only(default, "Role", "dpmoe-operator-ledger")["rules"]
    names = {name for rule in rules for name in rule.get("resourceNames", [])}
    assert names == {LEASE_NAME}
