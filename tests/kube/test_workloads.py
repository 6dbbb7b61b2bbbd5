"""Following what was launched: a new leader lists everything anew, however late its watches are."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, cast

from tests.builders import OWNER, Object
from tests.control.workloads import workload

from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.picture import Picture
from dpmoe_operator.kube.resources import JOBS, Resource
from dpmoe_operator.kube.workloads import WorkloadWatch
from dpmoe_operator.ledger.fold import LedgerState


class SilentWatches:
    """A server whose lists are right and whose watches bring nothing."""

    def __init__(self) -> None:
        self.jobs: list[Object] = []

    async def raw(self, *_: Any, **__: Any) -> Object:
        return {}

    async def list(self, resource: Resource, *_: Any) -> tuple[list[Object], str]:
        return (list(self.jobs) if resource is JOBS else []), "9"

    async def watch(self, *_: Any, **__: Any) -> AsyncIterator[tuple[str, Object]]:
        await asyncio.Event().wait()
        yield "", {}


async def test_restart_lists_anew_what_came_and_what_went() -> None:
    server, picture = SilentWatches(), Picture()
    watch = WorkloadWatch(cast(KubeClient, server), picture)

    async def seen() -> set[str]:
        async with asyncio.timeout(5):
            await watch.follow([OWNER])
        return set(picture.snapshot(LedgerState(), datetime.now(UTC)).workloads)

    assert await seen() == set()
    server.jobs = [workload("job-1")]
    assert await seen() == set(), "its watch is late"
    await watch.restart()
    assert await seen() == {"job-1"}
    server.jobs = []
    await watch.restart()
    assert await seen() == set()
    await watch.close()
