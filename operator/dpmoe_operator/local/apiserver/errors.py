"""What an API server answers when it refuses: a `Status` object with a machine-readable reason.

Every refusal in this package is an `ApiError`; the HTTP layer turns it into the response. Reasons,
codes and wording follow kube-apiserver, because clients (kopf, kubectl, client-go) branch on them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .resources import Object, Resource


class ApiError(Exception):
    """A refused request."""

    def __init__(self, code: int, reason: str, message: str, details: Object | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details

    def status(self) -> Object:
        """The body of the response."""
        status: Object = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }
        if self.details is not None:
            status["details"] = self.details
        return status


@dataclass(frozen=True)
class Cause:
    """One reason why an object is invalid; `field` is a path such as `spec.items[0].name`."""

    field: str
    reason: str
    message: str

    @classmethod
    def required(cls, field: str, detail: str = "") -> "Cause":
        """The field is missing."""
        return cls(field, "FieldValueRequired", f"Required value{detail and ': ' + detail}")

    @classmethod
    def invalid(cls, field: str, value: Any, detail: str) -> "Cause":
        """The field's value is refused."""
        return cls(field, "FieldValueInvalid", f"Invalid value: {json.dumps(value)}: {detail}")

    @classmethod
    def unsupported(cls, field: str, value: Any, allowed: Sequence[Any]) -> "Cause":
        """The field's value is none of the allowed ones."""
        names = ", ".join(json.dumps(each) for each in allowed)
        message = f"Unsupported value: {json.dumps(value)}: supported values: {names}"
        return cls(field, "FieldValueNotSupported", message)

    @classmethod
    def duplicate(cls, field: str, value: Any) -> "Cause":
        """The field's value occurs twice where it must be unique."""
        text = json.dumps(value, separators=(",", ":"))
        return cls(field, "FieldValueDuplicate", f"Duplicate value: {text}")

    @classmethod
    def forbidden(cls, field: str, detail: str) -> "Cause":
        """The field may not be set, or not so."""
        return cls(field, "FieldValueForbidden", f"Forbidden: {detail}")


def bad_request(message: str) -> ApiError:
    """400: the request itself is malformed."""
    return ApiError(400, "BadRequest", message)


def unauthorized() -> ApiError:
    """401: no bearer token, or a wrong one."""
    return ApiError(401, "Unauthorized", "Unauthorized")


def namespace_terminating(resource: Resource, name: str, namespace: str) -> ApiError:
    """403: nothing new is accepted in a namespace that is being deleted."""
    cause = {
        "reason": "NamespaceTerminating",
        "message": f"namespace {namespace} is being terminated",
        "field": "metadata.namespace",
    }
    message = (
        f'{resource.qualified} "{name}" is forbidden: unable to create new content in namespace '
        f"{namespace} because it is being terminated"
    )
    return ApiError(403, "Forbidden", message, {**_details(resource, name), "causes": [cause]})


def not_found(resource: Resource, name: str) -> ApiError:
    """404: there is no such object."""
    message = f'{resource.qualified} "{name}" not found'
    return ApiError(404, "NotFound", message, _details(resource, name))


def unknown_path() -> ApiError:
    """404: the server knows no such resource or path."""
    message = "the server could not find the requested resource"
    return ApiError(404, "NotFound", message, {})


def method_not_allowed() -> ApiError:
    """405: the resource exists, but not this verb on it."""
    message = "the server does not allow this method on the requested resource"
    return ApiError(405, "MethodNotAllowed", message, {})


def not_acceptable() -> ApiError:
    """406: none of the response formats the client accepts is available."""
    message = "only the following media types are accepted: application/json"
    return ApiError(406, "NotAcceptable", message)


def already_exists(resource: Resource, name: str) -> ApiError:
    """409: an object of that name exists."""
    message = f'{resource.qualified} "{name}" already exists'
    return ApiError(409, "AlreadyExists", message, _details(resource, name))


def conflict(resource: Resource, name: str, why: str) -> ApiError:
    """409: the precondition of a write does not hold."""
    message = f'Operation cannot be fulfilled on {resource.qualified} "{name}": {why}'
    return ApiError(409, "Conflict", message, _details(resource, name))


def stale(resource: Resource, name: str) -> ApiError:
    """409: the write was based on an older version of the object."""
    why = (
        "the object has been modified; please apply your changes to the latest version "
        "and try again"
    )
    return conflict(resource, name, why)


def expired(message: str) -> ApiError:
    """410: the history asked for is no longer kept; the client must list afresh."""
    return ApiError(410, "Expired", message)


def too_large(limit: int) -> ApiError:
    """413: the body is larger than the server takes."""
    message = f"Request entity too large: limit is {limit}"
    return ApiError(413, "RequestEntityTooLarge", message)


def unsupported_media_type(accepted: Sequence[str]) -> ApiError:
    """415: the body's format is not one the server reads."""
    message = (
        "the body of the request was in an unknown format - accepted media types include: "
        f"{', '.join(accepted)}"
    )
    return ApiError(415, "UnsupportedMediaType", message)


def invalid(kind: str, group: str, name: str, causes: Sequence[Cause]) -> ApiError:
    """422: the object breaks its schema or its kind's rules."""
    texts = [f"{cause.field}: {cause.message}" for cause in causes]
    text = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    qualified = f"{kind}.{group}" if group else kind
    details: Object = {"name": name, "kind": kind}
    if group:
        details["group"] = group
    details["causes"] = [
        {"reason": cause.reason, "message": cause.message, "field": cause.field} for cause in causes
    ]
    return ApiError(422, "Invalid", f'{qualified} "{name}" is invalid: {text}', details)


def invalid_object(resource: Resource, name: str, *causes: Cause) -> ApiError:
    """422 for an object of a known resource."""
    return invalid(resource.kind, resource.group, name, causes)


def invalid_option(options: str, cause: Cause) -> ApiError:
    """422 for a query parameter, named as the field of e.g. `CreateOptions`."""
    return invalid(options, "meta.k8s.io", "", [cause])


def unprocessable_patch(why: str) -> ApiError:
    """422: the patch can't be applied to the object as it is; kopf retries on this one."""
    return ApiError(422, "Invalid", f"the server rejected the patch: {why}", {})


def future_version(asked: int, current: int) -> ApiError:
    """504: the client knows a newer state than this server, e.g. of its previous run."""
    details = {
        "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
        "retryAfterSeconds": 1,
    }
    message = f"Timeout: Too large resource version: {asked}, current: {current}"
    return ApiError(504, "Timeout", message, details)


def _details(resource: Resource, name: str) -> Object:
    details: Object = {"name": name, "kind": resource.plural}
    if resource.group:
        details["group"] = resource.group
    return details
