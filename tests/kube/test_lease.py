"""Leadership without a cluster: what ends it, what it counts from, and who need not wait."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from copy import deepcopy
from typing import Any, cast

import pytest
from tests.builders import opened, wrapped

from dpmoe_operator.kube import lease
from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.errors import Conflict, NotFound
from dpmoe_operator.kube.lease import Leadership, new_identity
from dpmoe_operator.ledger.entry import open_entry, seal, to_manifest
from dpmoe_operator.ledger.fold import LedgerState

POD, OTHER_POD = "0f6e1d5c-94a5-4bfb-8d0d-0b7c8e7a1111", "0f6e1d5c-94a5-4bfb-8d0d-0b7c8e7a2222"


class Clock:
    """A monotonic clock that only tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Server:
    """One Lease, as an API server keeps it.

    Attributes:
        answers: no request gets an answer while it is clear.
        before_answer: called after a write has happened, before its answer.
    """

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.answers = asyncio.Event()
        self.answers.set()
        self.before_answer: Callable[[], None] = lambda: None
        self._version = 0

    async def get(self, *_: Any) -> dict[str, Any]:
        await self._answer()
        if self.lease is None:
            raise NotFound(404, "NotFound", "no lease")
        return deepcopy(self.lease)

    async def create(self, _resource: Any, _namespace: Any, body: dict[str, Any]) -> None:
        await self._answer()
        assert self.lease is None
        self._store(body)

    async def replace(self, _r: Any, _ns: Any, _name: Any, body: dict[str, Any]) -> None:
        await self._answer()
        assert self.lease is not None
        if body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise Conflict(409, "Conflict", "it has changed")
        self._store(body)

    def _store(self, body: dict[str, Any]) -> None:
        self._version += 1
        self.lease = deepcopy(body)
        self.lease["metadata"]["resourceVersion"] = str(self._version)
        self.before_answer()

    async def _answer(self) -> None:
        await asyncio.sleep(0)
        await self.answers.wait()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lease, "time", clock)
    return clock


@pytest.fixture
def server() -> Server:
    return Server()


def leader(server: Server, pod_uid: str | None = None) -> Leadership:
    client = cast(KubeClient, server)
    return Leadership(
        client, namespace="n", name="l", identity=new_identity(pod_uid), seconds=1, pod_uid=pod_uid
    )


@asynccontextmanager
async def running(*leaders: Leadership) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(each.run()) for each in leaders]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_next_container_of_the_same_pod_takes_over_at_once(
    clock: Clock, server: Server
) -> None:
    first, second = leader(server, POD), leader(server, POD)
    async with running(first):
        await first.wait()
    async with running(second), asyncio.timeout(5):  # The clock of the lease stands still.
        await second.wait()


@pytest.mark.parametrize("pod_uid", [None, OTHER_POD])
async def test_another_pod_waits_for_the_end(
    clock: Clock, server: Server, pod_uid: str | None
) -> None:
    first, second = leader(server, POD), leader(server, pod_uid)
    async with running(first):
        await first.wait()
    async with running(second):
        for _ in range(3):
            await asyncio.sleep(0.3)  # It has looked by now, and looks again.
            assert not second.held
            clock.now += 0.3
        clock.now += 0.2
        async with asyncio.timeout(5):
            await second.wait()


async def test_two_in_one_pod_do_not_take_the_lease_from_each_other(
    clock: Clock, server: Server
) -> None:
    """As when somebody starts a second operator in the running container, by hand."""
    first, second = leader(server, POD), leader(server, POD)
    async with running(first), asyncio.timeout(5):
        await first.wait()
        async with running(second):
            await second.wait()
            clock.now += 0.9
            await asyncio.sleep(0.6)
    assert server.lease is not None
    assert server.lease["spec"]["leaseTransitions"] == 1


async def test_lease_counts_from_before_the_request(clock: Clock, server: Server) -> None:
    """Others count from when they see it, so it is over here before it is over there."""

    def slow() -> None:
        clock.now += 0.7

    server.before_answer = slow
    first = leader(server)
    async with running(first):
        await first.wait()
        server.answers.clear()
        clock.now += 0.31
        assert not first.held


async def test_who_lost_the_lease_waits_without_holding_up_the_process(
    clock: Clock, server: Server
) -> None:
    """As a process that was stopped past its lease wakes while the server is slow."""
    first = leader(server)
    async with running(first):
        await first.wait()
        server.answers.clear()
        clock.now += 60
        assert not first.held
        waiting = asyncio.create_task(first.wait())
        done, _ = await asyncio.wait([waiting], timeout=0.4)
        assert not done
        server.answers.set()
        async with asyncio.timeout(5):
            await waiting
        assert first.held


async def test_release_of_a_silent_server_ends(server: Server) -> None:
    first = leader(server)
    async with running(first):
        await first.wait()
    server.answers.clear()
    async with asyncio.timeout(5):
        await first.release()
    assert not first.held


def test_identity_can_sign_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "h" * 253)
    identity, empty = new_identity("u" * 64), LedgerState()
    spec = seal(
        sequence=0,
        previous=empty.head,
        time="2030-01-01T12:00:00.000000Z",
        writer=identity,
        records=[wrapped(opened())],
    )
    open_entry(to_manifest(spec, "dpmoe-system"), sequence=0, previous=empty.head)
    assert identity != new_identity("u" * 64)


@pytest.mark.parametrize("uid", ["", "a b", "u" * 65, "a_b"])
def test_pod_uid_that_is_none_is_refused(uid: str) -> None:
    with pytest.raises(ValueError, match=r"DPMOE_POD_UID .* metadata\.uid"):
        new_identity(uid)
