"""The server itself: its life, who may ask it, and how its refusals are answered."""

import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml
from aiohttp import web

from . import errors
from .cluster import Cluster
from .errors import ApiError
from .garbage import GarbageCollector, OwnerIndex, Ref
from .handlers import Api
from .jobs import JobController
from .resources import Object, StorageKey
from .store import Event, encode

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
        api = Api(self.cluster)
        api.add_routes(app, f"/{self.token}")
        api.add_routes(app, "")
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
        """Writes a kubeconfig with the address and the token, readable by the user only.

        The token is also part of the address: kubectl, like all of client-go, never sends a
        bearer token over plain HTTP.
        """
        config: Object = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "embedded", "cluster": {"server": f"{self.url}/{self.token}"}}],
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
        header = request.headers.get("Authorization", "").removeprefix("Bearer ")
        in_path = request.path.split("/")[1]
        is_known = any(
            hmac.compare_digest(given.encode(), self.token.encode()) for given in (header, in_path)
        )
        if not is_known and request.path.rstrip("/") not in PUBLIC_PATHS:
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
    body = encode(refusal.status())
    return web.Response(body=body, status=refusal.code, content_type="application/json")
