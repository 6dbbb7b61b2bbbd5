"""Leadership on a real Lease: one holder, takeover after silence or release, no clock compared."""

import asyncio

import pytest
from tests.cluster.conftest import ApiServer

from dpmoe_operator.kube import lease
from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.config import load_access
from dpmoe_operator.kube.lease import Leadership
from dpmoe_operator.kube.resources import LEASES


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "DURATION_SECONDS", 2)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)


def leader(client: KubeClient, namespace: str, identity: str) -> Leadership:
    return Leadership(client, namespace=namespace, name="dpmoe-operator", identity=identity)


async def test_second_waits_until_the_first_is_silent(api: ApiServer, namespace: str) -> None:
    async with KubeClient(load_access(api.kubeconfig)) as client:
        first, second = leader(client, namespace, "first"), leader(client, namespace, "second")
        one = asyncio.create_task(first.run())
        await asyncio.wait_for(first.acquired.wait(), 10)
        two = asyncio.create_task(second.run())
        await asyncio.sleep(3)
        assert first.held
        assert not second.held
        one.cancel()
        await asyncio.wait_for(second.acquired.wait(), 10)
        assert not first.held
        two.cancel()


async def test_released_lease_is_taken_at_once(api: ApiServer, namespace: str) -> None:
    async with KubeClient(load_access(api.kubeconfig)) as client:
        first, second = leader(client, namespace, "first"), leader(client, namespace, "second")
        one = asyncio.create_task(first.run())
        await asyncio.wait_for(first.acquired.wait(), 10)
        one.cancel()
        await first.release()
        assert not first.held
        two = asyncio.create_task(second.run())
        await asyncio.wait_for(second.acquired.wait(), 1.5)
        two.cancel()
        stored = await client.get(LEASES, namespace, "dpmoe-operator")
        assert stored["spec"]["holderIdentity"] == "second"
        assert stored["spec"]["leaseTransitions"] == 1
