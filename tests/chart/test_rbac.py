"""The rights that the chart gives: exactly the operator's calls, and roles for people."""

from collections.abc import Iterable

import pytest
from tests.chart.calls import CLUSTER, DATA, LEDGER, Call
from tests.chart.helm import Helm, Manifest, only

READ = frozenset({"get", "list", "watch"})
WRITE = frozenset({"create", "update", "patch", "delete"})

PEOPLE = {
    "dpmoe-viewer": {"dpmoejobs": READ, "privateblocks": READ},
    "dpmoe-editor": {"dpmoejobs": READ | WRITE, "privateblocks": READ},
    "dpmoe-data-owner": {"privateblocks": READ | WRITE},
    "dpmoe-auditor": {"ledgerentries": READ},
}


def calls(role: Manifest) -> frozenset[Call]:
    return frozenset(
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    )


def roles(manifests: Iterable[Manifest]) -> list[Manifest]:
    return [m for m in manifests if m["kind"] in ("Role", "ClusterRole")]


def test_the_operator_may_call_what_it_calls_and_nothing_else(full: list[Manifest]) -> None:
    assert calls(only(full, "ClusterRole", "dpmoe-operator")) == CLUSTER
    assert calls(only(full, "Role", "dpmoe-operator-ledger", "privacy")) == LEDGER
    for namespace in ("clinic-data", "shop-data"):
        assert calls(only(full, "Role", "dpmoe-operator-data", namespace)) == DATA


def test_no_data_namespace_no_right_to_launch(default: list[Manifest]) -> None:
    assert {role["metadata"]["name"] for role in default if role["kind"] == "Role"} == {
        "dpmoe-operator-ledger"
    }


def test_only_its_own_lease_may_be_read_and_written(default: list[Manifest]) -> None:
    rules = only(default, "Role", "dpmoe-operator-ledger")["rules"]
    by_verb = {
        verb: rule.get("resourceNames")
        for rule in rules
        if rule["resources"] == ["leases"]
        for verb in rule["verbs"]
    }
    assert by_verb == {"get": ["dpmoe-operator"], "update": ["dpmoe-operator"], "create": None}


def test_every_binding_of_the_operator_names_its_service_account(full: list[Manifest]) -> None:
    account = only(full, "ServiceAccount", "dpmoe-operator")["metadata"]
    subject = {"kind": "ServiceAccount", "name": account["name"], "namespace": "privacy"}
    bindings = [m for m in full if m["kind"].endswith("RoleBinding")]
    bound = {(b["roleRef"]["kind"], b["roleRef"]["name"]) for b in bindings}
    assert bound == {
        ("ClusterRole", "dpmoe-operator"),
        ("Role", "dpmoe-operator-ledger"),
        ("Role", "dpmoe-operator-data"),
    }
    for binding in bindings:
        assert binding["subjects"] == [subject]
        # A ClusterRole bound in the cluster, a Role in its own namespace.
        same = only(
            full,
            binding["roleRef"]["kind"],
            binding["roleRef"]["name"],
            binding["metadata"].get("namespace"),
        )
        assert same["metadata"].get("namespace") == binding["metadata"].get("namespace")


def test_nothing_is_granted_by_wildcard_and_secrets_and_exec_never(full: list[Manifest]) -> None:
    for role in roles(full):
        name = role["metadata"]["name"]
        for group, resource, verb in calls(role):
            assert "*" not in group + resource + verb, name
            assert resource.split("/")[0] != "secrets", name
            assert resource not in ("pods/exec", "pods/attach", "pods/log"), name
            assert verb not in ("bind", "escalate", "impersonate", "deletecollection"), name
        assert not any("nonResourceURLs" in rule for rule in role["rules"]), name


@pytest.mark.parametrize("name", PEOPLE)
def test_roles_for_people(default: list[Manifest], name: str) -> None:
    expected = {
        ("dpmoe.dev", resource, verb) for resource, verbs in PEOPLE[name].items() for verb in verbs
    }
    assert calls(only(default, "ClusterRole", name)) == expected


def test_only_the_operator_writes_statuses_and_ledger_entries(full: list[Manifest]) -> None:
    for role in roles(full):
        if role["metadata"]["name"].startswith("dpmoe-operator"):
            continue
        for _, resource, verb in calls(role):
            assert "/" not in resource
            assert resource != "ledgerentries" or verb in READ


def aggregated(manifests: Iterable[Manifest]) -> dict[str, list[str]]:
    prefix = "rbac.authorization.k8s.io/aggregate-to-"
    return {
        role["metadata"]["name"]: [
            label.removeprefix(prefix)
            for label in role["metadata"]["labels"]
            if label.startswith(prefix)
        ]
        for role in roles(manifests)
    }


def test_the_clusters_own_roles_take_over_jobs_but_no_budget(
    helm: Helm, default: list[Manifest]
) -> None:
    into = aggregated(default)
    assert into.pop("dpmoe-viewer") == ["view"]
    assert into.pop("dpmoe-editor") == ["edit"]
    assert not any(into.values())
    assert not any(aggregated(helm.render({"rbac": {"aggregate": False}})).values())
