"""The HTTP side: who may ask, which verb a request is, and how its answer is written."""

import hmac
import json
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from aiohttp import web

from . import discovery, errors, patches
from .cluster import Cluster
from .errors import ApiError, Cause
from .garbage import GarbageCollector, OwnerIndex, Ref
from .jobs import JobController
from .logs import pod_log
from .requests import (
    Form,
    Target,
    format_continue,
    parse_deletion,
    parse_flag,
    parse_form,
    parse_page,
    parse_query_selection,
    parse_revision,
    parse_seconds,
    parse_target,
    parse_write,
)
from .resources import ACCESS_REVIEWS, Object, Resource, StorageKey
from .store import Event, Stored, encode
from .tables import partial_metadata, table
from .watching import DEFAULT_SECONDS, WatchRequest, watch

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
LARGEST_BODY = 3 * 1024 * 1024
# Open to everyone, as probes are.
PUBLIC_PATHS = ("/healthz", "/livez", "/readyz", "/version")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class EmbeddedApiServer:
    """An in-memory API server on loopback, with the controllers that Jobs and deletions need.

    Use it as an async context manager; it serves while the context lasts, and everything is
    forgotten afterwards.

    Args:
        port: where to listen; 0 takes a free one.
        token: the bearer token that clients must send; a random one by default.

    Attributes:
        url: address of the server, known once it serves.
        cluster: what it serves.
    """

    def __init__(self, port: int = 0, token: str | None = None) -> None:
        self.token = token or secrets.token_hex(16)
        self.url = ""
        self.cluster = Cluster()
        self._port = port
        self._running = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Starts to serve.

        Raises:
            OSError: the port is in use.
        """
        async with AsyncExitStack() as starting:
            owners = OwnerIndex()
            collector = GarbageCollector(self.cluster, owners)
            jobs = JobController(self.cluster, owners)

            def follow(key: StorageKey, event: Event) -> None:
                ref = Ref.of(key, event.current.object)
                owners.record(ref, event)
                collector.observe(ref, event)
                jobs.observe(ref, event)

            self.cluster.store.listeners.append(follow)
            await starting.enter_async_context(collector.queue.running())
            await starting.enter_async_context(jobs.queue.running())
            await self._listen(starting)
            self._running = starting.pop_all()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._running.aclose()

    async def _listen(self, stack: AsyncExitStack) -> None:
        app = web.Application(
            client_max_size=LARGEST_BODY, middlewares=[_answer_errors, self._authenticate]
        )
        Api(self.cluster).add_routes(app)
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0
        )
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, HOST, self._port)
        await site.start()
        # Watches end first, or the clean-up would wait for them.
        stack.callback(self.cluster.store.close)
        self.url = f"http://{HOST}:{runner.addresses[0][1]}"

    def write_kubeconfig(self, path: Path) -> None:
        """Writes a kubeconfig with the address and the token, readable by the user only."""
        config: Object = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "embedded", "cluster": {"server": self.url}}],
            "users": [{"name": "embedded", "user": {"token": self.token}}],
            "contexts": [
                {"name": "embedded", "context": {"cluster": "embedded", "user": "embedded"}}
            ],
            "current-context": "embedded",
        }
        path.touch(mode=0o600)
        path.chmod(0o600)
        path.write_text(yaml.safe_dump(config, sort_keys=False))

    @web.middleware
    async def _authenticate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in PUBLIC_PATHS:
            given = request.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
                raise errors.unauthorized()
        return await handler(request)


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns every refusal, and every bug, into a `Status`."""
    try:
        return await handler(request)
    except ApiError as error:
        refusal = error
    except web.HTTPRequestEntityTooLarge:
        refusal = errors.too_large(LARGEST_BODY)
    except Exception:
        logger.exception("%s %s failed", request.method, request.path)
        refusal = ApiError(500, "InternalError", "Internal error: see the API server's log")
    return _json(refusal.status(), refusal.code)


class Api:
    """The handlers of all paths."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def add_routes(self, app: web.Application) -> None:
        """Adds every path; resources come and go, so they share one route."""
        router = app.router
        for path in ("/healthz", "/livez", "/readyz"):
            router.add_get(path, self._healthy)
        router.add_get("/version", self._version)
        router.add_get("/api", self._core_versions)
        router.add_get("/api/{version}", self._core_resources)
        router.add_get("/apis", self._groups)
        router.add_get("/apis/{group}", self._group)
        router.add_get("/apis/{group}/{version}", self._resources)
        router.add_get("/openapi/v3", self._openapi_index)
        router.add_get("/openapi/v3/api/{version}", self._openapi)
        router.add_get("/openapi/v3/apis/{group}/{version}", self._openapi)
        router.add_route("*", "/{path:.*}", self._resource)

    # Discovery

    async def _healthy(self, request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _version(self, request: web.Request) -> web.Response:
        return _json(discovery.VERSION)

    async def _core_versions(self, request: web.Request) -> web.Response:
        return _json(discovery.core_versions(request.host))

    async def _core_resources(self, request: web.Request) -> web.Response:
        version = request.match_info["version"]
        return _found(discovery.resources(self._cluster.registry, "", version))

    async def _groups(self, request: web.Request) -> web.Response:
        return _json(discovery.groups(self._cluster.registry))

    async def _group(self, request: web.Request) -> web.Response:
        return _found(discovery.group(self._cluster.registry, request.match_info["group"]))

    async def _resources(self, request: web.Request) -> web.Response:
        group, version = request.match_info["group"], request.match_info["version"]
        return _found(discovery.resources(self._cluster.registry, group, version))

    async def _openapi_index(self, request: web.Request) -> web.Response:
        return _json(discovery.openapi_index(self._cluster.registry))

    async def _openapi(self, request: web.Request) -> web.Response:
        group, version = request.match_info.get("group", ""), request.match_info["version"]
        return _found(discovery.openapi_document(self._cluster.registry, group, version))

    # Resources

    async def _resource(self, request: web.Request) -> web.StreamResponse:
        target = parse_target(self._cluster.registry, request.path)
        is_watch = parse_flag(request.query, "watch")
        verb = _verb(request.method, target, is_watch=is_watch)
        if verb not in target.resource.verbs:
            raise errors.method_not_allowed()
        handlers: dict[str, Callable[[web.Request, Target], Awaitable[web.StreamResponse]]] = {
            "get": self._get,
            "list": self._list,
            "watch": self._watch,
            "create": self._create,
            "update": self._update,
            "patch": self._patch,
            "delete": self._delete,
            "deletecollection": self._delete_collection,
        }
        if target.subresource == "log":
            return await self._log(request, target)
        if target.subresource == "binding":
            return await self._bind(request, target)
        return await handlers[verb](request, target)

    async def _get(self, request: web.Request, target: Target) -> web.Response:
        stored = self._cluster.get(target.resource, target.namespace or "", target.name)
        return _one(request, target.resource, stored)

    async def _list(self, request: web.Request, target: Target) -> web.Response:
        selection = parse_query_selection(target, request.query)
        current = self._cluster.store.revision
        asked = parse_revision(request.query)
        if asked is not None and asked > current:
            raise errors.future_version(asked, current)
        page = parse_page(request.query)
        found = list(self._cluster.select(target.resource, selection))
        if page.start is not None:
            found = [each for each in found if _place(each) > page.start]
        metadata: Object = {"resourceVersion": str(page.revision or current)}
        if page.limit and len(found) > page.limit:
            left = len(found) - page.limit
            found = found[: page.limit]
            metadata["continue"] = format_continue(page.revision or current, *_place(found[-1]))
            if not selection.is_narrow:
                metadata["remainingItemCount"] = left
        return _many(request, target.resource, found, metadata)

    async def _watch(self, request: web.Request, target: Target) -> web.StreamResponse:
        query = request.query
        initial_events = parse_flag(query, "sendInitialEvents")
        if initial_events and query.get("resourceVersionMatch") != "NotOlderThan":
            detail = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
            cause = Cause.forbidden("resourceVersionMatch", detail)
            raise errors.invalid_option("ListOptions", cause)
        wanted = WatchRequest(
            resource=target.resource,
            selection=parse_query_selection(target, query),
            form=parse_form(request.headers.get("Accept", "")),
            include=query.get("includeObject", "Metadata"),
            since=parse_revision(query),
            initial_events=initial_events,
            bookmarks=parse_flag(query, "allowWatchBookmarks"),
            seconds=parse_seconds(query, "timeoutSeconds") or DEFAULT_SECONDS,
        )
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        async for chunk in watch(self._cluster, wanted):
            await response.write(chunk)
        await response.write_eof()
        return response

    async def _create(self, request: web.Request, target: Target) -> web.Response:
        write = parse_write(request.query, "CreateOptions")
        body = await _body(request)
        if target.resource is ACCESS_REVIEWS:
            return _json({**body, "status": {"allowed": True}}, 201)
        created = self._cluster.create(target.resource, target.namespace or "", body, write)
        return _json(created, 201, write.warnings)

    async def _update(self, request: web.Request, target: Target) -> web.Response:
        write = parse_write(request.query, "UpdateOptions")
        body, place = await _body(request), (target.namespace or "", target.name)
        updated = self._cluster.update(target.resource, *place, body, target.subresource, write)
        return _json(updated, 200, write.warnings)

    async def _patch(self, request: web.Request, target: Target) -> web.Response:
        write = parse_write(request.query, "PatchOptions")
        resource, place = target.resource, (target.namespace or "", target.name)
        if request.content_type == patches.APPLY_PATCH:
            if not request.query.get("fieldManager"):
                cause = Cause.required("fieldManager", "is required for apply patch")
                raise errors.invalid_option("PatchOptions", cause)
            content = await request.read()
            applied, created = self._cluster.apply(
                resource, *place, content, target.subresource, write
            )
            return _json(applied, 201 if created else 200, write.warnings)
        change = _change(resource, request.content_type, await request.read())
        patched = self._cluster.modify(resource, *place, change, target.subresource, write)
        return _json(patched, 200, write.warnings)

    async def _delete(self, request: web.Request, target: Target) -> web.Response:
        how = parse_deletion(request.query, await _body(request, optional=True))
        resource = target.resource
        obj, gone = self._cluster.delete(resource, target.namespace or "", target.name, how)
        if not gone or resource.plural == "pods":
            return _json(resource.to_served(obj))
        details: Object = {"name": target.name, "kind": resource.plural}
        if resource.group:
            details["group"] = resource.group
        details["uid"] = obj["metadata"]["uid"]
        status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        return _json({**status, "details": details})

    async def _delete_collection(self, request: web.Request, target: Target) -> web.Response:
        how = parse_deletion(request.query, await _body(request, optional=True))
        selection = parse_query_selection(target, request.query)
        resource, found = target.resource, list(self._cluster.select(target.resource, selection))
        for stored in found:
            namespace, name = _place(stored)
            self._cluster.delete(resource, namespace, name, how)
        metadata = {"resourceVersion": str(self._cluster.store.revision)}
        return _many(request, resource, found, metadata)

    # Subresources of pods

    async def _log(self, request: web.Request, target: Target) -> web.StreamResponse:
        if parse_flag(request.query, "previous"):
            raise errors.bad_request("logs of previous containers are not kept")
        lines = pod_log(
            self._cluster,
            target.namespace or "",
            target.name,
            follow=parse_flag(request.query, "follow"),
            tail_lines=parse_seconds(request.query, "tailLines"),
        )
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        async for chunk in lines:
            if not response.prepared:
                await response.prepare(request)
            await response.write(chunk)
        if not response.prepared:
            await response.prepare(request)
        await response.write_eof()
        return response

    async def _bind(self, request: web.Request, target: Target) -> web.Response:
        """Gives a pod to a node, as schedulers do."""
        body = await _body(request)
        node = body.get("target", {}).get("name")
        if not node:
            raise errors.bad_request("target.name: the node to bind to is required")

        def assign(pod: Object) -> Object:
            if pod["spec"].get("nodeName"):
                why = f"pod {target.name} is already assigned to node {pod['spec']['nodeName']}"
                raise errors.conflict(target.resource, target.name, why)
            return {**pod, "spec": {**pod["spec"], "nodeName": node}}

        self._cluster.modify(target.resource, target.namespace or "", target.name, assign)
        status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        return _json({**status, "code": 201}, 201)


# Requests


def _verb(method: str, target: Target, *, is_watch: bool) -> str:
    """Which verb a method is on an object, a collection or a subresource."""
    if target.subresource == "log":
        allowed = {"GET": "get"}
    elif target.subresource == "binding":
        allowed = {"POST": "create"}
    elif target.subresource:
        allowed = {"GET": "get", "PUT": "update", "PATCH": "patch"}
    elif target.name:
        get = "watch" if is_watch else "get"
        allowed = {"GET": get, "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
    else:
        allowed = {"GET": "watch" if is_watch else "list", "DELETE": "deletecollection"}
        if target.namespace is not None:
            allowed["POST"] = "create"
    if method not in allowed:
        raise errors.method_not_allowed()
    return allowed[method]


async def _body(request: web.Request, *, optional: bool = False) -> Any:
    """The JSON body of a request; an empty object where none is needed and none came."""
    content = await request.read()
    if not content and optional:
        return {}
    if request.content_type not in ("application/json", "application/octet-stream"):
        raise errors.unsupported_media_type(["application/json"])
    return _parse_json(content)


def _parse_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise errors.bad_request(f"json parse error: {error}") from None


def _change(resource: Resource, content_type: str, content: bytes) -> Callable[[Object], Object]:
    """The function that a patch is."""
    accepted = [patches.JSON_PATCH, patches.MERGE_PATCH, patches.APPLY_PATCH]
    if not resource.custom:
        accepted.append(patches.STRATEGIC_PATCH)
    if content_type not in accepted:
        raise errors.unsupported_media_type(accepted)
    patch = _parse_json(content)
    if content_type == patches.JSON_PATCH:
        if not isinstance(patch, list):
            raise errors.bad_request("error decoding patch: a JSON patch is a list of operations")
        return lambda obj: patches.json_patch(obj, patch)
    if not isinstance(patch, dict):
        raise errors.bad_request("error decoding patch: a merge patch is an object")
    merge = patches.merge_patch if content_type == patches.MERGE_PATCH else patches.strategic_merge
    return lambda obj: merge(obj, patch)


def _place(stored: Stored) -> tuple[str, str]:
    metadata = stored.object["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


# Answers


def _json(body: Object, code: int = 200, warnings: list[str] | None = None) -> web.Response:
    return _raw(encode(body), code, warnings)


def _raw(body: bytes, code: int = 200, warnings: list[str] | None = None) -> web.Response:
    response = web.Response(body=body, status=code, content_type="application/json")
    for warning in warnings or ():
        response.headers.add("Warning", f"299 - {json.dumps(warning)}")
    return response


def _found(document: Object | None) -> web.Response:
    if document is None:
        raise errors.unknown_path()
    return _json(document)


def _one(request: web.Request, resource: Resource, stored: Stored) -> web.Response:
    form = parse_form(request.headers.get("Accept", ""))
    if form is Form.OBJECT and resource.is_native(stored.object):
        return _raw(stored.raw)
    served = resource.to_served(stored.object)
    if form is Form.TABLE:
        metadata = {"resourceVersion": served["metadata"]["resourceVersion"]}
        return _json(table(resource, [served], metadata, _include(request)))
    return _json(partial_metadata(served) if form is Form.PARTIAL else served)


def _many(
    request: web.Request, resource: Resource, found: list[Stored], metadata: Object
) -> web.Response:
    form = parse_form(request.headers.get("Accept", ""))
    if form is Form.TABLE:
        rows = [resource.to_served(each.object) for each in found]
        return _json(table(resource, rows, metadata, _include(request)))
    if form is Form.PARTIAL:
        items = [encode(partial_metadata(resource.to_served(each.object))) for each in found]
        head = {"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1"}
    else:
        items = [
            each.raw if resource.is_native(each.object) else encode(resource.to_served(each.object))
            for each in found
        ]
        head = {"kind": resource.list_kind, "apiVersion": resource.api_version}
    # The items are JSON already; only what surrounds them is written anew.
    opening = encode({**head, "metadata": metadata})[:-1]
    return _raw(opening + b',"items":[' + b",".join(items) + b"]}")


def _include(request: web.Request) -> str:
    return request.query.get("includeObject", "Metadata")
