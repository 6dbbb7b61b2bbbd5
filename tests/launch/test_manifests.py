"""What is launched: restricted pods that see nothing but what the owner opened, suspended first."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.builders import (
    ABSENT,
    IMAGE,
    OWNER,
    SETTINGS,
    TEAM,
    Object,
    block,
    commit,
    job,
    snapshot,
    with_accounts,
)

from dpmoe_operator.api.base import parse
from dpmoe_operator.api.dpmoejob import Model, OutputClaim
from dpmoe_operator.api.privateblock import Table
from dpmoe_operator.control.actions import Prepare
from dpmoe_operator.control.decide import decide, react
from dpmoe_operator.control.planning import Planner
from dpmoe_operator.launch import paths
from dpmoe_operator.launch.launching import JOB_UID, Launch, labels, workload_name
from dpmoe_operator.launch.manifests import (
    CONTAINER,
    build_config_map,
    build_job,
    build_network_policy,
    build_owned,
    build_service,
)
from dpmoe_trainer.contract import PROGRESS_PORT, JobReference, TrainingPlan

TABLE = {"format": "csv", "textColumn": "t", "labelColumn": "l"}
ROOMY = replace(SETTINGS, storage_cidrs=("10.1.0.0/16", "10.2.0.1/32"))


def launch(*blocks: Object, settings: Any = SETTINGS, name: str = "train", **spec: Any) -> Launch:
    """What the operator would launch for a job over these blocks."""
    chosen = list(blocks) or [block()]
    ledger = with_accounts(*chosen)
    names = {"blocks": {"names": [b["metadata"]["name"] for b in chosen]}}
    seen = snapshot(chosen, [job(name, uid="uid-1", **names | spec)], ledger=ledger)
    decision = decide(seen, settings, Planner(settings))
    commit(ledger, *decision.records)
    [prepare] = [a for a in react(seen, decision, settings) if isinstance(a, Prepare)]
    return prepare.launch


def pod_of(launched: Launch) -> Any:
    return build_job(launched)["spec"]["template"]["spec"]


def all_of(launched: Launch) -> list[Any]:
    return [build_job(launched), *build_owned(launched)]


def container_of(launched: Launch) -> Any:
    [container] = pod_of(launched)["containers"]
    return container


def test_job_is_suspended_and_never_tried_twice() -> None:
    spec = build_job(launch())["spec"]
    assert spec["suspend"] is True
    assert spec["backoffLimit"] == 0
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 1, 1)
    assert "activeDeadlineSeconds" not in spec
    # A Job that cleaned itself up would take the proof of its end with it.
    assert "ttlSecondsAfterFinished" not in spec
    assert build_job(launch(activeDeadlineSeconds=60))["spec"]["activeDeadlineSeconds"] == 60


def test_pod_is_restricted() -> None:
    """Pod Security Standards, "restricted", and no API token."""
    pod, container = pod_of(launch()), container_of(launch())
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] == context["runAsGroup"] == SETTINGS.pods_run_as > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for field in ("hostNetwork", "hostPID", "hostIPC", "serviceAccountName", "initContainers"):
        assert field not in pod


def test_image_is_run_as_it_is() -> None:
    container = container_of(launch())
    assert container["image"] == IMAGE
    assert not {"command", "args", "envFrom", "lifecycle", "stdin"} & container.keys()


def test_report_is_the_termination_message() -> None:
    container = container_of(launch())
    assert container["name"] == CONTAINER
    assert container["terminationMessagePolicy"] == "File"
    variables = {v["name"]: v.get("value") for v in container["env"]}
    assert container["terminationMessagePath"] == variables["DPMOE_TERMINATION_LOG"]


def test_environment_is_the_operators_alone() -> None:
    variables = {v["name"]: v for v in container_of(launch())["env"]}
    assert {name: v["value"] for name, v in variables.items() if "value" in v} == {
        "DPMOE_PLAN": "/dpmoe/plan/plan.json",
        "DPMOE_TERMINATION_LOG": "/dev/termination-log",
        "DPMOE_PROGRESS_PORT": str(PROGRESS_PORT),
        "PET_NNODES": "1",
        "PET_NPROC_PER_NODE": "1",
        "PET_MASTER_ADDR": f"{workload_name(launch().job)}-0.{workload_name(launch().job)}",
        "PET_MASTER_PORT": "29500",
        "HOME": "/tmp",
    }
    assert variables["PET_NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"] == (
        "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    )
    assert variables["DPMOE_POD_UID"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.uid"
    assert len(variables) == 10


def test_torchrun_starts_a_process_for_each_gpu() -> None:
    launched = launch(parallelism={"gpusPerWorker": 4}, resources={"cpu": "8", "memory": "64Gi"})
    variables = {v["name"]: v.get("value") for v in container_of(launched)["env"]}
    assert variables["PET_NPROC_PER_NODE"] == "4"
    asked = {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "4"}
    assert container_of(launched)["resources"] == {"requests": asked, "limits": asked}
    other = replace(launched, gpu_resource="amd.com/gpu")
    assert container_of(other)["resources"]["limits"]["amd.com/gpu"] == "4"
    assert "resources" not in container_of(launch())


# Volumes


def volumes_of(launched: Launch) -> dict[str, Any]:
    return {
        v["name"]: {k: x for k, x in v.items() if k != "name"} for v in pod_of(launched)["volumes"]
    }


def mounts_of(launched: Launch) -> dict[str, Any]:
    return {m["name"]: m for m in container_of(launched)["volumeMounts"]}


def claims_of(launched: Launch) -> dict[str, bool]:
    """Claims that the pod mounts, and whether all of their mounts are read-only."""
    mounts = mounts_of(launched)
    return {
        volume["persistentVolumeClaim"]["claimName"]
        + ("" if "claim" in name else " (output)"): bool(
            volume["persistentVolumeClaim"].get("readOnly") and mounts[name].get("readOnly")
        )
        for name, volume in volumes_of(launched).items()
        if "persistentVolumeClaim" in volume
    }


def test_volumes_are_those_that_were_opened_and_no_others() -> None:
    launched = launch()
    assert claims_of(launched) == {"data": True, "models": True, "results (output)": False}
    assert {name: next(iter(v)) for name, v in volumes_of(launched).items()} == {
        "plan": "configMap",
        "scratch": "emptyDir",
        "shared-memory": "emptyDir",
        "claim-0": "persistentVolumeClaim",
        "claim-1": "persistentVolumeClaim",
        "output": "persistentVolumeClaim",
    }
    assert volumes_of(launched).keys() == mounts_of(launched).keys()
    assert mounts_of(launched)["plan"]["readOnly"] is True


def test_evaluation_sets_are_mounted_too() -> None:
    public = {**TABLE, "claim": {"claimName": "public", "path": "t.csv"}}
    assert claims_of(launch(block(evaluation=public)))["public"] is True


def test_claims_are_mounted_once() -> None:
    public = {**TABLE, "claim": {"claimName": "data", "path": "t.csv"}}
    launched = launch(block(evaluation=public), block("more", evaluation=public))
    assert claims_of(launched) == {"data": True, "models": True, "results (output)": False}


def test_claim_that_is_both_data_and_output_is_read_only_where_it_is_data() -> None:
    access = [{"namespace": TEAM, "models": ["models"], "outputs": [{"claimName": "data"}]}]
    launched = launch(block(access=access), output={"claim": {"claimName": "data"}})
    assert claims_of(launched) == {"data": True, "models": True, "data (output)": False}
    folders = [mount["mountPath"] for mount in mounts_of(launched).values()]
    assert len(set(folders)) == len(folders)


def test_host_paths_of_the_owner_are_read_only() -> None:
    table = {"claim": ABSENT, "path": "/data/reviews.csv", "format": "csv"}
    launched = launch(block(dataset=table), settings=replace(SETTINGS, host_paths=("/data",)))
    assert volumes_of(launched)["host-0"] == {"hostPath": {"path": "/data/reviews.csv"}}
    assert mounts_of(launched)["host-0"]["mountPath"] == "/data/reviews.csv"
    assert mounts_of(launched)["host-0"]["readOnly"] is True


def test_uri_outputs_and_image_models_need_no_claim() -> None:
    access = [{"namespace": TEAM, "outputs": [{"uriPrefix": "s3://bucket/"}]}]
    launched = launch(
        block(access=access),
        model={"claim": ABSENT, "path": "/models/tiny"},
        output={"claim": ABSENT, "uri": "s3://bucket/run"},
    )
    assert claims_of(launched) == {"data": True}


def test_every_path_of_the_plan_is_below_a_mount_or_in_the_image() -> None:
    public = {**TABLE, "claim": {"claimName": "public", "path": "t.csv"}}
    launched = launch(block(evaluation=public), block("more"))
    plan = TrainingPlan.model_validate_json(launched.plan_json)
    mounted = {m["mountPath"]: m.get("readOnly", False) for m in mounts_of(launched).values()}

    def mount_of(path: str | None) -> str:
        assert path is not None
        [found] = [m for m in mounted if PurePosixPath(path).is_relative_to(m)]
        return found

    assert plan.evaluation is not None
    for path in [b.data.path for b in plan.blocks] + [plan.evaluation.data.path, plan.model.path]:
        assert mounted[mount_of(path)] is True
    assert plan.output is not None
    assert mounted[mount_of(plan.output.path)] is False


def test_shared_memory_and_scratch() -> None:
    launched = launch(resources={"sharedMemory": "4Gi"})
    assert volumes_of(launched)["shared-memory"]["emptyDir"] == {
        "medium": "Memory",
        "sizeLimit": "4Gi",
    }
    assert mounts_of(launched)["shared-memory"]["mountPath"] == "/dev/shm"
    assert mounts_of(launched)["scratch"]["mountPath"] == "/tmp"


def test_folders_of_claims() -> None:
    table = parse(Table, {**TABLE, "claim": {"claimName": "c", "path": "a/b.csv"}})
    assert paths.table(table) == "/dpmoe/claims/c/a/b.csv"
    hub = parse(Table, {**TABLE, "huggingFace": {"id": "a/b"}})
    assert paths.table(hub) is None
    assert paths.model(parse(Model, {"huggingFace": {"id": "a/b"}})) is None
    claim = OutputClaim(claim_name="c", path="run")
    assert paths.output("team-a", claim) == "/dpmoe/outputs/c/team-a/run"


# Placement


PLACEMENT = {
    "nodeSelector": {"zone": "a"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "requiredNodes": [{"key": "zone", "operator": "In", "values": ["a", "b"]}],
    "preferredNodes": [{"key": "fast", "operator": "Exists"}],
    "priorityClassName": "research",
    "runtimeClassName": "gvisor",
}


def test_placement_passes_through() -> None:
    pod = pod_of(launch(placement=PLACEMENT))
    assert pod["nodeSelector"] == {"zone": "a"}
    assert pod["tolerations"] == PLACEMENT["tolerations"]
    required = [{"key": "zone", "operator": "In", "values": ["a", "b"]}]
    preferred = [{"key": "fast", "operator": "Exists", "values": []}]
    assert pod["affinity"] == {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": required}]
            },
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 1, "preference": {"matchExpressions": preferred}}
            ],
        }
    }
    assert (pod["priorityClassName"], pod["runtimeClassName"]) == ("research", "gvisor")


def test_nothing_is_placed_that_was_not_asked() -> None:
    pod = pod_of(launch())
    for field in ("nodeSelector", "tolerations", "affinity", "priorityClassName"):
        assert field not in pod


# Network


def test_network_policy_lets_in_own_pods_and_the_operators_polling() -> None:
    spec = build_network_policy(launch())["spec"]
    own = {"podSelector": {"matchLabels": {JOB_UID: "uid-1"}}}
    assert spec["podSelector"] == own["podSelector"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    from_own, from_operator = spec["ingress"]
    assert from_own == {"from": [own]}
    assert from_operator == {
        "from": [
            {
                "namespaceSelector": {
                    "matchLabels": {"kubernetes.io/metadata.name": "dpmoe-system"}
                },
                "podSelector": {"matchLabels": {"app.kubernetes.io/name": "dpmoe"}},
            }
        ],
        "ports": [{"protocol": "TCP", "port": PROGRESS_PORT}],
    }


def test_network_policy_lets_out_to_own_pods_dns_and_named_storage() -> None:
    to_own, to_dns, *rest = build_network_policy(launch())["spec"]["egress"]
    assert to_own == {"to": [{"podSelector": {"matchLabels": {JOB_UID: "uid-1"}}}]}
    assert {port["port"] for port in to_dns["ports"]} == {53}
    assert to_dns["to"][0]["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": "kube-system"
    }
    assert rest == []
    [storage] = build_network_policy(launch(settings=ROOMY))["spec"]["egress"][2:]
    assert storage == {
        "to": [{"ipBlock": {"cidr": "10.1.0.0/16"}}, {"ipBlock": {"cidr": "10.2.0.1/32"}}]
    }


# Names, labels, and what belongs together


def test_everything_lives_in_the_data_namespace_and_names_its_job() -> None:
    launched = launch()
    manifests = all_of(launched)
    assert [m["kind"] for m in manifests] == ["Job", "ConfigMap", "Service", "NetworkPolicy"]
    for manifest in manifests:
        meta = manifest["metadata"]
        assert (meta["namespace"], meta["name"]) == (OWNER, workload_name(launched.job))
        assert meta["labels"] == labels(launched.job)
    template = build_job(launched)["spec"]["template"]
    assert template["metadata"]["labels"] == labels(launched.job)


def test_plan_is_mounted_as_it_was_granted() -> None:
    launched = launch()
    config = build_config_map(launched)
    assert config["immutable"] is True
    assert config["data"] == {"plan.json": launched.plan_json}
    plan = TrainingPlan.model_validate_json(config["data"]["plan.json"])
    assert plan.to_json() == launched.plan_json
    assert volumes_of(launched)["plan"] == {"configMap": {"name": config["metadata"]["name"]}}


def test_service_is_headless_and_finds_pods_before_they_are_ready() -> None:
    launched = launch()
    service = build_service(launched)
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {JOB_UID: "uid-1"}
    assert pod_of(launched)["subdomain"] == service["metadata"]["name"]


DNS_LABEL = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
LABEL_VALUE = re.compile(r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$")

object_names = st.from_regex(
    re.compile(r"\A[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?){0,2}\Z")
).map(lambda name: name[:63].rstrip("-."))
NASTY = [
    "a",
    "0",
    "1.2.3",
    "a" * 63,
    "a." * 31 + "a",
    "a-" * 31 + "a",
    "x" * 39 + ".y",
    "x" * 39 + "-y",
]


def check_names(job: JobReference) -> None:
    name = workload_name(job)
    assert DNS_LABEL.match(name), name
    # The pods' host names are the Job's name with the largest completion index behind it.
    assert len(f"{name}-1023") <= 63
    for value in labels(job).values():
        assert LABEL_VALUE.match(value), value
        assert len(value) <= 63


@pytest.mark.parametrize("name", NASTY)
def test_nasty_names(name: str) -> None:
    check_names(JobReference(namespace="n" * 63, name=name, uid="u" * 36))


@settings(derandomize=True, deadline=None)
@given(object_names)
def test_names_and_labels_are_valid_for_any_object_name(name: str) -> None:
    check_names(JobReference(namespace="team-a", name=name, uid="3f1c"))


def test_jobs_of_one_name_get_objects_of_their_own() -> None:
    jobs = [JobReference(namespace=n, name="train", uid=u) for n, u in [("a", "1"), ("b", "2")]]
    cut = [JobReference(namespace="a", name="x" * 50 + end, uid=end) for end in ("a", "b")]
    assert len({workload_name(job) for job in jobs + cut}) == 4


def test_names_do_not_depend_on_the_process() -> None:
    """A restarted operator must find what the one before it made."""
    job = JobReference(namespace="team-a", name="train", uid="3f1c")
    assert workload_name(job) == "dpj-train-3ab9db2361"


def strings(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [s for k, v in value.items() for s in (str(k), *strings(v))]
    if isinstance(value, list):
        return [s for item in value for s in strings(item)]
    return [value] if isinstance(value, str) else []


def test_manifests_are_plain_json() -> None:
    for manifest in all_of(launch(placement=PLACEMENT)):
        assert json.loads(json.dumps(manifest)) == manifest


MARK = "zzmarkzz"


def test_free_text_of_a_job_reaches_nothing_but_the_plan() -> None:
    """Patterns, paths and names that a team chose end in the plan's JSON, never in a pod field."""
    launched = launch(
        model={
            "claim": {"path": MARK},
            "trainable": [MARK],
        },
        output={"claim": {"path": MARK}},
    )
    for manifest in all_of(launched):
        found = [text for text in strings(manifest) if MARK in text]
        assert found == ([launched.plan_json] if manifest["kind"] == "ConfigMap" else [])
