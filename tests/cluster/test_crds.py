"""The custom resources on API servers: what they store, what they refuse, what may change.

The embedded server checks structure but evaluates no CEL; the rules are shown on the real one.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.builders import ABSENT, Object, block_spec, commit, job_spec, merged, opened
from tests.cluster.conftest import Answer, ApiServer, RawClient

from dpmoe_operator.api.base import GROUP, VERSION, parse
from dpmoe_operator.api.crd import all_definitions
from dpmoe_operator.api.dpmoejob import DPMoEJobSpec
from dpmoe_operator.api.ledgerentry import LedgerEntrySpec
from dpmoe_operator.api.privateblock import PrivateBlockSpec
from dpmoe_operator.ledger.fold import LedgerState, fold

DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


@pytest.fixture(scope="module")
def definitions(http: RawClient) -> Iterator[None]:
    """The three definitions, established."""
    made = []
    for definition in all_definitions().values():
        name = definition["metadata"]["name"]
        answer = http("POST", DEFINITIONS, definition)
        assert answer.status in (201, 409), answer
        made += [name] if answer.status == 201 else []
        http.eventually(f"{DEFINITIONS}/{name}", _established)
    for plural in all_definitions():
        http.eventually(f"/apis/{GROUP}/{VERSION}/{plural}", lambda answer: answer.status == 200)
    yield
    for name in made:
        http("DELETE", f"{DEFINITIONS}/{name}")


def _established(answer: Answer) -> bool:
    conditions = (answer.body.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)


Write = Callable[..., Answer]


@pytest.fixture
def create(http: RawClient, namespace: str, definitions: None) -> Write:
    """`create(plural, spec, name)`: the answer to a POST."""

    def post(plural: str, spec: Any, name: str = "x") -> Answer:
        kind = all_definitions()[plural]["spec"]["names"]["kind"]
        manifest = {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": kind,
            "metadata": {"name": name},
            "spec": spec,
        }
        return http("POST", f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{plural}", manifest)

    return post


@pytest.fixture
def change(http: RawClient, namespace: str) -> Write:
    """`change(plural, patch, name, subresource)`: the answer to a merge patch."""

    def patch(plural: str, body: Any, name: str = "x", subresource: str = "") -> Answer:
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{plural}/{name}{subresource}"
        return http("PATCH", path, body, content_type="application/merge-patch+json")

    return patch


@pytest.fixture
def with_cel(api: ApiServer) -> None:
    """For rules that only a real API server evaluates."""
    if api.name == "embedded":
        pytest.skip("the embedded API server evaluates no CEL; the operator repeats every rule")


def refused(answer: Answer, *words: str) -> None:
    assert answer.status == 422, answer
    for word in words:
        assert word in answer.body["message"], answer.body["message"]


# Structure, on both servers

PARTITION = {"column": "year", "values": ["2024", "2025"]}


def test_stored_specs_mean_what_was_written(create: Write) -> None:
    """Defaults that the server fills in are the operator's own."""
    spec = block_spec(
        dataset={"partition": PARTITION}, unlocking={"kind": "arrivals", "arrivals": 5}
    )
    stored = create("privateblocks", spec)
    assert stored.status == 201, stored
    assert parse(PrivateBlockSpec, stored.body["spec"]) == parse(PrivateBlockSpec, spec)
    assert stored.body["spec"]["budget"]["conversion"] == "tight"
    wanted = job_spec(
        model={"upcycle": {"experts": 4, "layers": [1]}},
        placement={"nodeSelector": {"a": "b"}, "tolerations": [{"operator": "Exists"}]},
    )
    stored = create("dpmoejobs", wanted)
    assert stored.status == 201, stored
    assert parse(DPMoEJobSpec, stored.body["spec"]) == parse(DPMoEJobSpec, wanted)


def test_ledger_entries_come_back_as_they_were_sealed(create: Write) -> None:
    """One byte more, a default or a reordered number, and the digest would not hold."""
    manifest = commit(LedgerState(), opened("claim://ä/ß?x=%2C", (10**15, -(10**15), 0)))
    stored = create("ledgerentries", manifest["spec"], manifest["metadata"]["name"])
    assert stored.status == 201, stored
    assert stored.body["spec"] == manifest["spec"]
    assert fold([stored.body]).sequence == 1
    again = create("ledgerentries", manifest["spec"], manifest["metadata"]["name"])
    assert (again.status, again.body["reason"]) == (409, "AlreadyExists")


STRUCTURE: list[tuple[str, Object, str]] = [
    ("privateblocks", block_spec(budget={"epsilon": 10}), "spec.budget.epsilon"),
    ("privateblocks", block_spec(budget={"epsilon": "-1"}), "spec.budget.epsilon"),
    ("privateblocks", block_spec(budget={"delta": "2"}), "spec.budget.delta"),
    ("privateblocks", block_spec(dataset={"units": 0}), "spec.dataset.units"),
    ("privateblocks", block_spec(dataset={"format": "xlsx"}), "spec.dataset.format"),
    ("privateblocks", block_spec(dataset={"claim": {"path": "/etc"}}), "spec.dataset.claim.path"),
    (
        "privateblocks",
        block_spec(dataset={"partition": {"column": "c", "values": ["1", "1"]}}),
        "spec.dataset.partition.values",
    ),
    (
        "privateblocks",
        block_spec(access=[{"namespace": "a"}, {"namespace": "a"}]),
        "spec.access",
    ),
    ("dpmoejobs", job_spec(blocks={"names": []}), "spec.blocks.names"),
    ("dpmoejobs", job_spec(blocks={"names": ["a", "a"]}), "spec.blocks.names"),
    ("dpmoejobs", job_spec(privacy={"epsilon": 1.5}), "spec.privacy.epsilon"),
    ("dpmoejobs", job_spec(training={"steps": 0}), "spec.training.steps"),
    ("dpmoejobs", job_spec(parallelism={"workers": 5000}), "spec.parallelism.workers"),
    ("dpmoejobs", job_spec(training={"optimizer": ABSENT}), "spec.training.optimizer"),
]


@pytest.mark.parametrize(("plural", "spec", "field"), STRUCTURE)
def test_structure_is_checked(create: Write, plural: str, spec: Object, field: str) -> None:
    refused(create(plural, spec), field)


def test_names_that_would_not_fit_into_labels_are_refused(create: Write) -> None:
    assert create("dpmoejobs", job_spec(), "x" * 63).status == 201
    refused(create("dpmoejobs", job_spec(), "x" * 64), "metadata.name")


def test_status_is_a_subresource(create: Write, change: Write) -> None:
    create("dpmoejobs", job_spec())
    assert "status" not in change("dpmoejobs", {"status": {"state": "Running"}}).body
    both = {"status": {"state": "Running", "surprise": 1}, "spec": {"priority": 7}}
    written = change("dpmoejobs", both, subresource="/status").body
    assert written["status"] == {"state": "Running"}
    assert written["spec"].get("priority") == 0
    refused(change("dpmoejobs", {"status": {"state": "Dancing"}}, subresource="/status"), "state")


# CEL, on the real server

SELECTOR = {"matchLabels": {"kind": "reviews"}}

CONTRADICTIONS: list[tuple[str, Object, str]] = [
    (
        "privateblocks",
        block_spec(dataset={"path": "/a.csv"}),
        "exactly one of path, claim, huggingFace must be set",
    ),
    ("privateblocks", block_spec(dataset={"claim": ABSENT}), "exactly one of path, claim"),
    ("privateblocks", block_spec(dataset={"format": ABSENT}), "format must be set where path"),
    (
        "privateblocks",
        block_spec(dataset={"tokensColumn": "ids"}),
        "exactly one of textColumn, tokensColumn must be set",
    ),
    (
        "privateblocks",
        block_spec(dataset={"textColumn": ABSENT}),
        "exactly one of textColumn, tokensColumn must be set",
    ),
    (
        "privateblocks",
        block_spec(dataset={"textColumn": ABSENT, "tokensColumn": "ids", "format": "csv"}),
        "format must be jsonl or parquet where tokensColumn is set",
    ),
    (
        "privateblocks",
        block_spec(evaluation={"textColumn": "t", "labelColumn": "l", "format": "csv"}),
        "exactly one of path, claim",
    ),
    (
        "dpmoejobs",
        job_spec(blocks={"selector": SELECTOR}),
        "exactly one of names, selector must be set",
    ),
    ("dpmoejobs", job_spec(blocks={"names": ABSENT}), "exactly one of names, selector"),
    ("dpmoejobs", job_spec(model={"path": "/m"}), "exactly one of path, claim, huggingFace"),
    ("dpmoejobs", job_spec(output={"uri": "s3://a/b"}), "exactly one of claim, uri"),
    ("dpmoejobs", job_spec(training={"epochs": 3}), "exactly one of epochs, steps"),
    ("dpmoejobs", job_spec(elastic={}), "epsilon or blocks must be set"),
    (
        "dpmoejobs",
        job_spec(parallelism={"workers": 2, "gpusPerWorker": 3, "expertParallel": 4}),
        "expertParallel must divide the ranks",
    ),
    (
        "dpmoejobs",
        job_spec(
            privacy={"epsilon": ABSENT, "noiseMultiplier": "2"},
            elastic={"epsilon": [{"epsilon": "1", "utility": "0.5"}]},
        ),
        "elastic.epsilon needs privacy.epsilon",
    ),
    (
        "dpmoejobs",
        job_spec(
            blocks={"names": ABSENT, "selector": {"matchLabels": {"a": "b"}}},
            elastic={"blocks": [{"count": 1, "utility": "0.5"}]},
        ),
        "elastic.blocks needs blocks.names or blocks.count",
    ),
    ("dpmoejobs", job_spec(privacy={"epsilon": ABSENT}), "epsilon or noiseMultiplier must be set"),
]


@pytest.mark.parametrize(("plural", "spec", "message"), CONTRADICTIONS)
def test_contradictions_are_refused(
    create: Write, with_cel: None, plural: str, spec: Object, message: str
) -> None:
    refused(create(plural, spec), message)


FROZEN: list[tuple[str, Object]] = [
    ("privateblocks", {"dataset": {"units": 99}}),
    ("privateblocks", {"dataset": {"claim": {"path": "other.jsonl"}}}),
    ("privateblocks", {"dataset": {"partition": PARTITION}}),
    ("privateblocks", {"dataset": {"format": "csv"}}),
    ("privateblocks", {"budget": {"epsilon": "11"}}),
    ("privateblocks", {"budget": {"epsilon": "10.0"}}),
    ("privateblocks", {"budget": {"delta": "1e-7"}}),
    ("privateblocks", {"budget": {"orders": ["2"]}}),
    ("privateblocks", {"budget": {"conversion": "classic"}}),
    ("privateblocks", {"unit": {"kind": "user", "column": "author"}}),
    ("privateblocks", {"disjointFrom": ["others"]}),
    ("dpmoejobs", {"blocks": {"names": ["others"]}}),
    ("dpmoejobs", {"privacy": {"epsilon": "2"}}),
    ("dpmoejobs", {"privacy": {"noiseMultiplier": "1"}}),
    ("dpmoejobs", {"model": {"claim": {"path": "x"}}}),
    ("dpmoejobs", {"training": {"steps": 101}}),
    ("dpmoejobs", {"output": {"claim": {"path": "x"}}}),
    ("dpmoejobs", {"image": "x/y:1"}),
    ("dpmoejobs", {"resources": {"cpu": "1"}}),
    ("dpmoejobs", {"placement": {"nodeSelector": {"a": "b"}}}),
    ("dpmoejobs", {"parallelism": {"gpusPerWorker": 1}}),
    ("dpmoejobs", {"weight": 2}),
    ("dpmoejobs", {"timeoutSeconds": 5}),
    ("dpmoejobs", {"activeDeadlineSeconds": 5}),
]

SPECS = {"privateblocks": block_spec(), "dpmoejobs": job_spec()}


@pytest.mark.parametrize(("plural", "patch"), FROZEN)
def test_frozen_fields_stay(
    create: Write, change: Write, with_cel: None, plural: str, patch: Object
) -> None:
    assert create(plural, SPECS[plural]).status == 201
    [field] = patch
    answer = change(plural, {"spec": patch})
    refused(answer, f"spec.{field} may not change after creation")
    assert answer.body["details"]["causes"][0]["field"] == f"spec.{field}"


REMOVED: list[tuple[str, Object, str]] = [
    ("privateblocks", block_spec(unit={"kind": "user", "column": "author"}), "unit"),
    ("privateblocks", block_spec(disjointFrom=["others", "more"]), "disjointFrom"),
    ("privateblocks", block_spec(retired=True), "retired"),
    ("dpmoejobs", job_spec(image="x/y:1"), "image"),
    ("dpmoejobs", job_spec(timeoutSeconds=60), "timeoutSeconds"),
]


@pytest.mark.parametrize(("plural", "spec", "field"), REMOVED)
def test_frozen_fields_cannot_be_taken_out(
    create: Write, change: Write, with_cel: None, plural: str, spec: Object, field: str
) -> None:
    assert create(plural, spec).status == 201
    refused(change(plural, {"spec": {field: None}}), f"spec.{field} may not change")


def test_retired_blocks_stay_retired(create: Write, change: Write, with_cel: None) -> None:
    assert create("privateblocks", block_spec()).status == 201
    for _ in range(2):
        assert change("privateblocks", {"spec": {"retired": True}}).status == 200
    answer = change("privateblocks", {"spec": {"retired": False}})
    refused(answer, "spec.retired may not change back: a retired block stays retired")
    assert answer.body["details"]["causes"][0]["field"] == "spec.retired"
    assert change("privateblocks", {"spec": {"access": []}}).status == 200


ALLOWED: list[tuple[str, Object]] = [
    ("privateblocks", {"access": []}),
    ("privateblocks", {"access": [{"namespace": "new", "maxEpsilon": "1"}]}),
    ("privateblocks", {"unlocking": {"kind": "time", "lifetimeSeconds": 60}}),
    ("privateblocks", {"retired": True}),
    ("privateblocks", {"evaluation": merged(block_spec()["dataset"], {"units": ABSENT})}),
    ("dpmoejobs", {"suspend": True}),
    ("dpmoejobs", {"priority": 5}),
    ("dpmoejobs", {"ttlSecondsAfterFinished": 60}),
]


@pytest.mark.parametrize(("plural", "patch"), ALLOWED)
def test_other_fields_may_change(create: Write, change: Write, plural: str, patch: Object) -> None:
    assert create(plural, SPECS[plural]).status == 201
    answer = change(plural, {"spec": patch})
    assert answer.status == 200, answer


def test_ledger_entries_never_change(create: Write, change: Write, with_cel: None) -> None:
    manifest = commit(LedgerState(), opened())
    name = manifest["metadata"]["name"]
    stored = create("ledgerentries", manifest["spec"], name)
    assert stored.status == 201
    message = "an entry of the ledger may not change"
    refused(change("ledgerentries", {"spec": {"writer": "me"}}, name), message)
    refused(change("ledgerentries", {"spec": {"records": []}}, name))
    records = copy.deepcopy(manifest["spec"]["records"])
    records[0]["accountOpened"]["capacity"][0] += 1
    refused(change("ledgerentries", {"spec": {"records": records}}, name), message)
    assert change("ledgerentries", {"metadata": {"labels": {"a": "b"}}}, name).status == 200
    parse(LedgerEntrySpec, manifest["spec"])
