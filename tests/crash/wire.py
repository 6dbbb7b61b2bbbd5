"""Between an operator and the API server: every call passes here, and may be the last.

The operator's own client asks, down to its transport: only the connections are left out. A `Wire`
counts the calls of one operator process, reads included, and what a `Fault` says happens there.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import aiohttp
from aiohttp import web
from tests.crash.server import Call, InProcessServer
from tests.crash.simulated import Killed

from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.config import Access
from dpmoe_operator.kube.transport import Transport

ANCHOR = "ANCHOR"
"""The method of what goes to the anchor's volume, which counts as a call too."""


class Fault(Enum):
    """What happens at a call."""

    KILL_BEFORE = "killed before it was sent"
    KILL_AFTER = "killed after the server did it"
    KILL_LATE = "killed, and the server does it when the next operator runs already"
    LOST = "it never arrives"
    UNHEARD = "the server does it, its answer is lost"
    ERROR = "the server answers 500 and did nothing"
    BUSY = "the server answers 429"
    PAUSE = "the process stands still before it is sent"

    @property
    def kills(self) -> bool:
        """Whether the process ends."""
        return self in (Fault.KILL_BEFORE, Fault.KILL_AFTER, Fault.KILL_LATE)

    def fits(self, call: Call) -> bool:
        """Whether it makes sense at a call."""
        if call.method == ANCHOR:
            return self.kills or self is Fault.ERROR
        return call.writes or self is not Fault.KILL_LATE


met: Counter[Fault] = Counter()
"""How many faults came to happen in this run of the tests."""


class Wire:
    """All calls of one operator process.

    Attributes:
        calls: what was asked so far, in order.
        faults: what happens at which call, by its number.
        dead: the process ended: nothing that it still tries leaves it; `died` tells when.
        paused: set while the process stands still.
        lagging: what the watches bring is held back until `deliver` lets it through.
        slow: the end of the paths whose watches bring nothing, even where the others do.
        in_flight: what a killed process had sent, and the server has not read yet.
    """

    def __init__(self, server: InProcessServer, faults: Mapping[int, Fault] | None = None) -> None:
        self.calls: list[Call] = []
        self.faults = dict(faults or {})
        self.dead = False
        self.died = asyncio.Event()
        self.paused = asyncio.Event()
        self.lagging = False
        self.slow = ""
        self.in_flight: list[Call] = []
        self._server = server
        self._allowed = 0
        self._moved = asyncio.Event()
        self._resumed = asyncio.Event()
        self._cuts = 0

    def open(self) -> KubeClient:
        """The operator's client, on this wire."""
        client = KubeClient(ACCESS)
        client._transport = _InProcessTransport(self)
        return client

    def deliver(self, count: int) -> None:
        """Let the watches bring so many events, though they lag."""
        self._allowed += count
        self._wake()

    def catch_up(self) -> None:
        """Let the watches bring everything, from now on at once."""
        self.lagging, self._allowed = False, 0
        self._wake()

    def break_watches(self) -> None:
        """Close every connection that a watch reads from."""
        self._cuts += 1
        self._wake()

    def resume(self) -> None:
        """Let a process that stands still go on."""
        self.paused.clear()
        self._resumed.set()
        self._resumed = asyncio.Event()

    def kill(self) -> None:
        """End the process: nothing leaves it any more."""
        self.dead = True
        self.died.set()

    def count(self, call: Call) -> Fault | None:
        """A call is about to leave: what happens at it, if anything."""
        if self.dead:
            raise Killed
        fault = self.faults.pop(len(self.calls), None)
        self.calls.append(call)
        if fault is not None:
            met[fault] += 1
        return fault

    async def exchange(self, call: Call) -> web.Response | None:
        """One call and its answer; None for a watch, whose answer has no end."""
        await asyncio.sleep(0)
        fault = self.count(call)
        if fault is Fault.PAUSE:
            self.lagging = True
            self.paused.set()
        if self.paused.is_set():
            await self._resumed.wait()
        answer = await self._reach(call, fault)
        await asyncio.sleep(0)
        if self.dead:
            raise Killed
        return answer

    async def _reach(self, call: Call, fault: Fault | None) -> web.Response | None:
        if fault is Fault.KILL_LATE and call.writes:
            self.in_flight.append(call)
        if fault in (Fault.KILL_BEFORE, Fault.KILL_LATE):
            self.die()
        if fault is Fault.LOST:
            raise aiohttp.ServerDisconnectedError
        if fault in (Fault.ERROR, Fault.BUSY):
            return _unwell(500 if fault is Fault.ERROR else 429)
        answer = None if call.watches else await self._server.answer(call)
        if fault is Fault.KILL_AFTER:
            self.die()
        if fault is Fault.UNHEARD:
            raise aiohttp.ServerDisconnectedError
        return answer

    def die(self) -> None:
        """The process ends in the midst of what it does."""
        self.kill()
        raise Killed

    async def lines(self, call: Call) -> AsyncIterator[bytes]:
        """A watch's lines, as fast as this wire lets them through."""
        cuts = self._cuts
        async for chunk in self._server.events(call):
            for line in chunk.splitlines(keepends=True):
                await self._pass(call, cuts)
                yield line

    async def _pass(self, call: Call, cuts: int) -> None:
        while True:
            if self.dead:
                raise Killed
            if cuts != self._cuts:
                raise aiohttp.ClientPayloadError("the connection was closed")
            slow = bool(self.slow) and call.path.endswith(self.slow)
            if not self.lagging and not slow:
                return
            if self._allowed > 0:
                self._allowed -= 1
                return
            await self._moved.wait()

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()


def _unwell(status: int) -> web.Response:
    body = {"kind": "Status", "code": status, "reason": "", "message": "the server is not well"}
    return web.Response(
        body=json.dumps(body).encode(), status=status, content_type="application/json"
    )


ACCESS: Access = Access(
    server="http://in-process",
    source="the test",
    namespace="default",
    ssl=None,
    server_hostname=None,
    proxy=None,
    authorization=lambda: None,
    reload=lambda: ACCESS,
)


class _InProcessTransport(Transport):
    """The operator's transport on a session that has no connections."""

    def __init__(self, wire: Wire) -> None:
        super().__init__(ACCESS, 30.0)
        self._wire = wire

    async def open(self) -> None:
        self._session = cast(aiohttp.ClientSession, _Session(self._wire))


class _Session:
    """What the transport uses of `aiohttp.ClientSession`."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    async def close(self) -> None:
        """Nothing is open."""

    @asynccontextmanager
    async def request(
        self,
        method: str,
        url: str,
        *,
        params: Mapping[str, str] | None,
        data: bytes | None,
        headers: Mapping[str, str],
        **_: Any,
    ) -> AsyncIterator["_Answer"]:
        content_type = headers.get("Content-Type", "")
        path = unquote(urlsplit(url).path)
        call = Call(method, path, dict(params or {}), data or b"", content_type)
        response = await self._wire.exchange(call)
        if response is None:
            yield _Answer(200, {}, "application/json", lambda: self._wire.lines(call))
        else:
            body = cast(bytes, response.body)
            yield _Answer(
                response.status, response.headers, response.content_type, lambda: _whole(body)
            )


async def _whole(body: bytes) -> AsyncIterator[bytes]:
    yield body


@dataclass(frozen=True)
class _Answer:
    """What the transport uses of `aiohttp.ClientResponse`."""

    status: int
    headers: Mapping[str, str]
    content_type: str
    chunks: Callable[[], AsyncIterator[bytes]]

    @property
    def content(self) -> "_Content":
        return _Content(self.chunks)

    async def read(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])


@dataclass(frozen=True)
class _Content:
    """What the transport uses of `aiohttp.StreamReader`."""

    iter_any: Callable[[], AsyncIterator[bytes]]

    async def read(self, _limit: int) -> bytes:
        return b"".join([chunk async for chunk in self.iter_any()])
