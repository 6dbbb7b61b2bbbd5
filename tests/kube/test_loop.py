"""The round loop's own life: it ends when it is told to."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.builders import SETTINGS, MemoryStore

from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.lease import Leadership
from dpmoe_operator.kube.loop import RoundLoop
from dpmoe_operator.kube.picture import Picture
from dpmoe_operator.kube.workloads import WorkloadWatch
from dpmoe_operator.ledger.log import Ledger


class _Served:
    """A watch that has nothing to wait for."""

    async def follow(self, _namespaces: Any) -> dict[str, str]:
        return {}


@pytest.fixture
def picture() -> Picture:
    """An empty cluster."""
    return Picture()


@pytest.fixture
def loop(picture: Picture) -> RoundLoop:
    """A leading loop in an empty cluster: it needs no client there."""
    return RoundLoop(
        client=cast(KubeClient, None),
        picture=picture,
        ledger=Ledger(MemoryStore(), namespace="dpmoe-system", writer="test"),
        leadership=cast(Leadership, SimpleNamespace(held=True)),
        watch=cast(WorkloadWatch, _Served()),
        settings=SETTINGS,
        identity="test",
        round_seconds=3600,
    )


async def test_a_change_in_the_moment_of_the_end_does_not_keep_it_alive(
    loop: RoundLoop, picture: Picture
) -> None:
    task = asyncio.create_task(loop.run())
    await asyncio.sleep(0.3)  # The first round is over, and the loop waits.
    picture.changed.set()
    await asyncio.sleep(0)  # The event is on its way to the loop, which has not seen it yet.
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=5)
    assert done
    assert task.cancelled()
