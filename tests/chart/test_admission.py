"""The admission policies as rendered: closed, bound, and about the right operator.

What they refuse is shown on a real API server, in tests/cluster/test_admission.py.
"""

import json

import pytest
from tests.chart.helm import Helm, Manifest, only

from dpmoe_operator.api import dpmoejob, ledgerentry, privateblock
from dpmoe_operator.api.base import GROUP, VERSION

POLICY, BINDING = "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"

MATCHED = {
    "dpmoe-ledger-entries": (
        GROUP,
        {"CREATE", "UPDATE", "DELETE"},
        {ledgerentry.PLURAL, f"{ledgerentry.PLURAL}/*"},
    ),
    "dpmoe-ledger-definition": (
        "apiextensions.k8s.io",
        {"UPDATE", "DELETE"},
        {"customresourcedefinitions"},
    ),
    "dpmoe-ledger-namespace": ("", {"DELETE"}, {"namespaces"}),
    "dpmoe-status": (
        GROUP,
        {"CREATE", "UPDATE"},
        {f"{privateblock.PLURAL}/status", f"{dpmoejob.PLURAL}/status"},
    ),
}
"""Group, operations and resources that each policy is asked about."""


def names(manifests: list[Manifest], kind: str) -> list[str]:
    return [manifest["metadata"]["name"] for manifest in manifests if manifest["kind"] == kind]


def test_each_policy_is_bound_to_refuse_everywhere(default: list[Manifest]) -> None:
    assert names(default, POLICY) == list(MATCHED)
    assert names(default, BINDING) == list(MATCHED)
    for name in MATCHED:
        # No matchResources: bound without exception, for every namespace.
        assert only(default, BINDING, name)["spec"] == {
            "policyName": name,
            "validationActions": ["Deny"],
        }


@pytest.mark.parametrize("name", MATCHED)
def test_a_policy_is_asked_about_all_that_it_protects(default: list[Manifest], name: str) -> None:
    spec = only(default, POLICY, name)["spec"]
    assert spec["failurePolicy"] == "Fail"
    # No resourceNames: requests for whole collections name nothing.
    assert set(spec["matchConstraints"]) == {"resourceRules"}
    [rule] = spec["matchConstraints"]["resourceRules"]
    assert set(rule) == {"apiGroups", "apiVersions", "operations", "resources"}
    group, operations, resources = MATCHED[name]
    assert (rule["apiGroups"], rule["apiVersions"]) == ([group], ["*"])
    assert set(rule["operations"]) == operations
    assert set(rule["resources"]) == resources


def test_every_refusal_says_what_to_do(default: list[Manifest]) -> None:
    for name in MATCHED:
        for validation in only(default, POLICY, name)["spec"]["validations"]:
            assert validation["reason"] == "Forbidden"
            assert validation["messageExpression"].startswith("request.userInfo.username + ' may ")


def test_they_know_the_operator_its_namespace_and_the_version(full: list[Manifest]) -> None:
    account = only(full, "ServiceAccount", "dpmoe-operator", "privacy")["metadata"]
    user = f"'system:serviceaccount:{account['namespace']}:{account['name']}'"
    for name in ("dpmoe-ledger-entries", "dpmoe-status"):
        assert user in json.dumps(only(full, POLICY, name))
    [condition] = only(full, POLICY, "dpmoe-ledger-namespace")["spec"]["matchConditions"]
    assert condition["expression"] == "oldObject.metadata.name == 'privacy'"
    [condition] = only(full, POLICY, "dpmoe-ledger-definition")["spec"]["matchConditions"]
    assert condition["expression"] == f"oldObject.metadata.name == '{ledgerentry.PLURAL}.{GROUP}'"
    assert f"'{VERSION}'" in json.dumps(only(full, POLICY, "dpmoe-ledger-definition"))


def test_they_and_the_account_that_they_name_outlive_the_release_like_the_ledger(
    helm: Helm, default: list[Manifest]
) -> None:
    disposable = helm.render({"crds": {"keep": False}})
    guards = [(kind, name) for kind in (POLICY, BINDING) for name in MATCHED]
    guards += [
        ("ServiceAccount", "dpmoe-operator"),
        ("PersistentVolumeClaim", "dpmoe-operator-anchor"),
    ]
    for kind, name in guards:
        kept = only(default, kind, name)["metadata"]["annotations"]
        assert kept == {"helm.sh/resource-policy": "keep"}
        assert "annotations" not in only(disposable, kind, name)["metadata"]


def test_they_can_be_left_out(helm: Helm) -> None:
    bare = helm.render({"admission": {"enabled": False}})
    assert names(bare, POLICY) == names(bare, BINDING) == []
