"""The four ways to patch an object: JSON merge, JSON patch, strategic merge, and apply.

All are pure: the result may share parts with what was given, and nothing given changes. Apply is
server-side apply without field ownership: it creates or merges, and never removes what an
earlier apply of the same manager set. Lists merge by key where their type says so: by the CRD's
schema, or by the field's name for built-in kinds.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import jsonpatch
import jsonpointer

from . import errors
from .resources import Object
from .schema import LIST_MAP_KEYS, LIST_TYPE

JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"

# Field → the key by which items of that list are the same (`patchMergeKey` of the Go types).
# Where two kinds differ, the first one that every item has. All other lists are atomic.
MERGE_KEYS: Mapping[str, tuple[str, ...]] = {
    "addresses": ("type",),
    "conditions": ("type",),
    "containers": ("name",),
    "env": ("name",),
    "ephemeralContainers": ("name",),
    "hostAliases": ("ip",),
    "imagePullSecrets": ("name",),
    "initContainers": ("name",),
    "matchConditions": ("name",),
    "ownerReferences": ("uid",),
    "ports": ("containerPort", "port"),
    "resourceClaims": ("name",),
    "schedulingGates": ("name",),
    "secrets": ("name",),
    "topologySpreadConstraints": ("topologyKey",),
    "variables": ("name",),
    "volumeDevices": ("devicePath",),
    "volumeMounts": ("mountPath",),
    "volumes": ("name",),
}
# Lists of plain values that merge as sets.
MERGED_SETS = frozenset({"finalizers"})

ItemKey = Callable[[Any], object]


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386: dicts merge, null removes, anything else replaces."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


def json_patch(target: Object, operations: Sequence[Object]) -> Object:
    """RFC 6902.

    Raises:
        ApiError: 422, if a `test` fails or an operation can't be applied.
    """
    try:
        patched: Object = jsonpatch.apply_patch(target, operations)
    except (jsonpatch.JsonPatchException, jsonpointer.JsonPointerException, TypeError) as error:
        raise errors.unprocessable_patch(str(error)) from None
    return patched


# Strategic merge


def strategic_merge(target: Any, patch: Any, field: str = "") -> Any:
    """Kubernetes' strategic merge patch, with its `$patch`, `$retainKeys`, ... directives."""
    if isinstance(patch, dict):
        return _strategic_dict(target if isinstance(target, dict) else {}, patch)
    if isinstance(patch, list):
        return _strategic_list(target if isinstance(target, list) else [], patch, field)
    return patch


def _strategic_dict(target: Object, patch: Object) -> Object:
    if patch.get("$patch") == "replace":
        return {name: value for name, value in patch.items() if name != "$patch"}
    if patch.get("$patch") == "delete":
        return {}
    merged = dict(target)
    for name, value in patch.items():
        if name.startswith("$deleteFromPrimitiveList/"):
            list_name = name.partition("/")[2]
            merged[list_name] = [each for each in merged.get(list_name, []) if each not in value]
        elif name.startswith("$"):
            continue
        elif value is None:
            merged.pop(name, None)
        else:
            merged[name] = strategic_merge(merged.get(name), value, name)
    for name, value in patch.items():
        if name.startswith("$setElementOrder/") and name.partition("/")[2] in merged:
            list_name = name.partition("/")[2]
            merged[list_name] = _ordered(merged[list_name], value, list_name)
    if "$retainKeys" in patch:
        merged = {name: merged[name] for name in merged if name in patch["$retainKeys"]}
    return merged


def _strategic_list(target: Sequence[Any], patch: Sequence[Any], field: str) -> list[Any]:
    directives = [each for each in patch if isinstance(each, dict) and "$patch" in each]
    items = [each for each in patch if each not in directives]
    if any(each["$patch"] == "replace" for each in directives):
        return items
    key_of = _builtin_item_key(field, [*target, *items, *directives])
    if key_of is None:
        return items
    deleted = {key_of(each) for each in directives if each["$patch"] == "delete"}
    kept = [each for each in target if key_of(each) not in deleted]
    return _merge_items(kept, items, key_of, strategic_merge)


def _ordered(items: Sequence[Any], order: Sequence[Any], field: str) -> list[Any]:
    """Items in the order the client wants; those that only the server knows come last."""
    key_of = _builtin_item_key(field, [*items, *order])
    if key_of is None:
        return list(items)
    places = {key_of(each): place for place, each in enumerate(order)}
    return sorted(items, key=lambda each: places.get(key_of(each), len(places)))


# Apply


def apply_merge(target: Any, applied: Any, schema: Mapping[str, Any] | None, field: str) -> Any:
    """Merges an applied configuration.

    Args:
        target: the value as it is.
        applied: what the client applies.
        schema: of the value, for a custom resource; None for a built-in kind.
        field: name of the field that holds the value.
    """
    if isinstance(target, dict) and isinstance(applied, dict):
        return target | {
            name: apply_merge(target.get(name), value, _below(schema, name), name)
            for name, value in applied.items()
        }
    if isinstance(target, list) and isinstance(applied, list):
        key_of = _item_key(schema, field, [*target, *applied])
        if key_of is not None:
            items = None if schema is None else schema.get("items", {})
            return _merge_items(
                target, applied, key_of, lambda old, new: apply_merge(old, new, items, field)
            )
    return applied


def _below(schema: Mapping[str, Any] | None, name: str) -> Mapping[str, Any] | None:
    if schema is None or name == "metadata":
        return None
    additional = schema.get("additionalProperties")
    fallback = additional if isinstance(additional, dict) else {}
    properties: Mapping[str, Mapping[str, Any]] = schema.get("properties", {})
    return properties.get(name, fallback)


# Items of lists


def _item_key(schema: Mapping[str, Any] | None, field: str, items: Sequence[Any]) -> ItemKey | None:
    """How items of a list are told apart, or None if the list is atomic."""
    if schema is None:
        return _builtin_item_key(field, items)
    if schema.get(LIST_TYPE) == "set":
        return _identity
    if schema.get(LIST_TYPE) == "map":
        keys = schema[LIST_MAP_KEYS]
        return lambda item: tuple(item.get(key) for key in keys)
    return None


def _builtin_item_key(field: str, items: Sequence[Any]) -> ItemKey | None:
    if field in MERGED_SETS:
        return _identity
    if field not in MERGE_KEYS or not items:
        return None
    for key in MERGE_KEYS[field]:
        if all(isinstance(item, dict) and key in item for item in items):
            return itemgetter(key)
    needed = " or ".join(MERGE_KEYS[field])
    raise errors.unprocessable_patch(f"an item of {field} does not contain its merge key {needed}")


def _identity(item: Any) -> object:
    return item


def _merge_items(
    target: Sequence[Any],
    patch: Sequence[Any],
    key_of: ItemKey,
    merge: Callable[[Any, Any], Any],
) -> list[Any]:
    merged = {key_of(item): item for item in target}
    for item in patch:
        key = key_of(item)
        merged[key] = merge(merged.get(key), item)
    return list(merged.values())
