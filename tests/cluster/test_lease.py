"""Leadership on a real Lease: one holder, takeover after silence or release, no clock compared."""

import asyncio

from tests.cluster.conftest import ApiServer

from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.config import load_access
from dpmoe_operator.kube.lease import Leadership
from dpmoe_operator.kube.resources import LEASES


def leader(client: KubeClient, namespace: str, identity: str) -> Leadership:
    return Leadership(
        client, namespace=namespace, name="dpmoe-operator", identity=identity, seconds=2
    )


async def test_second_waits_until_the_first_is_silent(api: ApiServer, namespace: str) -> None:
    async with KubeClient(load_access(api.kubeconfig)) as client:
        first, second = leader(client, namespace, "first"), leader(client, namespace, "second")
        async with asyncio.timeout(20):
            one = asyncio.create_task(first.run())
            await first.wait()
            two = asyncio.create_task(second.run())
            await asyncio.sleep(3)
            assert first.held
            assert not second.held
            one.cancel()
            await second.wait()
            assert not first.held
            two.cancel()


async def test_released_lease_is_taken_at_once(api: ApiServer, namespace: str) -> None:
    async with KubeClient(load_access(api.kubeconfig)) as client:
        first, second = leader(client, namespace, "first"), leader(client, namespace, "second")
        async with asyncio.timeout(20):
            one = asyncio.create_task(first.run())
            await first.wait()
            one.cancel()
            await first.release()
            assert not first.held
            two = asyncio.create_task(second.run())
            async with asyncio.timeout(1.5):
                await second.wait()
            two.cancel()
        stored = await client.get(LEASES, namespace, "dpmoe-operator")
        assert stored["spec"]["holderIdentity"] == "second"
        assert stored["spec"]["leaseTransitions"] == 1
