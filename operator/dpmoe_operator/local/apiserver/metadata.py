"""The rules of `metadata` that hold for every kind: names, labels, what clients can't set."""

import re
import secrets
from datetime import UTC, datetime
from uuid import uuid4

from . import errors
from .errors import Cause
from .resources import NAMESPACES, Object, Resource

# The alphabet of Kubernetes' generated names: no vowels, no digits that look like letters.
_SUFFIX_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = rf"{_LABEL}(\.{_LABEL})*"
_LABEL_VALUE = r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?"

# Set by the server alone; what a client sends is replaced by what is stored.
SERVER_FIELDS = (
    "uid",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generation",
)
# Neither kept nor shown.
DROPPED_FIELDS = ("managedFields", "selfLink", "resourceVersion")
# Left out when empty, so that removing the last label is the same as never having had one.
_COLLECTIONS = ("annotations", "finalizers", "labels", "ownerReferences")


def now() -> str:
    """The present as Kubernetes writes it, in whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def random_suffix() -> str:
    """Five characters, as at the end of generated names."""
    return "".join(secrets.choice(_SUFFIX_ALPHABET) for _ in range(5))


def new_metadata(resource: Resource, namespace: str, given: Object) -> Object:
    """The metadata of an object to be created.

    Raises:
        ApiError: 400 for the wrong namespace, 422 for a missing or malformed name or label.
    """
    if given.get("resourceVersion"):
        message = "resourceVersion should not be set on objects to be created"
        raise errors.ApiError(500, "", message)
    if (given.get("namespace") or namespace) != namespace:
        message = (
            "the namespace of the provided object does not match the namespace sent on the request"
        )
        raise errors.bad_request(message)
    name = given.get("name")
    if not name:
        if not given.get("generateName"):
            detail = "name or generateName is required"
            raise errors.invalid_object(resource, "", Cause.required("metadata.name", detail))
        name = given["generateName"] + random_suffix()
    metadata = {
        **_client_fields(given),
        "name": name,
        "uid": str(uuid4()),
        "creationTimestamp": now(),
    }
    if resource.namespaced:
        metadata["namespace"] = namespace
    if resource.has_generation:
        metadata["generation"] = 1
    _check(resource, metadata)
    return metadata


def revised_metadata(resource: Resource, old: Object, given: Object) -> Object:
    """The metadata of an object to be replaced; the caller sets `generation`.

    Raises:
        ApiError: 422 for a malformed label, or for a new finalizer on a deleted object.
    """
    metadata = _client_fields(given)
    metadata |= {field: old[field] for field in SERVER_FIELDS if field in old}
    metadata |= {field: old[field] for field in ("name", "namespace") if field in old}
    added = set(metadata.get("finalizers", ())) - set(old.get("finalizers", ()))
    if added and "deletionTimestamp" in old:
        detail = (
            "no new finalizers can be added if the object is being deleted, found new "
            f"finalizers {sorted(added)}"
        )
        cause = Cause.forbidden("metadata.finalizers", detail)
        raise errors.invalid_object(resource, old["name"], cause)
    _check(resource, metadata)
    return metadata


def _check(resource: Resource, metadata: Object) -> None:
    name = metadata["name"]
    causes: list[Cause] = []
    is_namespace = resource.storage == NAMESPACES.storage
    pattern, limit = (_LABEL, 63) if is_namespace else (_SUBDOMAIN, 253)
    # RBAC names may hold colons and capitals, such as `system:node`.
    if resource.group == "rbac.authorization.k8s.io":
        pattern = r"[^/%]+"
    if not re.fullmatch(pattern, name) or len(name) > limit:
        detail = (
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, "
            "'-' or '.', and must start and end with an alphanumeric character"
        )
        causes.append(Cause.invalid("metadata.name", name, detail))
    for value in (metadata.get("labels") or {}).values():
        if not isinstance(value, str) or not re.fullmatch(_LABEL_VALUE, value) or len(value) > 63:
            detail = (
                "a valid label must be an empty string or consist of alphanumeric characters, "
                "'-', '_' or '.', and must start and end with an alphanumeric character"
            )
            causes.append(Cause.invalid("metadata.labels", value, detail))
    for owner in metadata.get("ownerReferences", ()):
        causes += [
            Cause.invalid(f"metadata.ownerReferences.{field}", "", f"{field} must not be empty")
            for field in ("apiVersion", "kind", "name", "uid")
            if not owner.get(field)
        ]
    if causes:
        raise errors.invalid_object(resource, name, *causes)


def _client_fields(given: Object) -> Object:
    return {
        name: value
        for name, value in given.items()
        if name not in SERVER_FIELDS
        and name not in DROPPED_FIELDS
        and (value or name not in _COLLECTIONS)
    }
