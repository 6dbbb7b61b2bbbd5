"""The contract of custom resources: discovery, schemas, status, generations; on both servers."""

import copy
import json
import uuid
from dataclasses import dataclass

import pytest

from dpmoe_operator.local.apiserver.patches import (
    APPLY_PATCH,
    JSON_PATCH,
    MERGE_PATCH,
    STRATEGIC_PATCH,
)

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
GROUP = "contract.dpmoe.dev"

ITEM = {
    "type": "object",
    "required": ["key"],
    "properties": {"key": {"type": "string"}, "value": {"type": "integer", "default": 7}},
}
SPEC = {
    "type": "object",
    "description": "What is wanted.",
    "required": ["size"],
    "properties": {
        "size": {"type": "integer", "minimum": 1, "maximum": 10, "description": "How big."},
        "mode": {"type": "string", "enum": ["a", "b"], "default": "a"},
        "name": {"type": "string", "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 5},
        "rate": {"type": "number", "minimum": 0, "exclusiveMinimum": True},
        "flag": {"type": "boolean"},
        "items": {
            "type": "array",
            "minItems": 1,
            "maxItems": 3,
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["key"],
            "items": ITEM,
        },
        "set": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
        "plain": {"type": "array", "items": {"type": "string"}},
        "counts": {"type": "object", "additionalProperties": {"type": "integer"}},
        "port": {"x-kubernetes-int-or-string": True},
        "any": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        "maybe": {"type": "string", "nullable": True},
        "time": {"type": "string", "format": "date-time"},
        "nested": {
            "type": "object",
            "default": {},
            "properties": {"depth": {"type": "integer", "default": 3}},
        },
        "one": {
            "type": "object",
            "properties": {"x": {"type": "string"}, "y": {"type": "string"}},
            "oneOf": [{"required": ["x"]}, {"required": ["y"]}],
        },
    },
}
STATUS = {
    "type": "object",
    "properties": {
        "phase": {"type": "string"},
        "conditions": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"type": "string"}, "status": {"type": "string"}},
            },
        },
    },
}
COLUMNS = [
    {"name": "Size", "type": "integer", "jsonPath": ".spec.size"},
    {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
    {
        "name": "Ready",
        "type": "string",
        "jsonPath": '.status.conditions[?(@.type=="Ready")].status',
    },
    {"name": "Mode", "type": "string", "jsonPath": ".spec.mode", "priority": 1},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
]


def definition(plural, kind):
    schema = {"type": "object", "properties": {"spec": SPEC, "status": STATUS}}
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": COLUMNS,
        "schema": {"openAPIV3Schema": {**schema, "required": ["spec"]}},
    }
    names = {"plural": plural, "kind": kind, "shortNames": [f"{plural}s"], "categories": ["all"]}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
    }


def is_established(answer):
    conditions = answer.body.get("status", {}).get("conditions") or []
    return ("Established", "True") in [(each["type"], each["status"]) for each in conditions]


def define(http, plural, kind):
    """Registers a resource and waits until it is served."""
    answer = http("POST", CRDS, definition(plural, kind))
    assert answer.status == 201, answer
    http.eventually(f"{CRDS}/{plural}.{GROUP}", is_established)
    http.eventually(f"/apis/{GROUP}/v1/{plural}", lambda answer: answer.status == 200)


@pytest.fixture(scope="session")
def kind(http):
    define(http, "widgets", "Widget")
    return "Widget"


@dataclass
class Widgets:
    """The widgets of one namespace."""

    path: str

    def body(self, spec, name="w", **more):
        head = {"apiVersion": f"{GROUP}/v1", "kind": "Widget", "metadata": {"name": name}}
        return {**head, "spec": spec, **more}


@pytest.fixture
def widgets(kind, namespace):
    return Widgets(f"/apis/{GROUP}/v1/namespaces/{namespace}/widgets")


def test_a_definition_is_established_and_discovered(http, kind):
    crd = http.get(f"{CRDS}/widgets.{GROUP}")
    conditions = {each["type"]: each["status"] for each in crd["status"]["conditions"]}
    assert conditions["NamesAccepted"] == "True"
    assert crd["status"]["acceptedNames"]["listKind"] == "WidgetList"
    assert crd["status"]["storedVersions"] == ["v1"]
    document = http.eventually(f"/apis/{GROUP}/v1", lambda answer: answer.status == 200).body
    rows = {each["name"]: each for each in document["resources"]}
    assert rows["widgets"]["singularName"] == "widget"
    assert rows["widgets"]["shortNames"] == ["widgetss"]
    assert set(rows["widgets/status"]["verbs"]) == {"get", "patch", "update"}


def test_a_malformed_definition_is_invalid(http):
    body = definition("gadgets", "Gadget")
    body["metadata"]["name"] = "something.else"
    answer = http("POST", CRDS, body)
    assert (answer.status, answer.body["reason"]) == (422, "Invalid")


def test_openapi_has_the_schema(http, kind):
    path = f"apis/{GROUP}/v1"
    index = http.eventually("/openapi/v3", lambda answer: path in answer.body["paths"]).body
    schemas = http.get(index["paths"][path]["serverRelativeURL"])["components"]["schemas"]
    found = [
        schema["properties"]["spec"]["properties"]["size"]["description"]
        for schema in schemas.values()
        if {"group": GROUP, "kind": "Widget", "version": "v1"}
        in schema.get("x-kubernetes-group-version-kind", [])
        and "spec" in schema["properties"]
    ]
    assert found == ["How big."]


def test_create_defaults_and_prunes(http, widgets):
    spec = {"size": 1, "unknown": 1, "items": [{"key": "x", "extra": 1}], "any": {"q": {"r": 1}}}
    answer = http("POST", widgets.path, widgets.body(spec, status={"phase": "hacked"}, other=1))
    assert answer.status == 201
    assert answer.body["spec"] == {
        "size": 1,
        "mode": "a",
        "nested": {"depth": 3},
        "items": [{"key": "x", "value": 7}],
        "any": {"q": {"r": 1}},
    }
    assert "status" not in answer.body
    assert "other" not in answer.body
    assert answer.body["metadata"]["generation"] == 1
    assert 'unknown field \\"spec.unknown\\"' in answer.headers["Warning"]


@pytest.mark.parametrize(
    "spec",
    [
        {"size": 1, "port": "80%", "maybe": None, "counts": {"a": 1}, "set": ["a", "b"]},
        {"size": 1, "port": 80, "time": "2026-01-01T00:00:00Z", "one": {"x": ""}, "rate": 0.5},
        {"size": 1.0, "rate": 1, "plain": ["a", "a"], "flag": False},
    ],
)
def test_valid_objects_are_accepted(http, widgets, spec):
    answer = http("POST", f"{widgets.path}?fieldValidation=Strict", widgets.body(spec))
    assert answer.status == 201, answer
    assert spec.items() <= answer.body["spec"].items()


def test_null_means_absent_where_it_is_not_allowed(http, widgets):
    created = http.create(widgets.path, widgets.body({"size": 1, "mode": None, "name": None}))
    assert created["spec"]["mode"] == "a"
    assert "name" not in created["spec"]


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({}, "spec.size"),
        ({"size": "x"}, "spec.size"),
        ({"size": 1.5}, "spec.size"),
        ({"size": 0}, "spec.size"),
        ({"size": 11}, "spec.size"),
        ({"size": True}, "spec.size"),
        ({"size": 1, "mode": "c"}, "spec.mode"),
        ({"size": 1, "name": "ABC"}, "spec.name"),
        ({"size": 1, "name": "a"}, "spec.name"),
        ({"size": 1, "name": "abcdef"}, "spec.name"),
        ({"size": 1, "rate": 0}, "spec.rate"),
        ({"size": 1, "flag": "yes"}, "spec.flag"),
        ({"size": 1, "items": []}, "spec.items"),
        ({"size": 1, "items": [{"key": k} for k in "abcd"]}, "spec.items"),
        ({"size": 1, "items": [{"value": 1}]}, "spec.items[0].key"),
        ({"size": 1, "items": [{"key": "a"}, {"key": "a", "value": 1}]}, "spec.items[1]"),
        ({"size": 1, "set": ["a", "a"]}, "spec.set[1]"),
        ({"size": 1, "counts": {"a": "x"}}, "spec.counts.a"),
        ({"size": 1, "port": 1.5}, "spec.port"),
        ({"size": 1, "time": "yesterday"}, "spec.time"),
        ({"size": 1, "one": {"x": "", "y": ""}}, None),
        ({"size": 1, "plain": "text"}, "spec.plain"),
    ],
)
def test_invalid_objects_are_refused_by_field(http, widgets, spec, field):
    answer = http("POST", widgets.path, widgets.body(spec))
    assert (answer.status, answer.body["reason"]) == (422, "Invalid"), answer
    assert answer.body["details"]["group"] == GROUP
    if field is not None:
        assert field in [each["field"] for each in answer.body["details"]["causes"]]
        assert f"{field}: " in answer.body["message"]


def test_a_missing_spec_is_invalid(http, widgets):
    body = widgets.body({})
    del body["spec"]
    answer = http("POST", widgets.path, body)
    assert answer.body["message"] == f'Widget.{GROUP} "w" is invalid: spec: Required value'


@pytest.mark.parametrize("field", ["kind", "apiVersion"])
def test_custom_objects_must_say_what_they_are(http, widgets, field):
    body = widgets.body({"size": 1})
    del body[field]
    answer = http("POST", widgets.path, body)
    assert (answer.status, answer.body["reason"]) == (400, "BadRequest")


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"spec": {"size": 1, "typo": 1}}, "spec.typo"),
        ({"spec": {"size": 1, "items": [{"key": "a", "typo": 1}]}}, "spec.items[0].typo"),
        ({"metadata": {"name": "w", "typo": 1}}, "metadata.typo"),
        ({"typo": 1}, "typo"),
    ],
)
def test_strict_validation_names_unknown_fields(http, widgets, more, field):
    body = {**widgets.body({"size": 1}), **more}
    answer = http("POST", f"{widgets.path}?fieldValidation=Strict", body)
    assert (answer.status, answer.body["reason"]) == (400, "BadRequest")
    assert f'strict decoding error: unknown field "{field}"' in answer.body["message"]
    ignored = http("POST", f"{widgets.path}?fieldValidation=Ignore", body)
    assert ignored.status == 201
    assert "Warning" not in ignored.headers


def test_unknown_validations_are_refused(http, widgets):
    answer = http("POST", f"{widgets.path}?fieldValidation=Maybe", widgets.body({"size": 1}))
    assert answer.status == 422


def test_an_update_needs_a_version(http, widgets):
    created = http.create(widgets.path, widgets.body({"size": 1}))
    answer = http("PUT", f"{widgets.path}/w", widgets.body({"size": 2}))
    assert (answer.status, answer.body["reason"]) == (422, "Invalid")
    assert "metadata.resourceVersion" in answer.body["message"]
    body = copy.deepcopy(created)
    body["spec"]["size"] = 2
    assert http("PUT", f"{widgets.path}/w", body).body["spec"]["size"] == 2
    assert http("PUT", f"{widgets.path}/w", body).status == 409


def test_generation_counts_changes_of_the_spec_only(http, widgets):
    http.create(widgets.path, widgets.body({"size": 1}))
    path = f"{widgets.path}/w"

    def generation_after(path, patch):
        return http.merge(path, patch)["metadata"]["generation"]

    assert generation_after(path, {"metadata": {"labels": {"a": "b"}}}) == 1
    assert generation_after(f"{path}/status", {"status": {"phase": "P"}}) == 1
    assert generation_after(path, {"spec": {"size": 1}}) == 1
    assert generation_after(path, {"spec": {"size": 2}}) == 2


def test_spec_and_status_are_written_apart(http, widgets):
    http.create(widgets.path, widgets.body({"size": 1}))
    path = f"{widgets.path}/w"
    http.merge(path, {"spec": {"size": 2}, "status": {"phase": "no"}})
    assert "status" not in http.get(path)
    patch = {"status": {"phase": "yes"}, "spec": {"size": 9}, "metadata": {"labels": {"a": "b"}}}
    http.merge(f"{path}/status", patch)
    found = http.get(path)
    assert (found["spec"]["size"], found["status"]) == (2, {"phase": "yes"})
    assert "labels" not in found["metadata"]
    assert http.get(f"{path}/status")["status"] == {"phase": "yes"}
    replaced = {**found, "status": {"phase": "put"}, "spec": {"size": 3}}
    assert http("PUT", f"{path}/status", replaced).body["status"] == {"phase": "put"}
    assert http.get(path)["spec"]["size"] == 2


def test_the_status_is_validated_too(http, widgets):
    http.create(widgets.path, widgets.body({"size": 1}))
    patch = {"status": {"phase": 1}}
    answer = http("PATCH", f"{widgets.path}/w/status", patch, content_type=MERGE_PATCH)
    assert (answer.status, answer.body["reason"]) == (422, "Invalid")


def test_a_patch_is_defaulted_and_validated(http, widgets):
    http.create(widgets.path, widgets.body({"size": 1, "mode": "b"}))
    path = f"{widgets.path}/w"
    assert http.merge(path, {"spec": {"mode": None}})["spec"]["mode"] == "a"
    refused = http("PATCH", path, {"spec": {"size": 0}}, content_type=MERGE_PATCH)
    assert refused.status == 422
    operations = [{"op": "add", "path": "/spec/items", "value": [{"key": "k"}]}]
    patched = http("PATCH", path, operations, content_type=JSON_PATCH).body
    assert patched["spec"]["items"] == [{"key": "k", "value": 7}]
    strict = f"{path}?fieldValidation=Strict"
    assert http("PATCH", strict, {"spec": {"typo": 1}}, content_type=MERGE_PATCH).status in (
        400,
        422,
    )


def test_custom_resources_know_no_strategic_merge(http, widgets):
    http.create(widgets.path, widgets.body({"size": 1}))
    answer = http("PATCH", f"{widgets.path}/w", {"spec": {}}, content_type=STRATEGIC_PATCH)
    assert (answer.status, answer.body["reason"]) == (415, "UnsupportedMediaType")


def test_apply_merges_lists_by_their_type(http, widgets):
    def apply(spec, manager):
        path = f"{widgets.path}/w?fieldManager={manager}&force=true"
        content = json.dumps(widgets.body(spec)).encode()
        return http("PATCH", path, content, content_type=APPLY_PATCH)

    first = {"size": 1, "items": [{"key": "a"}], "set": ["x"]}
    assert apply(first, "one").status == 201
    spec = apply({"size": 1, "items": [{"key": "b"}], "set": ["y"]}, "two").body["spec"]
    assert spec["items"] == [{"key": "a", "value": 7}, {"key": "b", "value": 7}]
    assert spec["set"] == ["x", "y"]
    assert apply({"size": 99}, "one").status == 422


def test_deletion_waits_for_finalizers_and_counts_a_generation(http, widgets):
    body = widgets.body({"size": 1})
    body["metadata"]["finalizers"] = ["test.dev/x"]
    http.create(widgets.path, body)
    path = f"{widgets.path}/w"
    marked = http("DELETE", path).body
    assert marked["metadata"]["deletionTimestamp"]
    assert marked["metadata"]["generation"] == 2
    operations = [
        {"op": "test", "path": "/metadata/resourceVersion", "value": "1"},
        {"op": "remove", "path": "/metadata/finalizers/0"},
    ]
    assert http("PATCH", path, operations, content_type=JSON_PATCH).status == 422
    operations[0]["value"] = marked["metadata"]["resourceVersion"]
    assert http("PATCH", path, operations, content_type=JSON_PATCH).status == 200
    assert http("GET", path).status == 404


def test_lists_and_tables_follow_the_definition(http, widgets):
    http.create(widgets.path, widgets.body({"size": 4}))
    conditions = [{"type": "Other", "status": "False"}, {"type": "Ready", "status": "True"}]
    http.merge(f"{widgets.path}/w/status", {"status": {"phase": "P", "conditions": conditions}})
    assert http.get(widgets.path)["kind"] == "WidgetList"
    accept = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
    table = http("GET", widgets.path, accept=accept).body
    columns = [(each["name"], each["priority"]) for each in table["columnDefinitions"]]
    expected = [("Name", 0), ("Size", 0), ("Phase", 0), ("Ready", 0), ("Mode", 1), ("Age", 0)]
    assert columns == expected
    assert table["rows"][0]["cells"][:5] == ["w", 4, "P", "True", "a"]
    assert table["rows"][0]["cells"][5].endswith("s")
    single = http("GET", f"{widgets.path}/w", accept=accept).body
    assert single["rows"][0]["cells"][1] == 4


def test_a_version_from_before_the_definition_is_gone(http, widgets):
    [event] = http.watch(widgets.path, "resourceVersion=1&timeoutSeconds=1")
    assert event["type"] == "ERROR"
    assert (event["object"]["code"], event["object"]["reason"]) == (410, "Expired")


def test_a_deleted_definition_takes_its_objects_along(http, namespace):
    plural = f"gadgets{uuid.uuid4().hex[:6]}"
    define(http, plural, plural.capitalize())
    path = f"/apis/{GROUP}/v1/namespaces/{namespace}/{plural}"
    body = {
        "apiVersion": f"{GROUP}/v1",
        "kind": plural.capitalize(),
        "metadata": {"name": "g"},
        "spec": {"size": 1},
    }
    http.create(path, body)
    http("DELETE", f"{CRDS}/{plural}.{GROUP}")
    http.eventually(f"{CRDS}/{plural}.{GROUP}", lambda answer: answer.status == 404)
    http.eventually(path, lambda answer: answer.status == 404)
