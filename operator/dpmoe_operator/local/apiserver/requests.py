"""Reads requests: what a path names, what the query and the headers ask for. Pure."""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from . import errors
from .cluster import Write
from .deletion import Deletion
from .errors import Cause
from .resources import Registry, Resource
from .selectors import Selection, parse_selection

Query = Mapping[str, str]

POLICIES = ("Foreground", "Background", "Orphan")
FIELD_VALIDATIONS = ("", "Ignore", "Strict", "Warn")
# What the segment after /namespaces/NAME is when it belongs to the namespace itself.
_NAMESPACE_SUBRESOURCES = ("status", "finalize")


class Form(Enum):
    """In which form a client wants objects."""

    OBJECT = "Object"
    TABLE = "Table"


@dataclass(frozen=True)
class Target:
    """What a path names; `namespace` is None for all of them, and empty where there is none."""

    resource: Resource
    namespace: str | None
    name: str
    subresource: str


@dataclass(frozen=True)
class Page:
    """Which part of a list to return: at most `limit` objects after the key `start`."""

    limit: int
    start: tuple[str, str] | None
    revision: int | None


def parse_target(registry: Registry, path: str) -> Target:
    """Finds the resource, and the object, that a path names.

    Raises:
        ApiError: 404, if there is no such resource.
    """
    parts = path.strip("/").split("/")
    if parts[0] == "api":
        group, version, rest = "", parts[1:2], parts[2:]
    elif parts[0] == "apis" and len(parts) > 1:
        group, version, rest = parts[1], parts[2:3], parts[3:]
    else:
        raise errors.unknown_path()
    namespace: str | None = None
    if len(rest) > 2 and rest[0] == "namespaces" and rest[2] not in _NAMESPACE_SUBRESOURCES:
        namespace, rest = rest[1], rest[2:]
    resource = registry.find(group, version[0], rest[0]) if version and rest else None
    if resource is None or len(rest) > 3:
        raise errors.unknown_path()
    name, subresource = (*rest[1:], "", "")[:2]
    if not resource.namespaced:
        if namespace is not None:
            raise errors.unknown_path()
        namespace = ""
    if name and namespace is None:
        raise errors.unknown_path()
    known = (*resource.subresources, *(("status",) if resource.has_status else ()))
    if subresource and subresource not in known:
        raise errors.unknown_path()
    return Target(resource, namespace, name, subresource)


def parse_form(accept: str) -> Form:
    """The first form in an Accept header that this server has.

    Raises:
        ApiError: 406, if there is none.
    """
    for part in accept.split(",") if accept.strip() else ["*/*"]:
        media, *pairs = (each.strip() for each in part.split(";"))
        if media not in ("application/json", "application/*", "*/*"):
            continue
        parameters = dict(pair.partition("=")[::2] for pair in pairs)
        if "as" not in parameters:
            return Form.OBJECT
        if (parameters["as"], parameters.get("v")) == (Form.TABLE.value, "v1"):
            return Form.TABLE
    raise errors.not_acceptable()


def parse_query_selection(target: Target, query: Query) -> Selection:
    """The selection of a list, a watch or a deletion of a collection."""
    namespace = target.namespace or None
    labels, fields = query.get("labelSelector", ""), query.get("fieldSelector", "")
    selection = parse_selection(target.resource, namespace, labels, fields)
    if not target.name:
        return selection
    only = parse_selection(target.resource, namespace, "", f"metadata.name={target.name}")
    return Selection(namespace, selection.labels, selection.fields + only.fields)


def parse_revision(query: Query) -> int | None:
    """The `resourceVersion` of a list or watch; None, and 0, leave it to the server."""
    text = query.get("resourceVersion", "")
    if not text:
        return None
    if not text.isdecimal():
        raise errors.bad_request(f"invalid resource version: {text!r} is not a number")
    return int(text)


def parse_page(query: Query) -> Page:
    """The `limit` and `continue` of a list.

    Raises:
        ApiError: 400 for a number or a token that can't be read.
    """
    limit = _natural(query, "limit")
    token = query.get("continue", "")
    if not token:
        return Page(limit, None, None)
    try:
        revision, namespace, name = json.loads(base64.urlsafe_b64decode(token))
    except (ValueError, binascii.Error):
        raise errors.bad_request(f"invalid continue token: {token!r}") from None
    return Page(limit, (namespace, name), revision)


def format_continue(revision: int, namespace: str, name: str) -> str:
    """The token by which a client asks for what follows an object."""
    return base64.urlsafe_b64encode(json.dumps([revision, namespace, name]).encode()).decode()


def parse_seconds(query: Query, name: str) -> int | None:
    """A number of seconds in the query, or None."""
    return _natural(query, name) if query.get(name) else None


def parse_flag(query: Query, name: str) -> bool:
    """A boolean in the query, as Go reads them."""
    return query.get(name, "").lower() in ("1", "t", "true")


def parse_write(query: Query, options: str) -> Write:
    """The options of a create, an update or a patch; `options` names them in errors.

    Raises:
        ApiError: 422 for a value that is not known.
    """
    validation = query.get("fieldValidation", "")
    if validation not in FIELD_VALIDATIONS:
        cause = Cause.unsupported("fieldValidation", validation, FIELD_VALIDATIONS)
        raise errors.invalid_option(options, cause)
    return Write(_dry_run(query.get("dryRun"), options), validation or "Warn")


def parse_deletion(query: Query, body: Any) -> Deletion:
    """The options of a deletion, from the query and from a `DeleteOptions` body.

    Raises:
        ApiError: 400 for a body of another shape, 422 for a value that is not known.
    """
    if not isinstance(body, dict):
        raise errors.bad_request("the body of a deletion must be a DeleteOptions object")
    policy = body.get("propagationPolicy") or query.get("propagationPolicy") or None
    if policy not in (None, *POLICIES):
        cause = Cause.unsupported("propagationPolicy", policy, POLICIES)
        raise errors.invalid_option("DeleteOptions", cause)
    grace = body.get("gracePeriodSeconds")
    preconditions = body.get("preconditions") or {}
    dry_run = (body.get("dryRun") or [query.get("dryRun")])[0]
    return Deletion(
        policy,
        parse_seconds(query, "gracePeriodSeconds") if grace is None else int(grace),
        preconditions.get("uid"),
        preconditions.get("resourceVersion"),
        _dry_run(dry_run, "DeleteOptions"),
    )


def _dry_run(value: str | None, options: str) -> bool:
    if value and value != "All":
        cause = Cause.unsupported("dryRun", [value], ("All",))
        raise errors.invalid_option(options, cause)
    return bool(value)


def _natural(query: Query, name: str) -> int:
    text = query.get(name, "0")
    if not text.isdecimal():
        raise errors.bad_request(f"invalid {name}: {text!r} is not a natural number")
    return int(text)
