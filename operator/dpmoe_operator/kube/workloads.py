"""Follows what was launched: Kubernetes Jobs and pods with our label, in the data namespaces only.

kopf watches a kind in all namespaces and filters by label on this side, so it would need the right
to read every pod of the cluster, and would. These watches ask the server for ours alone.
"""

import asyncio
import logging
import time
from collections.abc import Collection
from functools import partial

from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.errors import Forbidden
from dpmoe_operator.kube.picture import Picture
from dpmoe_operator.kube.resources import JOBS, PODS
from dpmoe_operator.kube.watch import Informer
from dpmoe_operator.launch.launching import SELECTOR

logger = logging.getLogger(__name__)

SYNC_SECONDS = 30.0
FORBIDDEN_SECONDS = 30.0
SILENT_SECONDS = 120.0
"""After this a watch is asked about: each is heard of once a minute, by a bookmark at least."""


class WorkloadWatch:
    """One pair of informers for each data namespace that the operator may look into."""

    def __init__(self, client: KubeClient, picture: Picture) -> None:
        self._client, self._picture = client, picture
        self._informers: dict[str, list[Informer]] = {}
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}
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
            if not self._is_followed(namespace):
                await self._ask_again(namespace)
        served = [n for n in namespaces if n in self._tasks]
        for informer in (i for n in served for i in self._informers[n]):
            async with asyncio.timeout(SYNC_SECONDS):
                await informer.synced.wait()
        self._raise_failures()
        return {n: self._forbidden[n][0] for n in namespaces if n not in self._tasks}

    def _is_followed(self, namespace: str) -> bool:
        """Whether its watches are listed and alive."""
        since = time.monotonic() - SILENT_SECONDS
        return namespace in self._tasks and all(
            informer.synced.is_set() and informer.last_contact > since
            for informer in self._informers[namespace]
        )

    async def _ask_again(self, namespace: str) -> None:
        """Watch a namespace, or leave one that was forbidden: its lists would never come."""
        if not await self._may_look(namespace):
            await self._leave(namespace)
        elif namespace not in self._tasks:
            self._run(namespace)

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
        for task in (each for tasks in self._tasks.values() for each in tasks):
            if task.done():
                task.result()

    async def restart(self) -> None:
        """List everything anew, however late the watches are; `follow` waits for the lists."""
        self._raise_failures()
        followed = list(self._tasks)
        await self.close()
        for namespace in followed:
            self._run(namespace)

    async def close(self) -> None:
        """Stop watching."""
        for namespace in list(self._tasks):
            await self._leave(namespace)

    async def _leave(self, namespace: str) -> None:
        """Stop watching a namespace. What was seen there is kept, for the list that comes next."""
        tasks = self._tasks.pop(namespace, [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _run(self, namespace: str) -> None:
        if namespace not in self._informers:
            self._informers[namespace] = self._informers_of(namespace)
        informers = self._informers[namespace]
        for informer in informers:
            informer.synced.clear()
        self._tasks[namespace] = [asyncio.create_task(informer.run()) for informer in informers]

    def _informers_of(self, namespace: str) -> list[Informer]:
        """Jobs first: pods are looked up by the Job that owns them."""
        told = partial(self._picture.on_pods_told, namespace)
        pods = self._picture.on_pod
        return [
            Informer(self._client, JOBS, namespace, SELECTOR, self._picture.on_workload),
            Informer(self._client, PODS, namespace, SELECTOR, pods, on_told=told),
        ]
