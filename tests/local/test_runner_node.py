"""Which pods fit on the node, and what the runner writes about them."""

from decimal import Decimal
from typing import Any

import pytest

from dpmoe_operator.local.runner.node import Capacity, build_node, wants_a_node, why_not
from dpmoe_operator.local.runner.quantity import parse, pod_requests
from dpmoe_operator.local.runner.status import (
    ContainerRecord,
    build_lost_status,
    build_status,
)

CAPACITY = Capacity(cpu="4", memory="8Gi", gpus=2, pods=3)
LABELS = {"zone": "a", "rank": "7"}


def make_pod(requests: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    container = {"name": "main", "image": "i", "resources": {"requests": requests or {}}}
    metadata = {"name": "p", "namespace": "ns", "uid": "u"}
    return {"metadata": metadata, "spec": {"containers": [container], **spec}}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", "1"),
        ("500m", "0.5"),
        ("0.5", "0.5"),
        ("2Ki", "2048"),
        ("1.5Gi", "1610612736"),
        ("1e3", "1000"),
        ("3k", "3000"),
        ("1E", "1000000000000000000"),
        (4, "4"),
    ],
)
def test_quantities(text: str | int, number: str) -> None:
    assert parse(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "x", "1X", "Gi", "1 Gi"])
def test_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match=r"500m|unknown unit"):
        parse(text)


def test_a_pod_asks_for_its_containers_together_or_its_largest_init_container() -> None:
    pod = make_pod({"cpu": "1"})
    pod["spec"]["containers"].append({"name": "b", "resources": {"limits": {"cpu": "2"}}})
    pod["spec"]["initContainers"] = [{"name": "i", "resources": {"requests": {"cpu": "500m"}}}]
    assert pod_requests(pod) == {"cpu": Decimal(3)}
    pod["spec"]["initContainers"][0]["resources"]["requests"]["cpu"] = "3500m"
    assert pod_requests(pod) == {"cpu": Decimal("3.5")}


def required(*expressions: tuple[str, str, list[str]]) -> dict[str, Any]:
    term = {
        "matchExpressions": [
            {"key": key, "operator": operator, "values": values}
            for key, operator, values in expressions
        ]
    }
    terms = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    return {"nodeAffinity": terms}


@pytest.mark.parametrize(
    ("pod", "others", "fits"),
    [
        (make_pod(), [], True),
        (make_pod({"cpu": "4", "memory": "8Gi", "nvidia.com/gpu": "2"}), [], True),
        (make_pod({"cpu": "4001m"}), [], False),
        (make_pod({"cpu": "2"}), [make_pod({"cpu": "2500m"})], False),
        (make_pod({"nvidia.com/gpu": "1"}), [make_pod({"nvidia.com/gpu": "1"})], True),
        (make_pod({"amd.com/gpu": "1"}), [], False),
        (make_pod(), [make_pod()] * 2, True),
        (make_pod(), [make_pod()] * 3, False),
        (make_pod(nodeSelector={"zone": "a"}), [], True),
        (make_pod(nodeSelector={"zone": "b"}), [], False),
        (make_pod(affinity=required(("zone", "In", ["a", "b"]))), [], True),
        (make_pod(affinity=required(("zone", "NotIn", ["a"]))), [], False),
        (make_pod(affinity=required(("none", "Exists", []))), [], False),
        (make_pod(affinity=required(("none", "DoesNotExist", []))), [], True),
        (make_pod(affinity=required(("rank", "Gt", ["6"]), ("rank", "Lt", ["8"]))), [], True),
        (make_pod(affinity=required(("rank", "Gt", ["7"]))), [], False),
        (make_pod(affinity=required()), [], False),
    ],
)
def test_what_fits(pod: dict[str, Any], others: list[dict[str, Any]], fits: bool) -> None:
    assert (why_not(pod, LABELS, CAPACITY, others) is None) is fits


@pytest.mark.parametrize(
    ("spec", "wants"),
    [
        ({}, True),
        ({"nodeName": "n"}, False),
        ({"schedulingGates": [{"name": "kueue"}]}, False),
        ({"schedulerName": "other"}, False),
    ],
)
def test_only_pods_for_the_default_scheduler_are_bound(spec: dict[str, Any], wants: bool) -> None:
    assert wants_a_node(make_pod(**spec)) is wants


def test_a_pod_that_ended_or_is_deleted_wants_no_node() -> None:
    assert not wants_a_node(make_pod() | {"status": {"phase": "Failed"}})
    deleted = make_pod()
    deleted["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert not wants_a_node(deleted)


def test_the_node_says_that_it_is_emulated() -> None:
    assert build_node("n")["metadata"]["labels"]["dpmoe.dev/emulated"] == "true"


def test_conditions_of_others_are_kept_and_times_stand_still() -> None:
    foreign = {"type": "DisruptionTarget", "status": "True"}
    old = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2020-01-01T00:00:00Z"}
    pod = make_pod() | {"status": {"conditions": [foreign, old], "startTime": "then"}}
    status = build_status(pod, "Pending", [ContainerRecord("main", "i")], [])
    conditions = {each["type"]: each for each in status["conditions"]}
    assert conditions["DisruptionTarget"] == foreign
    assert conditions["PodScheduled"] == old
    assert conditions["Ready"]["status"] == "False"
    assert status["startTime"] == "then"


def test_a_lost_pod_counts_as_started_even_if_nobody_said_so() -> None:
    status = build_lost_status(make_pod(), "gone")
    (container,) = status["containerStatuses"]
    assert (status["phase"], status["reason"]) == ("Failed", "ProcessLost")
    assert container["containerID"]
    assert container["state"]["terminated"]["exitCode"] == 137
    assert container["state"]["terminated"]["startedAt"]


def test_a_pod_that_ends_between_two_runs_keeps_how_the_last_one_ended() -> None:
    record = ContainerRecord("main", "i")
    record.run()
    record.end(3, "last words")
    record.wait("CrashLoopBackOff")
    assert record.last_state["terminated"]["exitCode"] == 3
    record.close()
    assert record.exit_code == 3
    assert record.status()["restartCount"] == 0
