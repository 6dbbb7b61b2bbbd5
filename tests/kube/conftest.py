"""A scripted HTTP server: what the API server answers when things go wrong, on a real socket."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.config import Access

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Seen:
    """One request, as the server got it."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass
class StubServer:
    """Gives the scripted answers in order, the last one for ever, and remembers the requests."""

    url: str = ""
    answers: list[Answer] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    news: asyncio.Condition = field(default_factory=asyncio.Condition)

    def script(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.seen.clear()

    async def asked(self, count: int) -> None:
        """Waits until so many requests have come."""
        async with self.news:
            await self.news.wait_for(lambda: len(self.seen) >= count)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        headers, body = dict(request.headers), await request.read()
        query = dict(request.query)
        self.seen.append(Seen(request.method, request.path, query, headers, body))
        async with self.news:
            self.news.notify_all()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return await answer(request)


def access(url: str, token: Callable[[], str | None] = lambda: None) -> Access:
    return Access(
        server=url,
        source="the test",
        namespace="default",
        ssl=None,
        server_hostname=None,
        proxy=None,
        authorization=token,
        reload=lambda: access(url, token),
    )


def ok(body: Any) -> Answer:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response(body)

    return answer


def refusal(code: int, reason: str, message: str = "no", **headers: str) -> Answer:
    status = {"kind": "Status", "code": code, "reason": reason, "message": message}

    async def answer(_: web.Request) -> web.StreamResponse:
        fields = {key.replace("_", "-"): value for key, value in headers.items()}
        return web.json_response(status, status=code, headers=fields)

    return answer


def hang() -> Answer:
    async def answer(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        raise AssertionError("the client waited for a minute")

    return answer


def drop() -> Answer:
    """Takes the request and closes the connection without a word."""

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    return answer


def stream(*lines: bytes, then_hang: bool = False) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for line in lines:
            await response.write(line)
        if then_hang:
            await asyncio.sleep(60)
        return response

    return answer


@pytest.fixture
async def stub() -> AsyncIterator[StubServer]:
    server = StubServer()
    app = web.Application(client_max_size=2**24)
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


@pytest.fixture
def naps() -> list[float]:
    """How long the client slept between its tries."""
    return []


@pytest.fixture
async def client(stub: StubServer, naps: list[float]) -> AsyncIterator[KubeClient]:
    async def nap(seconds: float) -> None:
        naps.append(seconds)

    async with KubeClient(access(stub.url), timeout_seconds=0.5, sleep=nap) as opened:
        yield opened
