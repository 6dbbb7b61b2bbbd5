"""The informer's picture, over gaps, expiry, silence and rewound history."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dpmoe_operator.kube import watch
from dpmoe_operator.kube.client import KubeClient, Object
from dpmoe_operator.kube.resources import PODS
from dpmoe_operator.kube.watch import Informer

from .conftest import (  # type: ignore[import-not-found]
    Answer,
    StubServer,
    ok,
    refusal,
    stream,
)

Told = list[tuple[str, str, str]]


def pod(name: str, version: int, uid: str = "u") -> Object:
    metadata = {"namespace": "ns", "name": name, "uid": uid + name, "resourceVersion": str(version)}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}


def listing(version: int, *pods: Object) -> Answer:
    return ok({"metadata": {"resourceVersion": str(version)}, "items": list(pods)})


def events(*pairs: tuple[str, Any], then_hang: bool = True) -> Answer:
    lines = [json.dumps({"type": t, "object": o}).encode() + b"\n" for t, o in pairs]
    return stream(*lines, then_hang=then_hang)


def bookmark(version: int) -> tuple[str, Object]:
    return "BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": str(version)}}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_BACKOFF_BASE_SECONDS", 0.001)


@pytest.fixture
async def told(stub: StubServer, client: KubeClient) -> AsyncIterator["Follower"]:
    follower = Follower(client)
    yield follower
    await follower.stop()


class Follower:
    """Runs an informer and keeps what it told."""

    def __init__(self, client: KubeClient):
        self.told: Told = []
        self.news = asyncio.Event()
        self.informer = Informer(client, PODS, on_event=self._hear, silence_seconds=0.3)
        self.task: asyncio.Task[None] | None = None

    def _hear(self, type_: str, obj: Object) -> None:
        self.told.append((type_, obj["metadata"]["name"], obj["metadata"]["resourceVersion"]))
        self.news.set()

    async def until(self, count: int) -> Told:
        if self.task is None:
            self.task = asyncio.create_task(self.informer.run())
        async with asyncio.timeout(10):
            while len(self.told) < count:
                self.news.clear()
                await self.news.wait()
        return self.told

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)


async def test_list_then_watch(stub: StubServer, told: Follower) -> None:
    final = pod("a", 8)
    final["status"] = {"phase": "Failed"}
    stub.script(
        listing(5, pod("a", 3), pod("b", 5)),
        events(("MODIFIED", pod("b", 6)), ("ADDED", pod("c", 7)), ("DELETED", final)),
    )
    assert not told.informer.synced.is_set()
    assert await told.until(5) == [
        ("ADDED", "a", "3"),
        ("ADDED", "b", "5"),
        ("MODIFIED", "b", "6"),
        ("ADDED", "c", "7"),
        ("DELETED", "a", "8"),
    ]
    assert told.informer.synced.is_set()
    assert set(told.informer.objects) == {("ns", "b"), ("ns", "c")}
    assert stub.seen[1].query["resourceVersion"] == "5"


async def test_deleted_carries_the_final_object(stub: StubServer, client: KubeClient) -> None:
    final = pod("a", 8)
    final["status"] = {"phase": "Failed"}
    deleted: asyncio.Queue[Object] = asyncio.Queue()

    def hear(type_: str, obj: Object) -> None:
        if type_ == "DELETED":
            deleted.put_nowait(obj)

    stub.script(listing(5, pod("a", 3)), events(("DELETED", final)))
    task = asyncio.create_task(Informer(client, PODS, on_event=hear).run())
    async with asyncio.timeout(10):
        assert (await deleted.get())["status"] == {"phase": "Failed"}
    task.cancel()


async def test_an_ended_watch_goes_on_from_its_last_version(
    stub: StubServer, told: Follower
) -> None:
    stub.script(
        listing(5),
        events(("ADDED", pod("a", 6)), bookmark(9), then_hang=False),
        events(("ADDED", pod("b", 10))),
    )
    assert await told.until(2) == [("ADDED", "a", "6"), ("ADDED", "b", "10")]
    assert [seen.query.get("resourceVersion") for seen in stub.seen] == [None, "5", "9"]


async def test_a_broken_watch_goes_on_from_its_last_version(
    stub: StubServer, told: Follower
) -> None:
    stub.script(
        listing(5),
        events(("ADDED", pod("a", 6))),
        events(("ADDED", pod("b", 7))),
    )
    assert await told.until(2) == [("ADDED", "a", "6"), ("ADDED", "b", "7")]
    assert [seen.query.get("resourceVersion") for seen in stub.seen] == [None, "5", "6"]


@pytest.mark.parametrize(
    "interruption",
    [
        events(("ERROR", {"kind": "Status", "code": 410, "reason": "Expired"})),
        refusal(410, "Gone"),
        refusal(403, "Forbidden"),
        refusal(404, "NotFound", "the server could not find the requested resource"),
        events(bookmark(2)),
        events(then_hang=True),
        events(then_hang=False),
    ],
    ids=["expired", "gone", "forbidden", "kind", "rewound", "silent", "nothing"],
)
async def test_after_a_gap_the_differences_are_told(
    stub: StubServer, told: Follower, interruption: Answer
) -> None:
    stub.script(
        listing(5, pod("same", 1), pod("changed", 2), pod("gone", 3), pod("reborn", 4)),
        interruption,
        listing(20, pod("same", 1), pod("changed", 11), pod("reborn", 12, uid="v"), pod("new", 13)),
        events(),
    )
    told_all = await told.until(9)
    assert told_all[:4] == [
        ("ADDED", "same", "1"),
        ("ADDED", "changed", "2"),
        ("ADDED", "gone", "3"),
        ("ADDED", "reborn", "4"),
    ]
    assert told_all[4:] == [
        ("DELETED", "gone", "3"),
        ("MODIFIED", "changed", "11"),
        ("DELETED", "reborn", "4"),
        ("ADDED", "reborn", "12"),
        ("ADDED", "new", "13"),
    ]


async def test_says_how_far_it_has_come_and_whether_it_may_have_skipped_something(
    stub: StubServer, client: KubeClient
) -> None:
    told: list[Any] = []
    done = asyncio.Event()

    def hear(version: str, listed: bool) -> None:
        told.append((version, listed))
        if version == "20":
            done.set()

    informer = Informer(
        client, PODS, on_event=lambda _, pod: told.append(pod["metadata"]["name"]), on_told=hear
    )
    stub.script(
        listing(5, pod("a", 3)),
        events(("ADDED", pod("b", 7)), bookmark(9), then_hang=False),
        refusal(410, "Gone"),
        listing(20, pod("b", 11)),
        events(),
    )
    task = asyncio.create_task(informer.run())
    async with asyncio.timeout(10):
        await done.wait()
    task.cancel()
    assert told == ["a", ("5", True), "b", ("7", False), ("9", False), "a", "b", ("20", True)]


async def test_last_contact_stands_still_while_nothing_is_heard(
    stub: StubServer, client: KubeClient
) -> None:
    times = iter(range(1000))
    heard = asyncio.Event()
    informer = Informer(
        client,
        PODS,
        on_event=lambda *_: heard.set(),
        silence_seconds=0.2,
        clock=lambda: float(next(times)),
    )
    assert informer.last_contact == -float("inf")
    stub.script(listing(5, pod("a", 1)), refusal(403, "Forbidden"))
    task = asyncio.create_task(informer.run())
    async with asyncio.timeout(10):
        await heard.wait()
        contact = informer.last_contact
        await stub.asked(6)
    assert informer.last_contact == contact > -float("inf")
    task.cancel()


async def test_a_listener_that_fails_ends_the_informer(
    stub: StubServer, client: KubeClient
) -> None:
    def fail(_type: str, _object: Object) -> None:
        raise ZeroDivisionError

    stub.script(listing(5, pod("a", 1)))
    with pytest.raises(ZeroDivisionError):
        await Informer(client, PODS, on_event=fail).run()
