"""HTTP to one API server: connections, credentials, time limits, and what failure means.

What holds:

- Everything that is no good answer leaves as an `ApiError`, and a write that was sent without a
  clear answer as `OutcomeUnknown`.
- Nothing is tried again here but what surely did nothing: a request with stale credentials. (The
  HTTP library sends replaces and deletes again when a kept connection turns out to be closed.)
- Neither credentials nor bodies are ever logged or part of a message.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from dpmoe_operator.kube.config import Access, ConfigError
from dpmoe_operator.kube.errors import (
    ApiError,
    OutcomeUnknown,
    Unauthorized,
    Unreachable,
    from_answer,
)

FIELD_MANAGER = "dpmoe"
"""Under which name the server notes who set which field."""

_CONNECT_SECONDS = 10.0
_CREDENTIALS_SECONDS = 30.0
_MAX_ERROR_BYTES = 65536


class Transport:
    """Connections to one API server."""

    def __init__(self, access: Access, timeout_seconds: float):
        self.access = access
        self._timeout = timeout_seconds
        self._session: aiohttp.ClientSession | None = None
        self._authorization: str | None = None
        self._authorization_time = -float("inf")

    async def open(self) -> None:
        """Makes ready; connects to nothing yet."""
        headers = {"User-Agent": FIELD_MANAGER, "Accept": "application/json"}
        self._session = aiohttp.ClientSession(headers=headers)

    async def close(self) -> None:
        """Closes all connections."""
        assert self._session is not None
        await self._session.close()

    async def request(
        self,
        method: str,
        path: str,
        body: Any,
        params: Mapping[str, str] | None,
        content_type: str,
    ) -> Any:
        """Sends one request and parses the answer: its JSON, or its text.

        Raises:
            ApiError: the server refused, did not answer, or answered nonsense.
        """
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        headers = {"Content-Type": content_type} if data is not None else {}
        limits = aiohttp.ClientTimeout(total=self._timeout, sock_connect=_CONNECT_SECONDS)
        async with self._send(method, path, params, data, headers, limits) as response:
            content = await response.read()
            if response.content_type != "application/json":
                return content.decode(errors="replace")
            try:
                return json.loads(content)
            except ValueError as error:
                problem = f"the answer is no JSON: {error}"
                raise self.unreachable(problem, unsure=method != "GET") from None

    @asynccontextmanager
    async def stream(
        self, path: str, params: Mapping[str, str], silence_seconds: float | None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Asks for an answer without an end and gives its lines as they come.

        Args:
            path: what to read.
            params: the query.
            silence_seconds: how long nothing may come; `None` for as long as it takes.

        Raises:
            ApiError: as `request`; `Unreachable` also where it falls silent.
        """
        limits = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_SECONDS, sock_read=silence_seconds
        )
        async with self._send("GET", path, params, None, {}, limits) as response:
            yield _lines(response.content)

    @asynccontextmanager
    async def _send(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None,
        data: bytes | None,
        headers: dict[str, str],
        limits: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A request that got a good answer; everything else leaves as an `ApiError`."""
        assert self._session is not None, "use the client as an async context manager"
        try:
            for fresh in (False, True):
                authorization = await self._current_authorization(fresh)
                if authorization is not None:
                    headers = headers | {"Authorization": authorization}
                async with self._session.request(
                    method,
                    self.access.server + path,
                    params=params,
                    data=data,
                    headers=headers,
                    timeout=limits,
                    ssl=self.access.ssl or True,
                    server_hostname=self.access.server_hostname,
                    proxy=self.access.proxy,
                    allow_redirects=False,
                ) as response:
                    if response.status < 300:
                        yield response
                        return
                    error = await _error(method, path, response)
                    # Who is not let in has done nothing yet, so any request may be sent again.
                    if fresh or not isinstance(error, Unauthorized):
                        raise error
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise self.unreachable(_connect_problem(error)) from error
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise self.unreachable(_problem(error), unsure=method != "GET") from error

    def unreachable(self, problem: str, unsure: bool = False) -> Unreachable:
        """The error for no answer, or none that means anything.

        Args:
            problem: what is wrong.
            unsure: whether a write was sent, so that it may have happened.
        """
        kind = OutcomeUnknown if unsure else Unreachable
        outcome = "; whether the change happened is unknown" if unsure else ""
        return kind(
            0,
            kind.__name__,
            f"the API server {self.access.address} can't be reached: {problem}{outcome}. "
            f"Check that it runs and that {self.access.source} names it",
        )

    async def _current_authorization(self, fresh: bool) -> str | None:
        """The Authorization header; reads the credentials again when told to or in half a minute.

        Reading them may run a program of the user's, hence the thread.
        """
        now = time.monotonic()
        if fresh or now - self._authorization_time > _CREDENTIALS_SECONDS:
            try:
                if fresh:
                    self.access = await asyncio.to_thread(self.access.reload)
                self._authorization = await asyncio.to_thread(self.access.authorization)
            except (ConfigError, OSError) as error:
                raise Unauthorized(0, "Unauthorized", str(error)) from error
            self._authorization_time = now
        return self._authorization


def _connect_problem(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"its certificate is not trusted ({error.certificate_error})"
    if isinstance(error, aiohttp.ClientConnectorError):
        return str(error.os_error.strerror or error.os_error)
    return "connecting takes too long"


def _problem(error: Exception) -> str:
    if isinstance(error, aiohttp.InvalidURL):
        # Its text is the whole URL, which may hold a token.
        return "its address is no URL"
    return str(error) or f"no answer ({type(error).__name__})"


async def _error(method: str, path: str, response: aiohttp.ClientResponse) -> ApiError:
    body = await response.content.read(_MAX_ERROR_BYTES)
    waits = response.headers.get("Retry-After", "")
    retry_after = float(waits) if waits.isdigit() else None
    return from_answer(method, path, response.status, body, retry_after)


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Splits a stream into lines of any length; the stream's own reader has a limit of 128 KiB."""
    parts: list[bytes] = []
    async for chunk in content.iter_any():
        *complete, rest = chunk.split(b"\n")
        for line in complete:
            parts.append(line)
            yield b"".join(parts)
            parts = []
        if rest:
            parts.append(rest)
    if parts:
        yield b"".join(parts)
