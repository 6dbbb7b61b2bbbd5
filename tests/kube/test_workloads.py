"""Following what was launched: a new leader lists everything anew, however late its watches are."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from tests.builders import OWNER, Object
from tests.control.workloads import workload

from dpmoe_operator.kube import workloads
from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.errors import Forbidden
from dpmoe_operator.kube.picture import Picture
from dpmoe_operator.kube.resources import JOBS, Resource
from dpmoe_operator.kube.workloads import WorkloadWatch
from dpmoe_operator.ledger.fold import LedgerState


class SilentWatches:
    """A server whose lists are right and whose watches bring nothing.

    Attributes:
        jobs: what it lists.
        forbidden: namespaces in which the operator has no rights.
    """

    def __init__(self) -> None:
        self.jobs: list[Object] = []
        self.forbidden: set[str] = set()

    async def raw(self, _method: str, path: str, **_: Any) -> Object:
        self._check(path.split("/")[5])
        return {}

    async def list(self, resource: Resource, namespace: str, *_: Any) -> tuple[list[Object], str]:
        self._check(namespace)
        return (list(self.jobs) if resource is JOBS and namespace == OWNER else []), "9"

    def _check(self, namespace: str) -> None:
        if namespace in self.forbidden:
            raise Forbidden(403, "Forbidden", "jobs.batch is forbidden")

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


@pytest.mark.parametrize("noticed", ["by a new leader", "by its silence"])
async def test_namespace_that_becomes_forbidden_keeps_no_other_from_being_served(
    monkeypatch: pytest.MonkeyPatch, noticed: str
) -> None:
    monkeypatch.setattr(workloads, "SYNC_SECONDS", 1.0)
    monkeypatch.setattr(workloads, "FORBIDDEN_SECONDS", 0.0)
    server, picture = SilentWatches(), Picture()
    server.jobs = [workload("job-1")]
    watch = WorkloadWatch(cast(KubeClient, server), picture)
    assert await watch.follow([OWNER, "other"]) == {}
    server.forbidden = {OWNER}
    if noticed == "by a new leader":
        await watch.restart()
    else:
        monkeypatch.setattr(workloads, "SILENT_SECONDS", -1.0)
    assert await watch.follow([OWNER, "other"]) == {OWNER: "jobs.batch is forbidden"}
    await watch.restart()
    assert await watch.follow([OWNER, "other"]) == {OWNER: "jobs.batch is forbidden"}
    # What went while nobody might look is gone once somebody may.
    server.forbidden, server.jobs = set(), []
    assert await watch.follow([OWNER, "other"]) == {}
    assert picture.snapshot(LedgerState(), datetime.now(UTC)).workloads == {}
    await watch.close()
