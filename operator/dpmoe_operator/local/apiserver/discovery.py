"""Discovery: which groups, versions and resources there are, and their OpenAPI v3 documents.

Clients read these first. kubectl maps what users type to paths by them, validates by the query
parameters that the OpenAPI documents list, and explains fields by their schemas.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

from .patches import APPLY_PATCH, JSON_PATCH, MERGE_PATCH
from .resources import Object, Registry, Resource
from .store import encode

VERSION = {
    "major": "1",
    "minor": "36",
    "gitVersion": "v1.36.0+dpmoe.embedded",
    "gitCommit": "",
    "gitTreeState": "clean",
    "buildDate": "1970-01-01T00:00:00Z",
    "goVersion": "none",
    "compiler": "none",
    "platform": "python",
}

_METADATA_REF = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"


def core_versions(host: str) -> Object:
    """`/api`."""
    addresses = [{"clientCIDR": "0.0.0.0/0", "serverAddress": host}]
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": addresses}


def groups(registry: Registry) -> Object:
    """`/apis`."""
    found = [_group(name, versions) for name, versions in registry.versions().items() if name != ""]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": found}


def group(registry: Registry, name: str) -> Object | None:
    """`/apis/GROUP`, or None."""
    versions = registry.versions().get(name)
    return {"kind": "APIGroup", "apiVersion": "v1", **_group(name, versions)} if versions else None


def _group(name: str, versions: list[str]) -> Object:
    served = [{"groupVersion": f"{name}/{each}", "version": each} for each in versions]
    return {"name": name, "versions": served, "preferredVersion": served[0]}


def resources(registry: Registry, group: str, version: str) -> Object | None:
    """`/api/v1` and `/apis/GROUP/VERSION`, or None."""
    found = [each for each in registry if (each.group, each.version) == (group, version)]
    if not found:
        return None
    rows = [row for resource in found for row in _rows(resource)]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": found[0].api_version,
        "resources": rows,
    }


def _rows(resource: Resource) -> Iterator[Object]:
    row: Object = {
        "name": resource.plural,
        "singularName": resource.singular,
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": list(resource.verbs),
    }
    if resource.short_names:
        row["shortNames"] = list(resource.short_names)
    if resource.categories:
        row["categories"] = list(resource.categories)
    yield row
    verbs_of = {"log": ["get"], "binding": ["create"], "status": ["get", "patch", "update"]}
    names = (*resource.subresources, *(("status",) if resource.has_status else ()))
    for name in names:
        yield {
            "name": f"{resource.plural}/{name}",
            "singularName": "",
            "namespaced": resource.namespaced,
            "kind": "Binding" if name == "binding" else resource.kind,
            "verbs": verbs_of[name],
        }


# OpenAPI v3


def openapi_index(registry: Registry) -> Object:
    """`/openapi/v3`; the hash in each address changes with its document, for client caches."""
    paths = {}
    for name, versions in registry.versions().items():
        for version in versions:
            path = f"apis/{name}/{version}" if name else f"api/{version}"
            document = openapi_document(registry, name, version)
            digest = hashlib.sha256(encode(document)).hexdigest()
            paths[path] = {"serverRelativeURL": f"/openapi/v3/{path}?hash={digest}"}
    return {"paths": paths}


def openapi_document(registry: Registry, group: str, version: str) -> Object | None:
    """The OpenAPI v3 document of one group and version, or None."""
    found = [each for each in registry if (each.group, each.version) == (group, version)]
    if not found:
        return None
    return {
        "openapi": "3.0.0",
        "info": {"title": "dpmoe embedded API server", "version": VERSION["gitVersion"]},
        "paths": {path: item for each in found for path, item in _paths(each).items()},
        "components": {
            "schemas": {_METADATA_REF: _METADATA_SCHEMA}
            | {_schema_name(each): _schema(each) for each in found}
        },
    }


def _schema_name(resource: Resource) -> str:
    reversed_group = ".".join(reversed((resource.group or "core").split(".")))
    return f"{reversed_group}.{resource.version}.{resource.kind}"


def _gvk(resource: Resource) -> Object:
    return {"group": resource.group, "version": resource.version, "kind": resource.kind}


def _schema(resource: Resource) -> Object:
    known: Object = {
        "apiVersion": {"type": "string", "description": "Version of this representation."},
        "kind": {"type": "string", "description": "The kind of this object."},
        "metadata": {
            "description": "Standard object metadata.",
            "allOf": [{"$ref": f"#/components/schemas/{_METADATA_REF}"}],
        },
    }
    if resource.schema is None:
        content: Any = {
            "type": "object",
            "description": f"{resource.kind}: stored without validation by this server.",
            "x-kubernetes-preserve-unknown-fields": True,
        }
    else:
        content = resource.schema
    properties = {**content.get("properties", {}), **known}
    return {
        **content,
        "properties": properties,
        "x-kubernetes-group-version-kind": [_gvk(resource)],
    }


def _paths(resource: Resource) -> Object:
    """The operations; kubectl looks at `patch` and its parameters before it applies."""
    prefix = f"/apis/{resource.group}" if resource.group else "/api"
    prefix += f"/{resource.version}"
    if resource.namespaced:
        prefix += "/namespaces/{namespace}"
    reference = {"schema": {"$ref": f"#/components/schemas/{_schema_name(resource)}"}}
    answer = {"200": {"description": "OK", "content": {"application/json": reference}}}

    def operation(action: str, *content_types: str) -> Object:
        described: Object = {
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": _gvk(resource),
            "responses": answer,
        }
        if content_types:
            described["parameters"] = [
                {"name": name, "in": "query", "schema": {"type": "string"}}
                for name in ("dryRun", "fieldManager", "fieldValidation")
            ]
            described["requestBody"] = {"content": dict.fromkeys(content_types, reference)}
        return described

    # Strategic merge is not listed: kubectl would then want the merge keys in the schemas, and
    # without it takes them from its own Go types.
    patch = operation("patch", JSON_PATCH, MERGE_PATCH, APPLY_PATCH)
    return {
        f"{prefix}/{resource.plural}": {
            "get": operation("list"),
            "post": operation("post", "application/json"),
        },
        f"{prefix}/{resource.plural}/{{name}}": {
            "get": operation("get"),
            "put": operation("put", "application/json"),
            "patch": patch,
            "delete": operation("delete"),
        },
    }


_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA_SCHEMA: Object = {
    "type": "object",
    "description": "ObjectMeta is metadata that all persisted resources must have.",
    "properties": {
        "name": {"type": "string", "description": "Unique within a namespace."},
        "generateName": {"type": "string", "description": "Prefix of a generated name."},
        "namespace": {"type": "string", "description": "The space of the name."},
        "labels": {**_TEXTS, "description": "What selectors select by."},
        "annotations": {**_TEXTS, "description": "Unstructured notes."},
        "finalizers": {"type": "array", "items": {"type": "string"}},
        "ownerReferences": {"type": "array", "items": {"type": "object"}},
        "resourceVersion": {"type": "string", "description": "The version of the object."},
        "generation": {"type": "integer", "description": "Counts changes of the desired state."},
        "uid": {"type": "string", "description": "Unique in time and space."},
        "creationTimestamp": {"type": "string", "format": "date-time"},
        "deletionTimestamp": {"type": "string", "format": "date-time"},
    },
}
