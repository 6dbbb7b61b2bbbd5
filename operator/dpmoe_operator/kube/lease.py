"""Leadership by a coordination.k8s.io Lease: one operator works, the others wait.

The Lease only keeps two operators from doing the same work twice. What keeps them from granting
twice is the ledger's compare-and-swap, which holds whatever the clocks say. Whether another's lease
has expired is judged by this process' own clock, from when it last saw the lease change.
"""

import asyncio
import logging
import time
from datetime import UTC, datetime
from typing import Any

from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.errors import AlreadyExists, ApiError, Conflict, NotFound
from dpmoe_operator.kube.resources import LEASES

logger = logging.getLogger(__name__)

DURATION_SECONDS = 15
RENEW_SECONDS = 3


class Leadership:
    """Acquires and renews the Lease until cancelled.

    Attributes:
        acquired: set while this process leads.
    """

    def __init__(self, client: KubeClient, *, namespace: str, name: str, identity: str) -> None:
        self.acquired = asyncio.Event()
        self._client, self._namespace, self._name = client, namespace, name
        self._identity = identity
        self._held_until = 0.0
        self._seen: tuple[str, float] = ("", 0.0)

    @property
    def held(self) -> bool:
        """Whether this process leads now, by its own clock."""
        return time.monotonic() < self._held_until

    async def run(self) -> None:
        """Keep the lease, or keep trying to get it."""
        while True:
            started = time.monotonic()
            try:
                if await self._try():
                    self._held_until = started + DURATION_SECONDS
            except ApiError as error:
                logger.warning("lease %s/%s: %s", self._namespace, self._name, error)
            if self.held and not self.acquired.is_set():
                logger.info("leading as %s", self._identity)
                self.acquired.set()
            elif not self.held and self.acquired.is_set():
                logger.warning("lost the lease %s/%s", self._namespace, self._name)
                self.acquired.clear()
            await asyncio.sleep(RENEW_SECONDS)

    async def release(self) -> None:
        """Give the lease up, so that the next operator need not wait for its end."""
        if not self.held:
            return
        self._held_until = 0.0
        try:
            lease = await self._client.get(LEASES, self._namespace, self._name)
            if lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"]["holderIdentity"] = ""
                await self._client.replace(LEASES, self._namespace, self._name, lease)
        except ApiError as error:
            logger.info("the lease was not released: %s", error)

    async def _try(self) -> bool:
        try:
            lease = await self._client.get(LEASES, self._namespace, self._name)
        except NotFound:
            return await self._create()
        spec = lease.get("spec") or {}
        if spec.get("holderIdentity") not in (self._identity, "", None) and not self._expired(
            lease
        ):
            return False
        taken_over = spec.get("holderIdentity") != self._identity
        transitions = (spec.get("leaseTransitions") or 0) + int(taken_over)
        lease["spec"] = self._spec(transitions)
        try:
            await self._client.replace(LEASES, self._namespace, self._name, lease)
        except Conflict:
            return False
        return True

    async def _create(self) -> bool:
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": self._spec(0),
        }
        try:
            await self._client.create(LEASES, self._namespace, body)
        except AlreadyExists:
            return False
        return True

    def _expired(self, lease: dict[str, Any]) -> bool:
        version = lease["metadata"]["resourceVersion"]
        if version != self._seen[0]:
            self._seen = (version, time.monotonic())
            return False
        duration = lease["spec"].get("leaseDurationSeconds") or DURATION_SECONDS
        return time.monotonic() - self._seen[1] > duration

    def _spec(self, transitions: int) -> dict[str, Any]:
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": DURATION_SECONDS,
            "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "leaseTransitions": transitions,
        }
