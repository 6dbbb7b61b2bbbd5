"""Structural schemas of custom resources: pruning, defaulting, validation.

The three steps run in this order on every write, as in kube-apiserver. Each is a pure function:
nothing that it is given changes. CEL rules (`x-kubernetes-validations`) are not evaluated.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from typing import Any
from uuid import UUID

from .errors import Cause
from .resources import Object

Schema = Mapping[str, Any]

PRESERVE = "x-kubernetes-preserve-unknown-fields"
EMBEDDED = "x-kubernetes-embedded-resource"
INT_OR_STRING = "x-kubernetes-int-or-string"
LIST_TYPE = "x-kubernetes-list-type"
LIST_MAP_KEYS = "x-kubernetes-list-map-keys"

# What an object has whatever its schema says.
TYPE_FIELDS = frozenset({"apiVersion", "kind", "metadata"})
METADATA_FIELDS = frozenset({
    "annotations", "creationTimestamp", "deletionGracePeriodSeconds", "deletionTimestamp",
    "finalizers", "generateName", "generation", "labels", "managedFields", "name", "namespace",
    "ownerReferences", "resourceVersion", "selfLink", "uid",
})  # fmt: skip


# Pruning


def prune_object(schema: Schema, obj: Object) -> tuple[Object, list[str]]:
    """Drops every field that the schema does not know.

    Returns:
        The pruned object, and the paths of what was dropped.
    """
    pruned, unknown = _prune(schema, obj, "", keep=TYPE_FIELDS)
    metadata = obj["metadata"]
    pruned["metadata"] = {key: metadata[key] for key in metadata if key in METADATA_FIELDS}
    unknown += [f"metadata.{key}" for key in metadata if key not in METADATA_FIELDS]
    return pruned, sorted(unknown)


def _prune(
    schema: Schema, value: Any, path: str, keep: frozenset[str] = frozenset()
) -> tuple[Any, list[str]]:
    if isinstance(value, list) and "items" in schema:
        results = [_prune(schema["items"], each, f"{path}[{i}]") for i, each in enumerate(value)]
        return [each for each, _ in results], [name for _, names in results for name in names]
    if not isinstance(value, dict):
        return value, []
    if schema.get(EMBEDDED):
        keep = TYPE_FIELDS
    kept: Object = {}
    unknown: list[str] = []
    for name, field in value.items():
        field_path = f"{path}.{name}" if path else name
        field_schema = _field_schema(schema, name)
        if name in keep or (field_schema is None and schema.get(PRESERVE)):
            kept[name] = field
        elif field_schema is not None:
            kept[name], below = _prune(field_schema, field, field_path)
            unknown += below
        else:
            unknown.append(field_path)
    return kept, unknown


def _field_schema(schema: Schema, name: str) -> Schema | None:
    properties: Mapping[str, Schema] = schema.get("properties", {})
    if name in properties:
        return properties[name]
    additional = schema.get("additionalProperties")
    if isinstance(additional, Mapping):
        return additional
    return {PRESERVE: True} if additional is True else None


# Defaulting


def apply_defaults(schema: Schema, value: Any) -> Any:
    """Fills in defaults, drops nulls that are not allowed, and turns 1.0 into 1 for integers."""
    if isinstance(value, list):
        items = schema.get("items", {})
        return [apply_defaults(items, each) for each in value]
    if isinstance(value, dict):
        return _default_fields(schema, value)
    if schema.get("type") == "integer" and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _default_fields(schema: Schema, value: Object) -> Object:
    filled: Object = {}
    for name, field in value.items():
        field_schema = _field_schema(schema, name)
        if field_schema is None:
            filled[name] = field
        elif field is not None or field_schema.get("nullable") or "type" not in field_schema:
            filled[name] = apply_defaults(field_schema, field)
    for name, field_schema in schema.get("properties", {}).items():
        if name not in filled and "default" in field_schema:
            filled[name] = apply_defaults(field_schema, field_schema["default"])
    return filled


# Validation


def validate(schema: Schema, value: Any, path: str = "") -> list[Cause]:
    """Every way in which a value breaks its schema."""
    if value is None and schema.get("nullable"):
        return []
    wrong_type = _check_type(schema, value, path)
    if wrong_type:
        return wrong_type
    causes: list[Cause] = []
    if isinstance(value, dict):
        causes += _validate_object(schema, value, path)
    elif isinstance(value, list):
        causes += _validate_list(schema, value, path)
    elif isinstance(value, str):
        causes += _validate_string(schema, value, path)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        causes += _validate_number(schema, value, path)
    if "enum" in schema and value not in schema["enum"]:
        causes.append(Cause.unsupported(path, value, schema["enum"]))
    return causes + _validate_combinations(schema, value, path)


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def _check_type(schema: Schema, value: Any, path: str) -> list[Cause]:
    allowed = ("integer", "string") if schema.get(INT_OR_STRING) else (schema.get("type"),)
    actual = _type_of(value)
    if None in allowed or actual in allowed or (actual == "integer" and "number" in allowed):
        return []
    return [_type_cause(path, ",".join(each for each in allowed if each), actual)]


def _type_cause(path: str, expected: str, shown: str) -> Cause:
    message = f'Invalid value: "{shown}": {path} in body must be of type {expected}: "{shown}"'
    return Cause(path, "FieldValueTypeInvalid", message)


def _validate_object(schema: Schema, value: Object, path: str) -> list[Cause]:
    def under(name: str) -> str:
        return f"{path}.{name}" if path else name

    causes = [
        Cause.required(under(name)) for name in schema.get("required", ()) if name not in value
    ]
    for name, field in value.items():
        field_schema = _field_schema(schema, name)
        if field_schema is not None:
            causes += validate(field_schema, field, under(name))
    if len(value) > schema.get("maxProperties", math.inf):
        detail = f"{path} in body should have at most {schema['maxProperties']} properties"
        causes.append(Cause.invalid(path, len(value), detail))
    if len(value) < schema.get("minProperties", 0):
        detail = f"{path} in body should have at least {schema['minProperties']} properties"
        causes.append(Cause.invalid(path, len(value), detail))
    return causes


def _validate_list(schema: Schema, value: Sequence[Any], path: str) -> list[Cause]:
    items = schema.get("items", {})
    causes = [
        cause for i, each in enumerate(value) for cause in validate(items, each, f"{path}[{i}]")
    ]
    if len(value) > schema.get("maxItems", math.inf):
        detail = f"Too many: {len(value)}: must have at most {schema['maxItems']} items"
        causes.append(Cause(path, "FieldValueTooMany", detail))
    if len(value) < schema.get("minItems", 0):
        detail = f"{path} in body should have at least {schema['minItems']} items"
        causes.append(Cause.invalid(path, len(value), detail))
    return causes + _duplicates(schema, value, path)


def _duplicates(schema: Schema, value: Sequence[Any], path: str) -> list[Cause]:
    """Lists of type set have no equal items, lists of type map no two items of equal keys."""
    kind = schema.get(LIST_TYPE)
    if kind not in ("set", "map"):
        return []
    causes: list[Cause] = []
    seen: set[str] = set()
    for i, each in enumerate(value):
        if kind == "map" and isinstance(each, dict):
            each = {key: each.get(key) for key in schema[LIST_MAP_KEYS]}
        identity = repr(each)
        if identity in seen:
            causes.append(Cause.duplicate(f"{path}[{i}]", each))
        seen.add(identity)
    return causes


def _validate_string(schema: Schema, value: str, path: str) -> list[Cause]:
    causes: list[Cause] = []
    if len(value) > schema.get("maxLength", math.inf):
        detail = f"Too long: may not be more than {schema['maxLength']} bytes"
        causes.append(Cause(path, "FieldValueTooLong", detail))
    if len(value) < schema.get("minLength", 0):
        detail = f"{path} in body should be at least {schema['minLength']} chars long"
        causes.append(Cause.invalid(path, value, detail))
    if "pattern" in schema and not re.search(schema["pattern"], value):
        detail = f"{path} in body should match '{schema['pattern']}'"
        causes.append(Cause.invalid(path, value, detail))
    check = _FORMATS.get(schema.get("format", ""))
    if check is not None and not _accepts(check, value):
        causes.append(_type_cause(path, schema["format"], value))
    return causes


def _validate_number(schema: Schema, value: float, path: str) -> list[Cause]:
    causes: list[Cause] = []
    maximum, minimum = schema.get("maximum", math.inf), schema.get("minimum", -math.inf)
    if value > maximum or (value == maximum and schema.get("exclusiveMaximum")):
        limit = "" if schema.get("exclusiveMaximum") else " or equal to"
        detail = f"{path} in body should be less than{limit} {maximum}"
        causes.append(Cause.invalid(path, value, detail))
    if value < minimum or (value == minimum and schema.get("exclusiveMinimum")):
        limit = "" if schema.get("exclusiveMinimum") else " or equal to"
        detail = f"{path} in body should be greater than{limit} {minimum}"
        causes.append(Cause.invalid(path, value, detail))
    factor = schema.get("multipleOf")
    if factor and not math.isclose(value / factor, round(value / factor), rel_tol=1e-9):
        detail = f"{path} in body should be a multiple of {factor}"
        causes.append(Cause.invalid(path, value, detail))
    bits = {"int32": 31, "int64": 63}.get(schema.get("format", ""))
    if bits and not -(2**bits) <= value < 2**bits:
        causes.append(_type_cause(path, schema["format"], _type_of(value)))
    return causes


def _validate_combinations(schema: Schema, value: Any, path: str) -> list[Cause]:
    causes: list[Cause] = []
    for each in schema.get("allOf", ()):
        causes += validate(each, value, path)
    if "anyOf" in schema and _valid_count(schema["anyOf"], value, path) == 0:
        detail = f'"{path}" must validate at least one schema (anyOf)'
        causes.append(Cause.invalid(path, "", detail))
    if "oneOf" in schema and (count := _valid_count(schema["oneOf"], value, path)) != 1:
        detail = f'"{path}" must validate one and only one schema (oneOf). Found {count} valid'
        causes.append(Cause.invalid(path, "", detail))
    if "not" in schema and not validate(schema["not"], value, path):
        causes.append(Cause.invalid(path, "", f'"{path}" must not validate the schema (not)'))
    return causes


def _valid_count(schemas: Sequence[Schema], value: Any, path: str) -> int:
    return sum(not validate(each, value, path) for each in schemas)


def _parse_date_time(text: str) -> object:
    if "T" not in text.upper():
        raise ValueError(text)
    return datetime.fromisoformat(text)


_FORMATS: Mapping[str, Callable[[str], object]] = {
    "date-time": _parse_date_time,
    "date": date.fromisoformat,
    "uuid": UUID,
}


def _accepts(parse: Callable[[str], object], text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True
