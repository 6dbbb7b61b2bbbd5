"""The handlers of all paths: which verb a request is, and how its answer is written."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from . import discovery, errors, patches
from .cluster import Cluster
from .errors import Cause
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
from .resources import ACCESS_REVIEWS, Object, Resource
from .store import Stored, encode
from .tables import table
from .watching import DEFAULT_SECONDS, WatchRequest, watch


class Api:
    """The handlers of all paths."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def add_routes(self, app: web.Application, prefix: str) -> None:
        """Adds every path under a prefix; resources come and go, so they share one route."""
        for path, handler in (
            ("/healthz", self._healthy),
            ("/livez", self._healthy),
            ("/readyz", self._healthy),
            ("/version", self._version),
            ("/api", self._core_versions),
            ("/api/{version}", self._core_resources),
            ("/apis", self._groups),
            ("/apis/{group}", self._group),
            ("/apis/{group}/{version}", self._resources),
            ("/openapi/v3", self._openapi_index),
            ("/openapi/v3/api/{version}", self._openapi),
            ("/openapi/v3/apis/{group}/{version}", self._openapi),
        ):
            # The official Python client ends these paths with a slash.
            app.router.add_get(prefix + path + "{slash:/?}", handler)
        app.router.add_route("*", prefix + "/{path:.*}", self._resource)

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
        target = parse_target(self._cluster.registry, request.match_info["path"])
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
            review = {"kind": target.resource.kind, "apiVersion": target.resource.api_version}
            return _json({**review, **body, "metadata": {}, "status": {"allowed": True}}, 201)
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
    return _json(served)


def _many(
    request: web.Request, resource: Resource, found: list[Stored], metadata: Object
) -> web.Response:
    form = parse_form(request.headers.get("Accept", ""))
    if form is Form.TABLE:
        rows = [resource.to_served(each.object) for each in found]
        return _json(table(resource, rows, metadata, _include(request)))
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
