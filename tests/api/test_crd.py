"""CustomResourceDefinitions: structural, bounded everywhere, and saying what the models say."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.builders import block_spec, job_spec

from dpmoe_operator.api import dpmoejob, privateblock
from dpmoe_operator.api.base import ApiModel, parse
from dpmoe_operator.api.crd import all_definitions, structural_schema
from dpmoe_operator.api.dpmoejob import DPMoEJobSpec, DPMoEJobStatus
from dpmoe_operator.api.ledgerentry import LedgerEntrySpec
from dpmoe_operator.api.privateblock import PrivateBlockSpec, PrivateBlockStatus
from dpmoe_operator.cli.crds import render

ROOT = Path(__file__).parents[2]

Node = tuple[str, dict[str, Any]]

UNDERSTOOD = {
    *("type", "format", "description", "default", "enum", "pattern", "required"),
    *("properties", "additionalProperties", "items"),
    *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
    *("minimum", "maximum"),
    *("x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
}
"""What structural schemas may hold, of what pydantic can write."""


def nodes(schema: dict[str, Any], path: str) -> Iterator[Node]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from nodes(schema["additionalProperties"], f"{path}{{}}")


def versions() -> Iterator[tuple[str, dict[str, Any]]]:
    for plural, definition in all_definitions().items():
        (version,) = definition["spec"]["versions"]
        yield plural, version


ALL: list[Node] = [
    node
    for plural, version in versions()
    for node in nodes(version["schema"]["openAPIV3Schema"], plural)
]
IDS = [path for path, _ in ALL]
FIELDS = [node for node in ALL if ".spec" in node[0] or ".status" in node[0]]


def test_schemas_use_nothing_that_kubernetes_does_not_understand() -> None:
    assert {path: keys for path, node in ALL if (keys := node.keys() - UNDERSTOOD)} == {}


def test_every_node_has_one_plain_type() -> None:
    plain = {"object", "array", "string", "integer", "number", "boolean"}
    assert [path for path, node in ALL if node.get("type") not in plain] == []


def test_no_node_mixes_properties_with_free_keys() -> None:
    mixed = [path for path, node in ALL if {"properties", "additionalProperties"} <= node.keys()]
    assert mixed == []


def test_every_string_is_bounded() -> None:
    unbounded = [
        path
        for path, node in FIELDS
        if node["type"] == "string" and not {"maxLength", "enum"} & node.keys()
    ]
    assert unbounded == []


def test_every_list_and_map_is_bounded() -> None:
    assert [p for p, node in FIELDS if node["type"] == "array" and "maxItems" not in node] == []
    maps = [(p, node) for p, node in FIELDS if "additionalProperties" in node]
    assert maps
    assert [p for p, node in maps if "maxProperties" not in node] == []


def test_every_integer_of_a_spec_is_bounded_on_both_sides() -> None:
    integers = [(p, n) for p, n in FIELDS if n["type"] == "integer" and ".spec" in p]
    assert integers
    assert [p for p, n in integers if not {"minimum", "maximum"} <= n.keys()] == []
    assert [p for p, n in integers if n["format"] != "int64"] == []


def test_no_amount_is_a_float() -> None:
    assert [path for path, node in FIELDS if node["type"] == "number"] == []


def test_defaults_hold_no_null() -> None:
    defaults = {path: json.dumps(node["default"]) for path, node in ALL if "default" in node}
    assert defaults
    assert {path: text for path, text in defaults.items() if "null" in text} == {}


def test_lists_of_distinct_items_say_so() -> None:
    kinds = {path: node.get("x-kubernetes-list-type") for path, node in ALL}
    for path in (
        "privateblocks.spec.dataset.partition.values",
        "privateblocks.spec.budget.orders",
        "dpmoejobs.spec.blocks.names",
        "dpmoejobs.spec.model.upcycle.layers",
    ):
        assert kinds[path] == "set"
    assert kinds["privateblocks.spec.access"] == "map"
    assert kinds["dpmoejobs.status.conditions"] == "map"


@pytest.mark.parametrize("plural", [privateblock.PLURAL, dpmoejob.PLURAL, "ledgerentries"])
def test_names_fit_into_labels_and_host_names(plural: str) -> None:
    (version,) = all_definitions()[plural]["spec"]["versions"]
    metadata = version["schema"]["openAPIV3Schema"]["properties"]["metadata"]
    assert metadata["properties"]["name"]["maxLength"] == 63


def rules(plural: str, *path: str) -> list[str]:
    (version,) = all_definitions()[plural]["spec"]["versions"]
    node = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    for name in path:
        node = node["properties"][name]
    return [rule["rule"] for rule in node.get("x-kubernetes-validations", [])]


def frozen_by(plural: str) -> set[str]:
    return {match for rule in rules(plural) for match in re.findall(r"has\(self\.(\w+)\)", rule)}


def test_account_fields_of_a_block_are_frozen() -> None:
    assert frozen_by(privateblock.PLURAL) == {"dataset", "disjointFrom", "unit", "budget"}


def test_retirement_of_a_block_is_for_ever() -> None:
    assert "self.retired || !oldSelf.retired" in rules(privateblock.PLURAL)
    (version,) = all_definitions()[privateblock.PLURAL]["spec"]["versions"]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    # The rule may read the field since it is always there.
    assert spec["properties"]["retired"]["default"] is False


def test_all_of_a_job_is_frozen_but_how_it_waits() -> None:
    fields = set(structural_schema(DPMoEJobSpec)["properties"])
    assert fields - frozen_by(dpmoejob.PLURAL) == {
        *("suspend", "priority", "ttlSecondsAfterFinished")
    }


def test_ledger_entries_are_frozen_whole_and_have_no_status() -> None:
    assert rules("ledgerentries") == ["self == oldSelf"]
    (version,) = all_definitions()["ledgerentries"]["spec"]["versions"]
    assert "subresources" not in version


def test_columns_point_at_fields_that_exist() -> None:
    for plural, version in versions():
        known = {path.removeprefix(plural) for path, _ in ALL if path.startswith(f"{plural}.")}
        known |= {".metadata.creationTimestamp"}
        assert {c["jsonPath"] for c in version["additionalPrinterColumns"]} <= known


MODELS: list[tuple[str, str, type[ApiModel]]] = [
    ("privateblocks", "spec", PrivateBlockSpec),
    ("privateblocks", "status", PrivateBlockStatus),
    ("dpmoejobs", "spec", DPMoEJobSpec),
    ("dpmoejobs", "status", DPMoEJobStatus),
    ("ledgerentries", "spec", LedgerEntrySpec),
]


@pytest.mark.parametrize(("plural", "part", "model"), MODELS)
def test_schema_has_the_fields_of_the_model(plural: str, part: str, model: type[ApiModel]) -> None:
    (version,) = all_definitions()[plural]["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]["properties"][part]
    assert set(schema["properties"]) == {f.alias for f in model.model_fields.values()}
    required = {f.alias for f in model.model_fields.values() if f.is_required()}
    assert set(schema.get("required", [])) == required


def test_defaults_of_the_schema_are_those_of_the_model() -> None:
    """What the API server fills in and what the operator fills in must mean the same."""
    schema = structural_schema(DPMoEJobSpec)
    filled = {
        **{
            name: node["default"]
            for name, node in schema["properties"].items()
            if "default" in node
        },
        **job_spec(),
    }
    assert parse(DPMoEJobSpec, filled) == parse(DPMoEJobSpec, job_spec())


@pytest.mark.parametrize("name", render())
def test_files_are_the_generated_ones(name: str) -> None:
    assert (ROOT / "crds" / name).read_text() == render()[name], "run `make crds`"


PARSERS: dict[str, type[ApiModel]] = {"PrivateBlock": PrivateBlockSpec, "DPMoEJob": DPMoEJobSpec}


def documented() -> Iterator[tuple[str, dict[str, Any]]]:
    """Our manifests in examples/ and in the code blocks of the documentation."""
    for path in sorted((ROOT / "examples").rglob("*.yaml")):
        for manifest in yaml.safe_load_all(path.read_text()):
            if manifest and manifest["kind"] in PARSERS:
                yield f"{path.name}:{manifest['metadata']['name']}", manifest
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for number, code in enumerate(re.findall(r"```ya?ml\n(.*?)```", path.read_text(), re.S)):
            for manifest in yaml.safe_load_all(code):
                if isinstance(manifest, dict) and manifest.get("kind") in PARSERS:
                    yield f"{path.name}:{number}", manifest


DOCUMENTED = dict(documented())


def test_examples_cover_both_kinds() -> None:
    assert {manifest["kind"] for manifest in DOCUMENTED.values()} == set(PARSERS)


@pytest.mark.parametrize("manifest", DOCUMENTED.values(), ids=DOCUMENTED.keys())
def test_documented_manifests_parse(manifest: dict[str, Any]) -> None:
    assert manifest["apiVersion"] == "dpmoe.dev/v1alpha1"
    parse(PARSERS[manifest["kind"]], manifest["spec"])


def test_builders_parse() -> None:
    parse(PrivateBlockSpec, block_spec())
    parse(DPMoEJobSpec, job_spec())
