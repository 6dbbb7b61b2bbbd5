"""Applies a round's actions to the cluster: launches first, then what people read."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from dpmoe_operator.control.actions import (
    Action,
    DeleteJob,
    MarkStarted,
    Pause,
    Prepare,
    Release,
    Remove,
    SetStatus,
    Stop,
)
from dpmoe_operator.control.steering import pause_patch, release_patch, stop_patch
from dpmoe_operator.control.times import format_time
from dpmoe_operator.control.views import QUEUE_NAME
from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.errors import AlreadyExists, ApiError, Conflict, NotFound, Unreachable
from dpmoe_operator.kube.picture import Picture
from dpmoe_operator.kube.resources import (
    CONFIG_MAPS,
    DPMOE_JOBS,
    EVENTS,
    JOBS,
    NETWORK_POLICIES,
    POD_GROUPS,
    PRIVATE_BLOCKS,
    SERVICES,
    Resource,
)
from dpmoe_operator.launch.launching import Launch
from dpmoe_operator.launch.manifests import build_job, build_owned, build_start_mark

logger = logging.getLogger(__name__)

PARALLEL_WRITES = 16
PATIENCE_SECONDS = 1.5
"""How long a group of actions may keep a round from starting that something new asks for."""

_OWNED = {
    "ConfigMap": CONFIG_MAPS,
    "Service": SERVICES,
    "NetworkPolicy": NETWORK_POLICIES,
    "PodGroup": POD_GROUPS,
}
_CUSTOM = {resource.plural: resource for resource in (PRIVATE_BLOCKS, DPMOE_JOBS)}


class Applier:
    """Writes to the API server. An action that fails is decided again by the next round.

    Whoever is stopped in the midst of it may send the rest much later, when another leads: each
    action is such that it does no harm then.
    """

    def __init__(
        self, client: KubeClient, picture: Picture, *, identity: str, leads: Callable[[], bool]
    ) -> None:
        self._client, self._picture, self._identity = client, picture, identity
        self._leads = leads

    async def apply(self, actions: Iterable[Action]) -> bool:
        """Apply actions in their order, workloads before statuses, each group in parallel.

        Many of them take long. Once something new happens, what is left is left to the next round,
        which sees it and decides the rest again.

        Returns:
            Whether all were tried.
        """
        todo = list(actions)
        workloads = await self._all([a for a in todo if not isinstance(a, SetStatus)])
        statuses = await self._all([a for a in todo if isinstance(a, SetStatus)])
        return workloads and statuses

    async def _all(self, actions: Sequence[Action]) -> bool:
        started, left = time.monotonic(), iter(actions)

        def enough() -> bool:
            late = time.monotonic() - started > PATIENCE_SECONDS
            return late and self._picture.changed.is_set()

        async def work() -> None:
            while self._leads() and not enough() and (action := next(left, None)) is not None:
                await self._one(action)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(PARALLEL_WRITES, len(actions))):
                    group.create_task(work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return next(left, None) is None

    async def _one(self, action: Action) -> None:
        try:
            if isinstance(action, Prepare):
                await self._prepare(action.launch)
            elif isinstance(action, Release):
                await self._release(action)
            elif isinstance(action, Pause):
                await self._pause(action)
            elif isinstance(action, MarkStarted):
                await self._mark_started(action)
            elif isinstance(action, Stop):
                await self._stop(action)
            elif isinstance(action, Remove):
                await self._client.delete(
                    JOBS, action.namespace, action.name, precondition_uid=action.uid
                )
            elif isinstance(action, DeleteJob):
                await self._client.delete(
                    DPMOE_JOBS,
                    action.namespace,
                    action.name,
                    precondition_uid=action.uid,
                    precondition_resource_version=action.resource_version,
                )
            else:
                await self._set_status(action)
        except (NotFound, Conflict):
            pass  # It changed or went since the snapshot: the next round sees it as it is.
        except Unreachable:
            raise
        except ApiError as error:
            logger.error("%s was refused: %s", type(action).__name__, error)

    async def _prepare(self, launch: Launch) -> None:
        """Create the suspended Job and what it owns; all of it may exist from an earlier try."""
        uid = launch.job.uid
        try:
            manifest = build_job(launch)
            await self._refuse_early_queue(manifest)
            job = await self._ensure(JOBS, manifest)
            owner = _owner(job["metadata"]["name"], job["metadata"]["uid"])
            for owned in build_owned(launch):
                owned["metadata"]["ownerReferences"] = [owner]
                there = await self._ensure(_OWNED[owned["kind"]], owned)
                _check_owner(there, owner["uid"])
                if "data" in owned and there.get("data") != owned["data"]:
                    raise ApiError(
                        409, "Conflict", f"ConfigMap {owner['name']} holds another plan: delete it"
                    )
        except Unreachable:
            raise
        except ApiError as error:
            self._picture.launch_errors[uid] = str(error)
            raise
        self._picture.launch_errors.pop(uid, None)
        self._picture.prepared.add(uid)
        self._picture.on_workload("MODIFIED", job)

    async def _refuse_early_queue(self, manifest: dict[str, Any]) -> None:
        """Raise where Kueue would take the Job at once: it may start it before it is launched.

        Where a namespace has a LocalQueue `default`, Kueue's webhook labels Jobs that name none.
        """
        meta = manifest["metadata"]
        try:
            seen = await self._client.create(JOBS, meta["namespace"], manifest, dry_run=True)
        except AlreadyExists:
            return
        queue = (seen["metadata"].get("labels") or {}).get(QUEUE_NAME)
        if queue is not None:
            raise ApiError(
                409,
                "Conflict",
                f"Kueue puts every Job of namespace {meta['namespace']} into LocalQueue {queue!r}"
                " before its launch is in the ledger: give that LocalQueue another name, by which"
                " jobs ask for it in spec.placement.queueName",
            )

    async def _ensure(self, resource: Resource, manifest: dict[str, Any]) -> dict[str, Any]:
        meta = manifest["metadata"]
        try:
            return await self._client.create(resource, meta["namespace"], manifest)
        except AlreadyExists:
            return await self._client.get(resource, meta["namespace"], meta["name"])

    async def _release(self, action: Release) -> None:
        job = await self._patch_job(action, release_patch(action, format_time(datetime.now(UTC))))
        self._picture.on_watched(action.job_uid, job, action.watch)

    async def _pause(self, action: Pause) -> None:
        await self._patch_job(action, pause_patch(action, format_time(datetime.now(UTC))))

    async def _stop(self, action: Stop) -> None:
        job = await self._patch_job(action, stop_patch(action, format_time(datetime.now(UTC))))
        self._picture.on_watched(action.job_uid, job, action.watch)

    async def _patch_job(
        self, action: Release | Pause | Stop, patch: dict[str, Any]
    ) -> dict[str, Any]:
        job = await self._client.patch(JOBS, action.namespace, action.name, patch)
        self._picture.on_workload("MODIFIED", job)
        return job

    async def _mark_started(self, action: MarkStarted) -> None:
        mark = build_start_mark(action.job, action.namespace)
        name, uid = action.owner
        mark["metadata"]["ownerReferences"] = [_owner(name, uid)]
        _check_owner(await self._ensure(CONFIG_MAPS, mark), uid)
        self._picture.marked.add(action.job.uid)

    async def _set_status(self, action: SetStatus) -> None:
        resource = _CUSTOM[action.plural]
        stored = await self._client.patch(
            resource,
            action.namespace,
            action.name,
            {
                "metadata": {"uid": action.uid, "resourceVersion": action.resource_version},
                "status": dict(action.patch),
            },
            subresource="status",
        )
        put: Callable[[dict[str, Any]], None] = (
            self._picture.put_job if resource is DPMOE_JOBS else self._picture.put_block
        )
        put(stored)
        if action.event is not None:
            await self._announce(resource, action, *action.event)

    async def _announce(
        self, resource: Resource, action: SetStatus, kind: str, reason: str, note: str
    ) -> None:
        """An event for `kubectl describe`; the status says the same, so a lost one is no loss."""
        now = datetime.now(UTC)
        event = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {
                "generateName": f"{action.name[:200]}-",
                "namespace": action.namespace,
            },
            "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "reportingController": "dpmoe.dev/operator",
            "reportingInstance": self._identity[:128],
            "action": "Decide",
            "reason": reason,
            "regarding": {
                "apiVersion": resource.api_version,
                "kind": action.kind,
                "namespace": action.namespace,
                "name": action.name,
                "uid": action.uid,
            },
            "note": note[:1024],
            "type": kind,
        }
        try:
            await self._client.create(EVENTS, action.namespace, event)
        except ApiError as error:
            logger.info("event %s of %s was not stored: %s", reason, action.name, error)


def _owner(name: str, uid: str) -> dict[str, str]:
    return {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}


def _check_owner(manifest: dict[str, Any], uid: str) -> None:
    owners = manifest["metadata"].get("ownerReferences") or []
    if not any(owner.get("uid") == uid for owner in owners):
        meta = manifest["metadata"]
        raise ApiError(
            409,
            "Conflict",
            f"{manifest.get('kind', 'object')} {meta['namespace']}/{meta['name']} exists and is"
            " not ours: delete it",
        )
