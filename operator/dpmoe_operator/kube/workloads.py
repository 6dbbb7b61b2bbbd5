"""Follows what was launched: Kubernetes Jobs and pods with our label, in the data namespaces only.

kopf watches a kind in all namespaces and filters by label on this side, so it would need the right
to read every pod of the cluster, and would. These watches ask the server for ours alone.
"""

import asyncio
import logging
import time
from collections.abc import Collection, Iterable

from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.errors import Forbidden
from dpmoe_operator.kube.picture import Picture
from dpmoe_operator.kube.resources import JOBS, PODS
from dpmoe_operator.kube.watch import Informer
from dpmoe_operator.launch.launching import SELECTOR

logger = logging.getLogger(__name__)

SYNC_SECONDS = 30.0
FORBIDDEN_SECONDS = 30.0


class WorkloadWatch:
    """One pair of informers for each data namespace that the operator may look into."""

    def __init__(self, client: KubeClient, picture: Picture) -> None:
        self._client, self._picture = client, picture
        self._informers: dict[str, list[Informer]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._forbidden: dict[str, tuple[str, float]] = {}

    async def follow(self, namespaces: Collection[str]) -> dict[str, str]:
        """Watch these namespaces too, and wait until each was listed once.

        A round that ran before would take a Job that it has not seen for one that is gone.

        Returns:
            The namespaces that the operator may not look into, and what the server said. Anybody
            who may create a block can name one; it must not keep the others from being served.

        Raises:
            TimeoutError: a namespace could not be listed; nothing may be decided then.
            ApiError: the server does not answer.
        """
        for namespace in sorted(namespaces):
            if namespace not in self._informers and await self._may_look(namespace):
                self._start(namespace)
        served = [n for n in namespaces if n in self._informers]
        for informer in (i for n in served for i in self._informers[n]):
            async with asyncio.timeout(SYNC_SECONDS):
                await informer.synced.wait()
        self._raise_failures()
        return {n: self._forbidden[n][0] for n in namespaces if n not in self._informers}

    async def _may_look(self, namespace: str) -> bool:
        """Whether Jobs and pods may be listed; a refusal is asked about again after a while."""
        refused = self._forbidden.get(namespace)
        if refused is not None and time.monotonic() - refused[1] < FORBIDDEN_SECONDS:
            return False
        try:
            for resource in (JOBS, PODS):
                await self._client.raw("GET", resource.path(namespace), params={"limit": "1"})
        except Forbidden as error:
            logger.warning("namespace %s is not served: %s", namespace, error)
            self._forbidden[namespace] = (str(error), time.monotonic())
            return False
        self._forbidden.pop(namespace, None)
        return True

    def _raise_failures(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()

    async def restart(self) -> None:
        """List everything anew, however late the watches are; `follow` waits for the lists."""
        self._raise_failures()
        await self.close()
        for informers in self._informers.values():
            for informer in informers:
                informer.synced.clear()
            self._run(informers)

    async def close(self) -> None:
        """Stop watching."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    def _start(self, namespace: str) -> None:
        # Jobs first: pods are looked up by the Job that owns them.
        self._informers[namespace] = [
            Informer(self._client, JOBS, namespace, SELECTOR, self._picture.on_workload),
            Informer(self._client, PODS, namespace, SELECTOR, self._picture.on_pod),
        ]
        self._run(self._informers[namespace])

    def _run(self, informers: Iterable[Informer]) -> None:
        self._tasks |= {asyncio.create_task(informer.run()) for informer in informers}
