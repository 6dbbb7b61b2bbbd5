"""Values: documented, bounded by the schema, and refused by the name of the wrong field."""

import json
import re
from collections import Counter
from typing import Any

import pytest
import yaml
from tests.chart.conftest import FULL
from tests.chart.helm import CHART, ROOT, Helm

from dpmoe_operator.scheduling.policies import POLICIES

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown value": ({"extraEnv": []}, "extraEnv"),
    "unknown nested value": ({"image": {"name": "x"}}, "name"),
    "one namespace as a string": ({"dataNamespaces": "clinic"}, "dataNamespaces"),
    "a namespace that cannot exist": ({"dataNamespaces": ["Clinic"]}, "dataNamespaces/0"),
    "a namespace twice": ({"dataNamespaces": ["a", "a"]}, "dataNamespaces"),
    "a tag in the repository": ({"image": {"repository": "a/b:1"}}, "image/repository"),
    "a broken digest": ({"image": {"digest": "sha256:12"}}, "image/digest"),
    "a digest of the trainer": ({"trainer": {"image": {"digest": "12"}}}, "trainer/image/digest"),
    "an unknown pull policy": ({"image": {"pullPolicy": "Often"}}, "image/pullPolicy"),
    "an unknown policy": ({"scheduling": {"policy": "lottery"}}, "scheduling/policy"),
    "no time between rounds": ({"scheduling": {"roundSeconds": 0}}, "scheduling/roundSeconds"),
    "an hour as text": ({"scheduling": {"roundSeconds": "5"}}, "scheduling/roundSeconds"),
    "a CIDR without a length": ({"trainer": {"storageCidrs": ["10.0.0.1"]}}, "storageCidrs/0"),
    "a CIDR with too long a mask": ({"trainer": {"storageCidrs": ["10.0.0.1/33"]}}, "Cidrs/0"),
    "a resource without a domain": ({"trainer": {"gpuResource": "gpu"}}, "trainer/gpuResource"),
    "a yes": ({"crds": {"keep": "yes"}}, "crds/keep"),
    "an anchor without a unit": ({"anchor": {"size": "100"}}, "anchor/size"),
    "an anchor of no size": ({"anchor": {"size": "0Gi"}}, "anchor/size"),
    "a claim that cannot exist": ({"anchor": {"existingClaim": "My"}}, "anchor/existingClaim"),
    "a policy by name": ({"admission": {"policy": "deny"}}, "policy"),
    "a word as a quantity": ({"resources": {"limits": {"memory": "lots"}}}, "limits/memory"),
    "an unknown resource": ({"resources": {"limits": {"nvidia.com/gpu": 1}}}, "nvidia.com/gpu"),
    "a port out of range": ({"networkPolicy": {"apiServerPorts": [70000]}}, "apiServerPorts/0"),
    "a toleration's typo": ({"tolerations": [{"efect": "NoSchedule"}]}, "efect"),
    "a label that is no text": ({"nodeSelector": {"gpu": True}}, "nodeSelector/gpu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_fields_name(helm: Helm, case: str) -> None:
    values, field = REFUSED[case]
    result = helm("template", "dpmoe", str(CHART), values=values, check=False)
    assert result.returncode != 0
    assert field in result.stderr


def test_lint(helm: Helm) -> None:
    helm("lint", "--strict", str(CHART))
    helm("lint", "--strict", str(CHART), values=FULL)


def test_kubernetes_versions(helm: Helm) -> None:
    template = ("template", "dpmoe", str(CHART), "--kube-version")
    helm(*template, "1.30.5-gke.100")
    refused = helm(*template, "1.29.9", check=False)
    assert refused.returncode != 0
    assert "1.29.9" in refused.stderr


def test_the_schema_names_the_policies_that_exist() -> None:
    assert set(SCHEMA["properties"]["scheduling"]["properties"]["policy"]["enum"]) == set(POLICIES)


def objects(schema: Any) -> list[dict[str, Any]]:
    """All parts of the schema that describe an object."""
    if isinstance(schema, list):
        return [found for item in schema for found in objects(item)]
    if not isinstance(schema, dict):
        return []
    own = [schema] if schema.get("type") == "object" else []
    return own + [found for value in schema.values() for found in objects(value)]


def test_no_object_takes_unknown_fields() -> None:
    open_ones = [o for o in objects(SCHEMA) if o.get("additionalProperties") in (None, True)]
    assert open_ones == [SCHEMA["properties"]["global"]]


def leaves(values: Any, prefix: str = "") -> list[str]:
    """Paths of the single values; requests and limits count as one, as free maps do."""
    if not isinstance(values, dict) or not values or prefix == "/resources":
        return [prefix]
    return [leaf for key, value in values.items() for leaf in leaves(value, f"{prefix}/{key}")]


def fields(schema: dict[str, Any], prefix: str = "") -> list[str]:
    """Paths of what the schema allows."""
    if "properties" not in schema or prefix == "/resources":
        return [prefix]
    nested = schema["properties"].items()
    return [field for key, value in nested for field in fields(value, f"{prefix}/{key}")]


def test_values_and_schema_know_the_same_fields() -> None:
    assert sorted(leaves(VALUES)) == sorted(set(fields(SCHEMA)) - {"/global"})


def test_every_value_is_documented() -> None:
    text = (CHART / "values.yaml").read_text()
    documented = re.findall(r"# -- .*\n(?: *# .*\n)* *(\w+):", text)
    assert Counter(documented) == Counter(leaf.rsplit("/", 1)[1] for leaf in leaves(VALUES))


def test_the_install_page_lists_every_value() -> None:
    page = (ROOT / "docs" / "install.md").read_text()
    table = page.split("## Values")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `([A-Za-z.]+)` \|", table, flags=re.M)
    assert listed == [leaf[1:].replace("/", ".") for leaf in leaves(VALUES)]


def test_the_notes_say_what_to_do_next(helm: Helm) -> None:
    def notes(values: dict[str, Any]) -> str:
        install = ("install", "dpmoe", str(CHART), "--dry-run=client", "-n", "privacy")
        return helm(*install, values=values).stdout.split("NOTES:")[1]

    bare = notes({})
    assert "no data namespace is listed" in bare
    assert "trainer.image.digest" in bare
    pinned = notes(FULL | {"trainer": {"image": {"digest": f"sha256:{'b' * 64}"}}})
    assert "clinic-data, shop-data" in pinned
    assert "WARNING" not in pinned
    assert "kubectl -n privacy rollout status deployment/dpmoe-operator" in pinned
    unguarded = notes({"admission": {"enabled": False}, "anchor": {"enabled": False}})
    assert "Set\nadmission.enabled" in unguarded
    assert "Set anchor.enabled" in unguarded
