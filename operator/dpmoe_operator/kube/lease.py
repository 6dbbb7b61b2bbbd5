"""Leadership by a coordination.k8s.io Lease: one operator works, the others wait.

The Lease only keeps two operators from doing the same work twice. What keeps them from granting
twice is the ledger's compare-and-swap, which holds whatever the clocks say. No two clocks are
compared: whether another's lease is over is judged by this process' own clock, from when it last
saw the lease change. A process that was stopped finds its lease over when it wakes, since its clock
went on; after the sleep of a whole machine it may not, and then only the ledger tells.
"""

import asyncio
import logging
import os
import re
import socket
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.errors import AlreadyExists, ApiError, Conflict, NotFound
from dpmoe_operator.kube.resources import LEASES

logger = logging.getLogger(__name__)

LEASE_SECONDS = 8
_POD_UID = re.compile(r"[A-Za-z0-9-]{1,64}")


def new_identity(pod_uid: str | None = None) -> str:
    """A name for this process that no other has, at most 253 characters.

    Args:
        pod_uid: `metadata.uid` of the pod that it runs in; its containers, which live one after
            another, know each other by it.

    Raises:
        ValueError: that is no uid.
    """
    process = f"{socket.gethostname()[:128]}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    if pod_uid is None:
        return process
    if not _POD_UID.fullmatch(pod_uid):
        raise ValueError(
            f"DPMOE_POD_UID {pod_uid[:80]!r}: must be the metadata.uid of the operator's own pod;"
            " leave it unset elsewhere"
        )
    return f"{process}_{pod_uid}"


class Leadership:
    """Acquires and renews the Lease until cancelled."""

    def __init__(
        self,
        client: KubeClient,
        *,
        namespace: str,
        name: str,
        identity: str,
        seconds: int = LEASE_SECONDS,
        pod_uid: str | None = None,
    ) -> None:
        """Asks for nothing yet.

        Args:
            client: an open client.
            namespace: where the Lease is.
            name: its name.
            identity: of this process, from `new_identity`.
            seconds: how long a silent leader keeps the lease; it renews four times as often.
            pod_uid: as in the identity.
        """
        self._client, self._namespace, self._name = client, namespace, name
        self._identity, self._pod_uid, self._seconds = identity, pod_uid, seconds
        self._gained = asyncio.Event()
        self._led = False
        self._held_until = 0.0
        self._waits_for = ""
        self._seen_version = ""
        self._theirs_until = 0.0

    @property
    def held(self) -> bool:
        """Whether this process leads now, by its own clock."""
        return time.monotonic() < self._held_until

    async def wait(self) -> None:
        """Wait until this process leads."""
        while not self.held:
            self._gained.clear()
            await self._gained.wait()

    async def run(self) -> None:
        """Keep the lease, or keep trying to get it."""
        leading = False
        while True:
            if leading and not self.held:
                logger.warning("lost the lease %s/%s", self._namespace, self._name)
                leading = False
            await self._try()
            if self.held:
                if not leading:
                    logger.info("leading as %s", self._identity)
                leading = True
                self._gained.set()
            await asyncio.sleep(self._pause())

    async def release(self) -> None:
        """Give the lease up, so that the next operator need not wait for its end."""
        if not self.held:
            return
        self._held_until = 0.0
        try:
            async with asyncio.timeout(self._seconds):
                lease = await self._client.get(LEASES, self._namespace, self._name)
                if lease["spec"].get("holderIdentity") == self._identity:
                    lease["spec"]["holderIdentity"] = ""
                    await self._client.replace(LEASES, self._namespace, self._name, lease)
        except (ApiError, TimeoutError) as error:
            logger.info("the lease was not released: %s", error or "no answer")

    async def _try(self) -> None:
        """Get or renew the lease; it counts from before the request, others count from after it."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._seconds / 2):
                if await self._write():
                    self._held_until = started + self._seconds
                    self._led = True
        except (ApiError, TimeoutError) as error:
            logger.warning("lease %s/%s: %s", self._namespace, self._name, error or "no answer")

    async def _write(self) -> bool:
        """Whether the Lease now names this process, by its own write."""
        try:
            lease = await self._client.get(LEASES, self._namespace, self._name)
        except NotFound:
            return await self._create()
        spec = lease.get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        if holder not in (self._identity, "") and not self._is_over(lease, holder):
            if holder != self._waits_for:
                logger.info("waiting: %s leads", holder)
            self._waits_for = holder
            return False
        self._waits_for = ""
        transitions = (spec.get("leaseTransitions") or 0) + int(holder != self._identity)
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

    def _is_over(self, lease: dict[str, Any], holder: str) -> bool:
        """Whether the holder, another process, does not lead any more."""
        if self._pod_uid is not None and not self._led and holder.endswith(f"_{self._pod_uid}"):
            # This pod's container of before: a kubelet starts the next one when it has ended. Only
            # who never led may say so, or two in one pod would take the lease from each other.
            return True
        version = lease["metadata"]["resourceVersion"]
        if version != self._seen_version:
            duration = lease["spec"].get("leaseDurationSeconds") or self._seconds
            self._seen_version = version
            self._theirs_until = time.monotonic() + duration
        return time.monotonic() >= self._theirs_until

    def _pause(self) -> float:
        """How long until the next try: not beyond the moment in which another's lease ends."""
        left = self._theirs_until - time.monotonic()
        return min(self._seconds / 4, left) if left > 0 else self._seconds / 4

    def _spec(self, transitions: int) -> dict[str, Any]:
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._seconds,
            "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "leaseTransitions": transitions,
        }
