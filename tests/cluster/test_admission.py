"""The chart's admission policies on a real API server: nobody gets at the ledger past the operator.

Every refused attempt is made for good, by a cluster administrator (system:masters) or a controller,
and the entries are then found as they were: same content, same resource versions. Each test leaves
the chart installed and its policies in force.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.cluster.installation import (
    BLOCK,
    DATA_NAMESPACE,
    JOB,
    OPERATOR_NAMESPACE,
    OTHER_NAMESPACE,
    TEAM_NAMESPACE,
    VALUES,
    Installation,
    installed,
    open_account,
)

from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.config import load_access
from dpmoe_operator.kube.store import KubeEntryStore

pytestmark = pytest.mark.envtest

OPERATOR = f"system:serviceaccount:{OPERATOR_NAMESPACE}:dpmoe-operator"
AS_OPERATOR = (f"--as={OPERATOR}", "--as-group=system:masters")
"""Its name, and every right there is: what is refused then is refused by policy."""

CONTROLLERS = ("namespace-controller", "generic-garbage-collector")
ALLOW = "dpmoe.dev/allow-deletion=forget-all-spent-budget"

LEDGER = ("-n", OPERATOR_NAMESPACE, "ledgerentries")
FIRST = "entry-000000000000"
PATH = f"/apis/dpmoe.dev/v1alpha1/namespaces/{OPERATOR_NAMESPACE}/ledgerentries"
DEFINITION = "ledgerentries.dpmoe.dev"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"

ENTRIES: dict[str, tuple[tuple[str, ...], str]] = {
    "delete": (("delete", *LEDGER, FIRST), "may not delete LedgerEntry"),
    "delete by force": (
        ("delete", *LEDGER, FIRST, "--force", "--grace-period=0"),
        "may not delete LedgerEntry",
    ),
    "delete in the foreground": (
        ("delete", *LEDGER, FIRST, "--cascade=foreground"),
        "may not delete LedgerEntry",
    ),
    "delete all": (("delete", *LEDGER, "--all"), "may not delete LedgerEntry"),
    "delete the collection": (("delete", "--raw", PATH), "may not delete LedgerEntry"),
    "annotate": (("annotate", *LEDGER, FIRST, "note=x"), "may not change LedgerEntry"),
    "label": (("label", *LEDGER, FIRST, "note=x"), "may not change LedgerEntry"),
    "add a finalizer": (
        (
            "patch",
            *LEDGER,
            FIRST,
            "--type=merge",
            '--patch={"metadata":{"finalizers":["x.dev/y"]}}',
        ),
        "may not change LedgerEntry",
    ),
    "change nothing": (
        ("patch", *LEDGER, FIRST, "--type=merge", "--patch={}"),
        "may not change LedgerEntry",
    ),
    # The custom resource's own rule comes first.
    "change the content": (
        ("patch", *LEDGER, FIRST, "--type=merge", '--patch={"spec":{"writer":"me"}}'),
        "an entry of the ledger may not change",
    ),
}
"""On entries that exist: arguments of kubectl, and what the refusal says."""

VERSION = "/spec/versions/0"
SPEC = f"{VERSION}/schema/openAPIV3Schema/properties/spec"
RECORDS = f"{SPEC}/properties/records/items/properties"
NEXT_VERSION = {
    "name": "v1beta1",
    "served": True,
    "storage": True,
    "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
}

OUT_OF_SERVICE = "may not take v1alpha1 out of service or storage"
FIELDS = "may not take fields out of the schema"

CHANGES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "not served": (
        [{"op": "replace", "path": f"{VERSION}/served", "value": False}],
        OUT_OF_SERVICE,
    ),
    "not stored": (
        [
            {"op": "replace", "path": f"{VERSION}/storage", "value": False},
            {"op": "add", "path": "/spec/versions/-", "value": NEXT_VERSION},
        ],
        OUT_OF_SERVICE,
    ),
    "no field of that kind": (
        [{"op": "remove", "path": f"{SPEC}/properties/digest"}],
        FIELDS,
    ),
    "no record of that kind": (
        [{"op": "remove", "path": f"{RECORDS}/launched"}],
        FIELDS,
    ),
    "no field in a record": (
        [{"op": "remove", "path": f"{RECORDS}/granted/properties/charges"}],
        FIELDS,
    ),
    "no records": (
        [{"op": "remove", "path": f"{SPEC}/properties/records/items/properties"}],
        FIELDS,
    ),
    "no schema": (
        [
            {
                "op": "replace",
                "path": f"{VERSION}/schema/openAPIV3Schema",
                "value": {"type": "object"},
            }
        ],
        FIELDS,
    ),
}
"""JSON patches of the ledger's definition by which entries would be unreadable or cut."""


@pytest.fixture(scope="module")
def installation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    with installed(request, tmp_path_factory.mktemp("admission")) as installation:
        for manifest, namespace in ((BLOCK, DATA_NAMESPACE), (JOB, TEAM_NAMESPACE)):
            done(installation, "apply", "-n", namespace, "-f", "-", stdin=json.dumps(manifest))
        until_protected(installation)
        asyncio.run(write_entries(installation))
        yield installation


async def write_entries(installation: Installation) -> None:
    async with KubeClient(load_access(installation.kubeconfig)) as operator:
        assert await open_account(operator, "one") == FIRST
        await open_account(operator, "two")


def eventually(holds: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.1)
    return answer


def until_protected(installation: Installation) -> None:
    """Wait until each policy is in force: the API server takes them up a moment after Helm ends."""
    probes = {
        "dpmoe-ledger-entries": ("create", "-f", "-"),
        "dpmoe-ledger-definition": ("delete", "crd", DEFINITION),
        "dpmoe-ledger-namespace": ("delete", "namespace", OPERATOR_NAMESPACE),
        "dpmoe-status": status_patch("privateblock", "visits", DATA_NAMESPACE),
    }
    for policy, probe in probes.items():

        def refused(policy: str = policy, probe: tuple[str, ...] = probe) -> bool:
            result = installation.kubectl(*probe, "--dry-run=server", stdin=json.dumps(an_entry()))
            return f"ValidatingAdmissionPolicy '{policy}'" in result.stderr

        eventually(refused, f"{policy} is in force")


def an_entry(
    name: str = "entry-000000000099", namespace: str = OPERATOR_NAMESPACE, **metadata: Any
) -> dict[str, Any]:
    """An entry that the custom resource's schema accepts."""
    who = {"namespace": "a", "name": "b", "uid": "c"}
    return {
        "apiVersion": "dpmoe.dev/v1alpha1",
        "kind": "LedgerEntry",
        "metadata": {"name": name, "namespace": namespace, **metadata},
        "spec": {
            "sequence": int(name.removeprefix("entry-")),
            "previous": "0" * 64,
            "time": "2026-01-01T00:00:00Z",
            "writer": "test",
            "records": [{"launched": {"job": who, "workload": who}}],
            "digest": "1" * 64,
        },
    }


def status_patch(kind: str, name: str, namespace: str) -> tuple[str, ...]:
    patch = '--patch={"status":{"reason":"Forged"}}'
    return "patch", kind, name, "-n", namespace, "--subresource=status", "--type=merge", patch


def entries(installation: Installation) -> list[dict[str, Any]]:
    listed = done(installation, "get", "ledgerentries", "--all-namespaces", "--output=json")
    items: list[dict[str, Any]] = json.loads(listed)["items"]
    return items


def done(installation: Installation, *arguments: str, stdin: str | None = None) -> str:
    """Do what must succeed; returns what kubectl prints."""
    result = installation.kubectl(*arguments, stdin=stdin)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(installation: Installation, *arguments: str, stdin: str | None = None) -> str:
    """Make an attempt that must fail and leave the entries alone; returns what kubectl says."""
    before = entries(installation)
    assert before
    result = installation.kubectl(*arguments, stdin=stdin)
    assert result.returncode != 0, result.stdout
    assert entries(installation) == before
    return result.stderr


@pytest.mark.parametrize("attempt", ENTRIES)
def test_administrators_get_at_no_entry(installation: Installation, attempt: str) -> None:
    arguments, message = ENTRIES[attempt]
    assert message in refused(installation, *arguments)


@pytest.mark.parametrize("attempt", [name for name in ENTRIES if name != "change the content"])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_controllers_get_at_no_entry(
    installation: Installation, controller: str, attempt: str
) -> None:
    arguments, message = ENTRIES[attempt]
    who = (f"--as=system:serviceaccount:kube-system:{controller}", "--as-group=system:masters")
    said = refused(installation, *arguments, *who)
    assert f"system:serviceaccount:kube-system:{controller} {message}" in said


@pytest.mark.parametrize("namespace", [OPERATOR_NAMESPACE, OTHER_NAMESPACE])
@pytest.mark.parametrize("verb", [("create",), ("apply", "--server-side")], ids=["create", "apply"])
def test_administrators_add_no_entry(
    installation: Installation, namespace: str, verb: tuple[str, ...]
) -> None:
    manifest = json.dumps(an_entry(namespace=namespace))
    said = refused(installation, *verb, "-f", "-", stdin=manifest)
    assert f"admin may not create a LedgerEntry in namespace {namespace}" in said
    assert f"kubectl -n {OPERATOR_NAMESPACE} exec deploy/dpmoe-operator -- dpmoe ledger" in said


async def test_the_operator_adds_and_removes_entries(installation: Installation) -> None:
    async with KubeClient(load_access(installation.kubeconfig)) as operator:
        before = entries(installation)
        name = await open_account(operator, "three")
        assert [e["metadata"]["name"] for e in entries(installation)[len(before) :]] == [name]
        await KubeEntryStore(operator, OPERATOR_NAMESPACE).remove(name)
        assert entries(installation) == before


def test_with_every_right_the_operator_changes_no_entry_and_adds_none_elsewhere(
    installation: Installation,
) -> None:
    for attempt in ("annotate", "add a finalizer", "change nothing"):
        arguments, message = ENTRIES[attempt]
        assert message in refused(installation, *arguments, *AS_OPERATOR)
    elsewhere = json.dumps(an_entry(namespace=OTHER_NAMESPACE))
    said = refused(installation, "create", "-f", "-", *AS_OPERATOR, stdin=elsewhere)
    assert f"only the operator adds to the ledger, in {OPERATOR_NAMESPACE}" in said


@pytest.mark.parametrize(
    ("kind", "name", "namespace"),
    [("PrivateBlock", "visits", DATA_NAMESPACE), ("DPMoEJob", "triage", TEAM_NAMESPACE)],
)
def test_only_the_operator_writes_a_status(
    installation: Installation, kind: str, name: str, namespace: str
) -> None:
    def reason() -> str:
        column = "--output=jsonpath={.status.reason}"
        return done(installation, "get", kind, name, "-n", namespace, column)

    patch = status_patch(kind, name, namespace)
    result = installation.kubectl(*patch)
    assert f"admin may not write the status of {kind} {namespace}/{name}" in result.stderr
    assert reason() == ""
    done(installation, *patch, *AS_OPERATOR)
    assert reason() == "Forged"


@pytest.mark.parametrize(
    "arguments",
    [
        ("delete", "crd", DEFINITION, "--wait=false"),
        ("delete", "crd", DEFINITION, "--wait=false", "--cascade=orphan"),
        # A request for a whole collection names no object.
        ("delete", "--raw", f"{DEFINITIONS}?fieldSelector=metadata.name%3D{DEFINITION}"),
    ],
    ids=["delete", "orphan", "collection"],
)
def test_the_definition_is_not_deleted(
    installation: Installation, arguments: tuple[str, ...]
) -> None:
    said = refused(installation, *arguments)
    assert f"may not delete the CustomResourceDefinition {DEFINITION}" in said
    assert ALLOW in said


@pytest.mark.parametrize("change", CHANGES)
def test_the_definition_is_not_changed_to_what_cannot_read_the_entries(
    installation: Installation, change: str
) -> None:
    patch, message = CHANGES[change]
    said = refused(
        installation, "patch", "crd", DEFINITION, "--type=json", f"--patch={json.dumps(patch)}"
    )
    assert message in said
    assert ALLOW in said


def test_other_changes_of_definitions_pass(installation: Installation) -> None:
    more = [{"op": "add", "path": f"{SPEC}/properties/note", "value": {"type": "string"}}]
    for arguments in (
        ("annotate", "crd", DEFINITION, "team=platform"),
        ("patch", "crd", DEFINITION, "--type=json", f"--patch={json.dumps(more)}"),
        ("delete", "crd", "dpmoejobs.dpmoe.dev"),
    ):
        done(installation, *arguments, "--dry-run=server")


def test_only_the_whole_annotation_allows(installation: Installation) -> None:
    key = ALLOW.split("=")[0]
    delete = ("delete", "crd", DEFINITION, "--dry-run=server")
    patch = ("patch", "crd", DEFINITION, "--type=json", "--dry-run=server")
    done(installation, "annotate", "crd", DEFINITION, f"{key}=true")
    assert ALLOW in refused(installation, *delete)
    done(installation, "annotate", "crd", DEFINITION, ALLOW, "--overwrite")
    done(installation, *delete)
    for change, _ in CHANGES.values():
        done(installation, *patch, f"--patch={json.dumps(change)}")
    done(installation, "annotate", "crd", DEFINITION, f"{key}-")
    assert ALLOW in refused(installation, *delete)


def test_the_garbage_collector_gets_at_no_entry(installation: Installation) -> None:
    """The real one, on an entry whose owner is gone."""
    owner = ("configmap", "owner", "-n", OPERATOR_NAMESPACE)
    reference = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "name": "owner",
        "uid": json.loads(done(installation, "create", *owner, "--output=json"))["metadata"]["uid"],
    }
    name = "entry-000000000042"
    entry = json.dumps(an_entry(name, ownerReferences=[reference]))
    done(installation, "create", "-f", "-", *AS_OPERATOR, stdin=entry)
    before = entries(installation)
    done(installation, "delete", *owner)
    log = installation.server.directory / "kube-controller-manager.log"
    refusal = f"may not delete LedgerEntry {name}"
    eventually(lambda: refusal in log.read_text(), "the garbage collector tries")
    assert entries(installation) == before
    done(installation, "delete", *LEDGER, name, *AS_OPERATOR)


def test_uninstalling_opens_nothing(installation: Installation) -> None:
    def still_protected() -> None:
        for arguments, message in (ENTRIES["delete the collection"], ENTRIES["annotate"]):
            assert message in refused(installation, *arguments)
        assert ALLOW in refused(installation, "delete", "crd", DEFINITION, "--wait=false")
        assert ALLOW in refused(installation, "delete", "namespace", OPERATOR_NAMESPACE)
        result = installation.kubectl(*status_patch("privateblock", "visits", DATA_NAMESPACE))
        assert "may not write the status" in result.stderr

    before = entries(installation)
    installation.upgrade(VALUES | {"admission": {"enabled": False}})
    still_protected()
    installation.uninstall()
    still_protected()
    kept = ("serviceaccount/dpmoe-operator", "persistentvolumeclaim/dpmoe-operator-anchor")
    found = done(installation, "get", "-n", OPERATOR_NAMESPACE, "--output=name", *kept)
    assert found.split() == list(kept)

    installation.install(OPERATOR_NAMESPACE)
    installation.upgrade(VALUES)
    still_protected()
    assert entries(installation) == before


def test_entries_outlive_their_namespace(installation: Installation) -> None:
    """Even allowed to be deleted, and torn out of the namespace controller's hands."""
    delete = ("delete", "namespace", OPERATOR_NAMESPACE, "--wait=false")
    said = refused(installation, *delete)
    assert f"may not delete namespace {OPERATOR_NAMESPACE}" in said
    assert ALLOW in said
    done(installation, "delete", "namespace", OTHER_NAMESPACE, "--dry-run=server")

    before = entries(installation)
    done(installation, "annotate", "namespace", OPERATOR_NAMESPACE, ALLOW)
    done(installation, *delete)
    path = f"/api/v1/namespaces/{OPERATOR_NAMESPACE}"

    def only_entries_left() -> Any:
        namespace = json.loads(done(installation, "get", "--raw", path))
        conditions = {c["type"]: c for c in namespace["status"].get("conditions", [])}
        failure = conditions.get("NamespaceDeletionContentFailure", {"message": ""})
        remaining = conditions.get("NamespaceContentRemaining", {"status": ""})
        refused = "may not delete LedgerEntry" in failure["message"]
        return refused and remaining["status"] == "False" and namespace

    namespace = eventually(only_entries_left, "the namespace controller tries")
    assert entries(installation) == before
    del namespace["metadata"]["resourceVersion"]
    finalized = namespace | {"spec": {"finalizers": []}}
    finalize = ("replace", "--raw", f"{path}/finalize", "-f", "-")
    done(installation, *finalize, stdin=json.dumps(finalized))
    eventually(lambda: installation.kubectl("get", "--raw", path).returncode, "it is gone")
    assert entries(installation) == before

    # Helm takes over what is left, by its own annotations.
    done(installation, "create", "namespace", OPERATOR_NAMESPACE)
    installation.install(OPERATOR_NAMESPACE)
    assert entries(installation) == before
    assert ENTRIES["delete"][1] in refused(installation, *ENTRIES["delete"][0])


def test_who_says_so_may_forget_the_ledger(installation: Installation) -> None:
    done(installation, "annotate", "crd", DEFINITION, ALLOW)
    done(installation, "delete", "crd", DEFINITION, "--timeout=30s")
    installation.upgrade(VALUES)
    assert entries(installation) == []
    until_protected(installation)


def test_a_release_that_keeps_nothing_leaves_nothing(installation: Installation) -> None:
    installation.upgrade(VALUES | {"crds": {"keep": False}})
    said = installation.kubectl("create", "-f", "-", stdin=json.dumps(an_entry())).stderr
    assert "may not create a LedgerEntry" in said
    installation.uninstall()
    kinds = (
        "crd,validatingadmissionpolicy,validatingadmissionpolicybinding,clusterrole,"
        "serviceaccount,persistentvolumeclaim,deployment"
    )

    def gone() -> bool:
        return "dpmoe" not in done(installation, "get", kinds, "-n", OPERATOR_NAMESPACE, "-o=name")

    eventually(gone, "nothing is left")
    installation.install(OPERATOR_NAMESPACE)
