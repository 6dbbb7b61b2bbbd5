"""What the API server answers when it does not do what was asked, as exceptions.

What holds: a write that raised `OutcomeUnknown` may have happened, so its caller must look before
it acts on either. After any other error here, the write did not happen.
"""

import json
from typing import Any


class ApiError(Exception):
    """The server refused.

    Attributes:
        status: the HTTP status; 0 where no answer came.
        reason: Kubernetes' own word for it, such as "AlreadyExists".
        message: the server's explanation, for people.
        details: the server's `details`, with causes by field where it gave them.
        retry_after: after how many seconds the server wants to be asked again.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        *,
        details: dict[str, Any] | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.details = details or {}
        self.retry_after = retry_after


class NotFound(ApiError):
    """There is no such object, or no such namespace."""


class NotServed(ApiError):
    """The server knows no such kind of object at all; about the object itself this says nothing."""


class AlreadyExists(ApiError):
    """An object of that name exists."""


class Conflict(ApiError):
    """The object is not what a precondition (resource version, uid) said: read it again."""


class Unauthorized(ApiError):
    """The server does not take the credentials."""


class Forbidden(ApiError):
    """The credentials are good but not for this, or an admission policy said no."""


class Invalid(ApiError):
    """The object breaks its schema or a validation rule."""


class Gone(ApiError):
    """That resource version is too old to go on from: list again."""


class Unreachable(ApiError):
    """The server did not answer, or answered that it can't."""


class OutcomeUnknown(Unreachable):
    """A write was sent and no clear answer came back: it may have happened. Read before acting."""


_BY_REASON = {
    "NotFound": NotFound,
    "AlreadyExists": AlreadyExists,
    "Conflict": Conflict,
    "Unauthorized": Unauthorized,
    "Forbidden": Forbidden,
    "Invalid": Invalid,
    "Gone": Gone,
    "Expired": Gone,
}
_BY_STATUS = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    422: Invalid,
}
_UNKNOWN_KIND = "the server could not find the requested resource"


def from_answer(
    method: str, path: str, status: int, body: bytes, retry_after: float | None = None
) -> ApiError:
    """The exception for an answer that is no success.

    Args:
        method: the request's method; it decides whether the outcome of a failure is known.
        path: the request's path, for messages.
        status: the HTTP status.
        body: the answer's body, a `Status` object where the API server wrote it itself.
        retry_after: the Retry-After header, in seconds.
    """
    answer = _parse_status(body)
    reason = str(answer.get("reason") or "")
    message = str(answer.get("message") or "") or f"{method} {path}: HTTP {status}"
    details = answer.get("details") or {}
    if status == 404 and (not answer or message == _UNKNOWN_KIND):
        return NotServed(
            status,
            reason or "NotServed",
            f"the server does not serve {path}: install the CRDs, or check its version",
        )
    if status >= 500:
        kind: type[ApiError] = Unreachable if method == "GET" else OutcomeUnknown
    else:
        kind = _BY_REASON.get(reason) or _BY_STATUS.get(status, ApiError)
    if kind is Unauthorized:
        message += ": the credentials have expired or are wrong, log in again"
    return kind(status, reason, message, details=details, retry_after=retry_after)


def from_status(status: dict[str, Any]) -> ApiError:
    """The exception for a `Status` object that came as a watch's ERROR event."""
    return from_answer("GET", "watch", int(status.get("code") or 500), json.dumps(status).encode())


def _parse_status(body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) and answer.get("kind") == "Status" else {}
