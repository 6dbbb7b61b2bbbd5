"""A thin asynchronous client of the Kubernetes API.

The ledger lives by compare-and-swap, so this client shows what others hide: resource versions,
preconditions, subresources, and whether a failed write may have happened after all. What holds:

- Reads are tried again when the server is away or overloaded, a bounded number of times. Creates
  and patches are sent once: one without a clear answer raises `OutcomeUnknown`. Replaces and
  deletes the connection may send again, since doing them twice is doing them once.
- Writes are strict: a field that the server's schema does not know is an error. An operator newer
  than its CRDs is refused, where otherwise the server would drop the field and keep the rest.
- Every request has a timeout, and a watch that falls silent ends with an error.
"""

import asyncio
import json
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Literal, Self

from dpmoe_operator.kube.config import Access
from dpmoe_operator.kube.errors import ApiError, Gone, Unreachable, from_status
from dpmoe_operator.kube.resources import PODS, Resource
from dpmoe_operator.kube.transport import FIELD_MANAGER, Transport

logger = logging.getLogger(__name__)

Object = dict[str, Any]
"""An API object as JSON."""

Objects = list[Object]

PatchType = Literal["merge", "json", "strategic"]
Propagation = Literal["Background", "Foreground", "Orphan"]

_PATCH_TYPES: dict[str, str] = {
    "merge": "application/merge-patch+json",
    "json": "application/json-patch+json",
    "strategic": "application/strategic-merge-patch+json",
}
_WRITE_PARAMS = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}
_PAGE_SIZE = 500
_RETRY_BASE_SECONDS = 0.2
_RETRY_MAX_SECONDS = 10.0


class KubeClient:
    """One API server, as one identity. Use it as an async context manager.

    Example:
        ```
        async with KubeClient(load_access()) as client:
            blocks, version = await client.list(PRIVATE_BLOCKS)
        ```

    All methods raise `ApiError` and its subclasses.
    """

    def __init__(
        self,
        access: Access,
        *,
        timeout_seconds: float = 30.0,
        read_attempts: int = 5,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        """Opens nothing yet.

        Args:
            access: where the server is and how to log in.
            timeout_seconds: how long one request may take; watches and logs have their own limits.
            read_attempts: how often a read is tried in all.
            sleep: waits between tries; tests put their own.
        """
        self._transport = Transport(access, timeout_seconds)
        self._timeout = timeout_seconds
        self._read_attempts = read_attempts
        self._sleep = sleep

    async def __aenter__(self) -> Self:
        await self._transport.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._transport.close()

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        """Reads one object, as the server's storage has it now."""
        return await self._object("GET", resource.path(namespace, name))

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        label_selector: str | None = None,
        field_selector: str | None = None,
    ) -> tuple[Objects, str]:
        """Reads a whole collection, page by page.

        Returns:
            The objects, all from one state of the storage, and that state's resource version.
        """
        params = _selectors(label_selector, field_selector)
        try:
            return await self._pages(resource, namespace, params | {"limit": str(_PAGE_SIZE)})
        except Gone:
            # The storage was compacted between two pages: one answer for all can't be cut in half.
            return await self._pages(resource, namespace, params)

    async def _pages(
        self, resource: Resource, namespace: str | None, params: dict[str, str]
    ) -> tuple[Objects, str]:
        kind = {"apiVersion": resource.api_version, "kind": resource.kind}
        items: Objects = []
        while True:
            page = await self._object("GET", resource.path(namespace), params=params)
            items.extend(kind | item for item in page.get("items") or [])
            metadata = page.get("metadata", {})
            if not metadata.get("continue"):
                return items, metadata.get("resourceVersion", "")
            params = params | {"continue": metadata["continue"]}

    async def create(
        self, resource: Resource, namespace: str | None, body: Object, *, dry_run: bool = False
    ) -> Object:
        """Creates an object, or only says what it would be.

        Raises `AlreadyExists` where its name is taken.
        """
        params = _WRITE_PARAMS | ({"dryRun": "All"} if dry_run else {})
        return await self._object("POST", resource.path(namespace), body, params)

    async def replace(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        body: Object,
        subresource: str | None = None,
    ) -> Object:
        """Replaces an object; with `metadata.resourceVersion` in the body, only that version.

        Sent twice by the connection, it raises `Conflict` though it succeeded: read the object.
        """
        path = resource.path(namespace, name, subresource)
        return await self._object("PUT", path, body, _WRITE_PARAMS)

    async def patch(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        body: Object | Objects,
        subresource: str | None = None,
        patch_type: PatchType = "merge",
    ) -> Object:
        """Changes parts of an object.

        A merge patch that holds `metadata.resourceVersion` raises `Conflict` where the object's
        differs, and one that holds `metadata.uid` raises `Invalid`.
        """
        path = resource.path(namespace, name, subresource)
        return await self._object("PATCH", path, body, _WRITE_PARAMS, _PATCH_TYPES[patch_type])

    async def delete(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        propagation: Propagation = "Background",
        precondition_uid: str | None = None,
        precondition_resource_version: str | None = None,
        grace_seconds: int | None = None,
    ) -> Object:
        """Deletes an object, and by garbage collection what it owns.

        Args:
            resource: the object's kind.
            namespace: its namespace.
            name: its name.
            propagation: what becomes of the objects that it owns.
            precondition_uid: raise `Conflict` where the object's uid is another.
            precondition_resource_version: raise `Conflict` where it has changed since.
            grace_seconds: how long a pod may take to stop; `None` for what the pod itself says.
        """
        preconditions = {
            "uid": precondition_uid,
            "resourceVersion": precondition_resource_version,
        }
        options: Object = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": propagation,
        }
        if any(preconditions.values()):
            options["preconditions"] = {k: v for k, v in preconditions.items() if v is not None}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        return await self._object("DELETE", resource.path(namespace, name), options)

    async def logs(
        self,
        namespace: str,
        name: str,
        container: str | None = None,
        follow: bool = False,
        tail_lines: int | None = None,
        previous: bool = False,
    ) -> AsyncGenerator[str, None]:
        """The lines that a pod's container printed; with `follow`, until it ends."""
        params = {"follow": "true"} if follow else {}
        if container is not None:
            params["container"] = container
        if tail_lines is not None:
            params["tailLines"] = str(tail_lines)
        if previous:
            params["previous"] = "true"
        silence = None if follow else self._timeout
        async with self._transport.stream(
            PODS.path(namespace, name, "log"), params, silence
        ) as lines:
            async for line in lines:
                yield line.decode(errors="replace")

    async def watch(
        self,
        resource: Resource,
        namespace: str | None = None,
        label_selector: str | None = None,
        resource_version: str | None = None,
        timeout_seconds: int = 300,
        silence_seconds: float = 90.0,
    ) -> AsyncGenerator[tuple[str, Object], None]:
        """The changes of a collection since a resource version, as they happen.

        Args:
            resource: the kind to watch.
            namespace: `None` for all.
            label_selector: only objects with these labels.
            resource_version: where to begin: what `list` returned, or that of the last event.
            timeout_seconds: after how long the server ends the watch by itself.
            silence_seconds: without a byte for so long the connection counts as dead; the server
                sends a bookmark about once a minute.

        Yields:
            ADDED, MODIFIED, DELETED or BOOKMARK, and the object; a bookmark's carries a new
            resource version only.

        Raises:
            Gone: the resource version is too old; list again.
            Unreachable: the connection broke or fell silent.
        """
        params = _selectors(label_selector, None) | {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(timeout_seconds),
        }
        if resource_version is not None:
            params["resourceVersion"] = resource_version
        async with self._transport.stream(
            resource.path(namespace), params, silence_seconds
        ) as lines:
            async for line in lines:
                try:
                    event = json.loads(line)
                except ValueError as error:
                    problem = f"a watch's event is no JSON: {error}"
                    raise self._transport.unreachable(problem) from None
                if event["type"] == "ERROR":
                    raise from_status(event["object"])
                yield event["type"], event["object"]

    async def _object(
        self,
        method: str,
        path: str,
        body: Any = None,
        params: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        answer = await self.raw(method, path, body, params, content_type)
        if not isinstance(answer, dict):
            raise self._transport.unreachable("the answer is no API object", unsure=method != "GET")
        return answer

    async def raw(
        self,
        method: str,
        path: str,
        body: Any = None,
        params: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Any:
        """Sends one request, reads again when that is safe, and parses the answer.

        Returns:
            The answer's JSON, or its text where it has another type.
        """
        attempts = self._read_attempts if method == "GET" else 1
        for attempt in range(1, attempts + 1):
            try:
                return await self._transport.request(method, path, body, params, content_type)
            except ApiError as error:
                busy = isinstance(error, Unreachable) or error.status == 429
                if not busy or attempt == attempts:
                    raise
                delay = _retry_delay(attempt, error.retry_after)
                logger.info("%s %s failed (%s), again in %.1f s", method, path, error, delay)
                await self._sleep(delay)
        raise AssertionError("the loop returns or raises")


def _selectors(label_selector: str | None, field_selector: str | None) -> dict[str, str]:
    chosen = {"labelSelector": label_selector, "fieldSelector": field_selector}
    return {key: value for key, value in chosen.items() if value is not None}


def _retry_delay(attempt: int, retry_after: float | None) -> float:
    """Doubles from try to try, with jitter so that clients do not return all at once."""
    ceiling = min(_RETRY_MAX_SECONDS, _RETRY_BASE_SECONDS * 2**attempt)
    jittered = random.uniform(ceiling / 2, ceiling)
    return max(jittered, min(retry_after or 0.0, _RETRY_MAX_SECONDS))
