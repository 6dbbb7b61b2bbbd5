"""Follows what was launched: Kubernetes Jobs and pods with our label, in the data namespaces only.

kopf watches a kind in all namespaces and filters by label on this side, so it would need the right
to read every pod of the cluster, and would. These watches ask the server for ours alone.
"""

import asyncio
from collections.abc import Collection

from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.picture import Picture
from dpmoe_operator.kube.resources import JOBS, PODS
from dpmoe_operator.kube.watch import Informer
from dpmoe_operator.launch.manifests import SELECTOR

SYNC_SECONDS = 30.0


class WorkloadWatch:
    """One pair of informers for each data namespace."""

    def __init__(self, client: KubeClient, picture: Picture) -> None:
        self._client, self._picture = client, picture
        self._informers: dict[str, list[Informer]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def follow(self, namespaces: Collection[str]) -> None:
        """Watch these namespaces too, and wait until each was listed once.

        A round that ran before would take a Job that it has not seen for one that is gone.

        Raises:
            TimeoutError: a namespace could not be listed; nothing may be decided then.
        """
        for namespace in sorted(namespaces):
            if namespace not in self._informers:
                self._start(namespace)
        informers = [i for n in namespaces for i in self._informers[n]]
        for informer in informers:
            await asyncio.wait_for(informer.synced.wait(), SYNC_SECONDS)
        for task in self._tasks:
            if task.done():
                task.result()

    async def close(self) -> None:
        """Stop watching."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, namespace: str) -> None:
        # Jobs first: pods are looked up by the Job that owns them.
        self._informers[namespace] = [
            Informer(self._client, JOBS, namespace, SELECTOR, self._picture.on_workload),
            Informer(self._client, PODS, namespace, SELECTOR, self._picture.on_pod),
        ]
        self._tasks |= {
            asyncio.create_task(informer.run()) for informer in self._informers[namespace]
        }
