"""From the pydantic models to CustomResourceDefinitions with structural schemas.

Kubernetes accepts a subset of OpenAPI v3 (no `$ref`, no null types, no `additionalProperties`
beside properties), so the JSON schema that pydantic writes is rewritten into that subset. The CEL
rules here repeat what the operator checks, and refuse a forbidden change before it is stored.
"""

from collections.abc import Iterable
from typing import Any

from dpmoe_operator.api import dpmoejob, ledgerentry, privateblock
from dpmoe_operator.api.base import GROUP, VERSION, ApiModel

Json = dict[str, Any]

_DROPPED = {"title", "additionalProperties", "propertyNames", "discriminator"}


def structural_schema(model: type[ApiModel]) -> Json:
    """The structural schema of a model, by its wire names."""
    schema = model.model_json_schema(by_alias=True, mode="validation")
    return _rewrite(schema, schema.get("$defs", {}))


def _rewrite(node: Json, definitions: Json) -> Json:
    if "$ref" in node:
        target = definitions[node["$ref"].rsplit("/", 1)[1]]
        node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
    if "anyOf" in node:
        options = [option for option in node["anyOf"] if option.get("type") != "null"]
        assert len(options) == 1, f"only optional fields may have alternatives: {node}"
        rest = {key: value for key, value in node.items() if key != "anyOf"}
        return _rewrite({**options[0], **rest}, definitions)
    result: Json = {}
    for key, value in node.items():
        if key == "properties":
            result[key] = {name: _rewrite(child, definitions) for name, child in value.items()}
        elif key == "items" or (key == "additionalProperties" and isinstance(value, dict)):
            result[key] = _rewrite(value, definitions)
        elif key == "patternProperties":
            # Keys that match a pattern: the API server knows no such thing, the operator checks.
            (child,) = value.values()
            result["additionalProperties"] = _rewrite(child, definitions)
        elif key == "const":
            result["enum"] = [value]
        elif key == "default":
            if value is not None:
                result[key] = _without_nulls(value)
        elif key != "$defs" and key not in _DROPPED:
            result[key] = value
    if result.get("type") == "integer":
        result["format"] = "int64"
    return result


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _frozen(fields: Iterable[str]) -> list[Json]:
    """CEL transition rules: each field stays as it was created, absent if it was absent."""
    return [
        {
            "rule": f"has(self.{f}) == has(oldSelf.{f})"
            f" && (!has(self.{f}) || self.{f} == oldSelf.{f})",
            "message": f"spec.{f} may not change after creation",
            "reason": "FieldValueForbidden",
            "fieldPath": f".{f}",
        }
        for f in fields
    ]


def _exactly_one(*fields: str) -> Json:
    count = " + ".join(f"(has(self.{field}) ? 1 : 0)" for field in fields)
    return {"rule": f"{count} == 1", "message": f"exactly one of {', '.join(fields)} must be set"}


def _definition(
    *,
    kind: str,
    plural: str,
    short: str | None,
    schema: Json,
    status: Json | None,
    columns: list[Json],
) -> Json:
    properties: Json = {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        # Pod host names and labels are made from it, with suffixes.
        "metadata": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 63}}},
        "spec": schema,
    }
    version: Json = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": columns,
        "schema": {
            "openAPIV3Schema": {"type": "object", "required": ["spec"], "properties": properties}
        },
    }
    if status is not None:
        properties["status"] = status
        version["subresources"] = {"status": {}}
    names: Json = {
        "kind": kind,
        "listKind": f"{kind}List",
        "plural": plural,
        "singular": kind.lower(),
    }
    if short is not None:
        names |= {"shortNames": [short], "categories": ["dp"]}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def private_block() -> Json:
    """The CustomResourceDefinition of PrivateBlock."""
    schema = structural_schema(privateblock.PrivateBlockSpec)
    schema["x-kubernetes-validations"] = [
        *_frozen(privateblock.IMMUTABLE),
        {
            "rule": "self.retired || !oldSelf.retired",
            "message": "spec.retired may not change back: a retired block stays retired",
            "reason": "FieldValueForbidden",
            "fieldPath": ".retired",
        },
    ]
    for table in ("dataset", "evaluation"):
        schema["properties"][table]["x-kubernetes-validations"] = [
            _exactly_one("path", "claim", "huggingFace"),
            {
                "rule": "has(self.huggingFace) || has(self.format)",
                "message": "format must be set where path or claim is",
            },
            _exactly_one("textColumn", "tokensColumn"),
            {
                "rule": "!has(self.tokensColumn) || !has(self.format)"
                " || !(self.format in ['csv', 'tsv'])",
                "message": "format must be jsonl or parquet where tokensColumn is set",
            },
        ]
    return _definition(
        kind=privateblock.KIND,
        plural=privateblock.PLURAL,
        short="pb",
        schema=schema,
        status=structural_schema(privateblock.PrivateBlockStatus),
        columns=privateblock.COLUMNS,
    )


def dpmoe_job() -> Json:
    """The CustomResourceDefinition of DPMoEJob."""
    schema = structural_schema(dpmoejob.DPMoEJobSpec)
    frozen = [field for field in schema["properties"] if field not in dpmoejob.MUTABLE]
    schema["x-kubernetes-validations"] = [
        *_frozen(frozen),
        {
            "rule": "!has(self.elastic) || !has(self.elastic.epsilon)"
            " || has(self.privacy.epsilon) && !has(self.privacy.noiseMultiplier)",
            "message": "elastic.epsilon needs privacy.epsilon, and no privacy.noiseMultiplier",
        },
        {
            "rule": "!has(self.elastic) || !has(self.elastic.blocks)"
            " || has(self.blocks.names) || has(self.blocks.count)",
            "message": "elastic.blocks needs blocks.names or blocks.count",
        },
    ]
    properties = schema["properties"]
    properties["blocks"]["x-kubernetes-validations"] = [_exactly_one("names", "selector")]
    properties["elastic"]["x-kubernetes-validations"] = [
        {
            "rule": "has(self.epsilon) || has(self.blocks)",
            "message": "epsilon or blocks must be set",
        }
    ]
    properties["model"]["x-kubernetes-validations"] = [
        _exactly_one("path", "claim", "huggingFace"),
        {
            "rule": "!has(self.lora) || !has(self.trainable) || size(self.trainable) == 0",
            "message": "trainable must be absent where lora is set",
        },
    ]
    properties["parallelism"]["x-kubernetes-validations"] = [
        {
            "rule": "self.workers * (self.gpusPerWorker > 0 ? self.gpusPerWorker : 1)"
            " % self.expertParallel == 0",
            "message": "expertParallel must divide the ranks: workers times gpusPerWorker, or 1",
        }
    ]
    properties["output"]["x-kubernetes-validations"] = [_exactly_one("claim", "uri")]
    properties["training"]["x-kubernetes-validations"] = [_exactly_one("epochs", "steps")]
    properties["privacy"]["x-kubernetes-validations"] = [
        {
            "rule": "has(self.epsilon) || has(self.noiseMultiplier)",
            "message": "epsilon or noiseMultiplier must be set",
        }
    ]
    return _definition(
        kind=dpmoejob.KIND,
        plural=dpmoejob.PLURAL,
        short="dpj",
        schema=schema,
        status=structural_schema(dpmoejob.DPMoEJobStatus),
        columns=dpmoejob.COLUMNS,
    )


def ledger_entry() -> Json:
    """The CustomResourceDefinition of LedgerEntry: no status, and no change ever."""
    schema = structural_schema(ledgerentry.LedgerEntrySpec)
    schema["x-kubernetes-validations"] = [
        {"rule": "self == oldSelf", "message": "an entry of the ledger may not change"}
    ]
    return _definition(
        kind=ledgerentry.KIND,
        plural=ledgerentry.PLURAL,
        short=None,
        schema=schema,
        status=None,
        columns=ledgerentry.COLUMNS,
    )


def all_definitions() -> dict[str, Json]:
    """Every CustomResourceDefinition by its plural name, which is also its file's name in crds/."""
    return {
        privateblock.PLURAL: private_block(),
        dpmoejob.PLURAL: dpmoe_job(),
        ledgerentry.PLURAL: ledger_entry(),
    }
