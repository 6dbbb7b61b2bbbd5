"""What rank 0 tells of its progress, and what of that is remembered over its restarts."""

import asyncio

import pytest
from tests.control.workloads import RUNNING, pod
from tests.kube.conftest import StubServer, ok

from dpmoe_operator.kube import progress
from dpmoe_operator.kube.picture import Picture
from dpmoe_operator.kube.progress import LOCAL_PORT, poll_progress
from dpmoe_trainer.contract import Progress


async def test_restarted_run_shows_no_fewer_steps_than_before(
    stub: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    told = [
        Progress(step=7, steps=9, epsilon=0.5, steps_per_second=2.0, phase="Training"),
        Progress(step=4, steps=9, epsilon=0.5, steps_per_second=1.0, phase="Training"),
    ]
    stub.script(*(ok(each.model_dump(mode="json", by_alias=True)) for each in told))
    picture = Picture()
    manifest = pod({**RUNNING, "podIP": "127.0.0.1"})
    manifest["metadata"]["annotations"][LOCAL_PORT] = stub.url.rpartition(":")[2]
    picture.on_pod("ADDED", manifest)
    polling = asyncio.create_task(poll_progress(picture))
    async with asyncio.timeout(5):
        await stub.asked(4)
    polling.cancel()
    assert picture.progress["job-1"] == told[1].model_copy(update={"step": 7})
