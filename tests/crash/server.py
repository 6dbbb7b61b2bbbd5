"""The embedded API server without a socket: its own store, controllers and handlers answer."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import cast

from aiohttp import web

from dpmoe_operator.local.apiserver import EmbeddedApiServer
from dpmoe_operator.local.apiserver.errors import ApiError
from dpmoe_operator.local.apiserver.handlers import Api
from dpmoe_operator.local.apiserver.requests import (
    parse_form,
    parse_query_selection,
    parse_revision,
    parse_target,
)
from dpmoe_operator.local.apiserver.store import encode
from dpmoe_operator.local.apiserver.watching import WatchRequest, watch


@dataclass(frozen=True)
class Call:
    """One request, as it left the operator."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    content_type: str = ""

    def __str__(self) -> str:
        verb = "WATCH" if self.watches else self.method
        return f"{verb} {self.path}"

    @property
    def writes(self) -> bool:
        """Whether something changes by it."""
        return self.method != "GET"

    @property
    def watches(self) -> bool:
        """Whether it asks for an answer without an end."""
        return self.query.get("watch") == "true"


class InProcessServer(EmbeddedApiServer):
    """The embedded server, asked in the process that it lives in."""

    async def _listen(self, stack: AsyncExitStack) -> None:
        self.api = Api(self.cluster)
        stack.callback(self.cluster.store.close)

    async def answer(self, call: Call) -> web.Response:
        """What the server's handlers answer, its refusals included."""
        request = _Request(
            call.method, call.query, call.body, call.content_type, {"path": call.path.lstrip("/")}
        )
        try:
            # The one route of all resources; aiohttp's router has nothing to add to it.
            return cast(web.Response, await self.api._resource(cast(web.Request, request)))
        except ApiError as refusal:
            return web.Response(
                body=encode(refusal.status()), status=refusal.code, content_type="application/json"
            )

    def events(self, call: Call) -> AsyncIterator[bytes]:
        """The lines of a watch."""
        target = parse_target(self.cluster.registry, call.path)
        wanted = WatchRequest(
            resource=target.resource,
            selection=parse_query_selection(target, call.query),
            form=parse_form("application/json"),
            include="Metadata",
            since=parse_revision(call.query),
            initial_events=False,
            bookmarks=True,
            seconds=int(call.query["timeoutSeconds"]),
        )
        return watch(self.cluster, wanted)


@dataclass(frozen=True)
class _Request:
    """What the handlers read of a request."""

    method: str
    query: Mapping[str, str]
    body: bytes
    content_type: str
    match_info: Mapping[str, str]
    headers: Mapping[str, str] = field(default_factory=dict)

    async def read(self) -> bytes:
        return self.body
