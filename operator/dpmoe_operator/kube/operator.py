"""The operator process: kopf around the round loop.

kopf gives the process its life (login, start, stop, liveness) and the events of PrivateBlocks and
DPMoEJobs. Its handlers only update the picture and wake the loop. There is no per-object timer, no
index, no finalizer and no state on the objects: decisions belong to the loop, truth to the ledger.
"""

import asyncio
import gc
import logging
import os
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import kopf

from dpmoe_operator.control.settings import Settings
from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.config import Access
from dpmoe_operator.kube.errors import ApiError, NotFound, NotServed
from dpmoe_operator.kube.lease import LEASE_SECONDS, Leadership, new_identity
from dpmoe_operator.kube.loop import RoundLoop
from dpmoe_operator.kube.picture import Picture
from dpmoe_operator.kube.progress import poll_progress
from dpmoe_operator.kube.resources import DPMOE_JOBS, LEDGER_ENTRIES, POD_GROUPS, PRIVATE_BLOCKS
from dpmoe_operator.kube.store import KubeEntryStore
from dpmoe_operator.kube.workloads import WorkloadWatch
from dpmoe_operator.ledger.anchor import Anchor
from dpmoe_operator.ledger.log import Ledger
from dpmoe_operator.scheduling.policies import policy

logger = logging.getLogger(__name__)

LEASE_NAME = "dpmoe-operator"
RESYNC_SECONDS = 120.0
"""kopf does not tell what vanished while its watch was interrupted; a fresh list does."""

STALLED_SECONDS = 120.0


class OperatorError(RuntimeError):
    """The operator cannot start; the message says why and what to do."""


@dataclass(frozen=True)
class OperatorOptions:
    """How the process runs, beside what it decides by.

    Attributes:
        settings: what it decides by.
        access: where the API server is.
        round_seconds: the longest time between two rounds.
        liveness: address of kopf's liveness endpoint, e.g. `http://0.0.0.0:8080/healthz`.
        lease_seconds: after how long without a sign of life another operator takes over.
        anchor: folder of the anchor; None where the platform team wants none.
        pod_uid: of the pod that it runs in, so that it need not wait for its own former container.
    """

    settings: Settings
    access: Access
    round_seconds: float = 5.0
    liveness: str | None = None
    lease_seconds: int = LEASE_SECONDS
    anchor: Path | None = None
    pod_uid: str | None = None


def run_operator(options: OperatorOptions) -> None:
    """Run until SIGTERM or SIGINT.

    Raises:
        ValueError: the policy is unknown, or the pod's uid is none.
        OperatorError: the API server cannot be reached, or does not serve or allow what is needed.
    """
    policy(options.settings.policy)
    spare_the_collector()
    asyncio.run(_check_access(options))
    options = replace(options, settings=asyncio.run(_with_what_is_served(options)))
    registry = kopf.OperatorRegistry()
    operator = _Operator(options)
    operator.register(registry)
    kopf.run(
        registry=registry,
        settings=_kopf_settings(),
        clusterwide=True,
        standalone=True,
        liveness_endpoint=options.liveness,
    )


def spare_the_collector() -> None:
    """Let Python look for cycles seldom: rounds make millions of objects, and few cycles.

    Measured on a large ledger: folding takes half the time, decoding a third.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


async def _check_access(options: OperatorOptions) -> None:
    """Read one object of each kind, so that what is missing is one clear line, not a traceback."""
    needed = (
        (PRIVATE_BLOCKS, None),
        (DPMOE_JOBS, None),
        (LEDGER_ENTRIES, options.settings.namespace),
    )
    try:
        async with KubeClient(options.access) as client:
            for resource, namespace in needed:
                await client.raw("GET", resource.path(namespace), params={"limit": "1"})
    except ApiError as error:
        raise OperatorError(str(error)) from error


async def _with_what_is_served(options: OperatorOptions) -> Settings:
    """The settings, without what the API server does not have."""
    settings = options.settings
    if not settings.gangs:
        return settings
    try:
        async with KubeClient(options.access) as client:
            await client.raw("GET", f"/apis/{POD_GROUPS.api_version}")
    except (NotFound, NotServed):
        logger.info("the server has no %s: pods are placed one by one", POD_GROUPS.api_version)
        return replace(settings, gangs=False)
    except ApiError as error:
        raise OperatorError(str(error)) from error
    return settings


def _kopf_settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.networking.request_timeout = 30
    settings.watching.server_timeout = 240
    settings.watching.client_timeout = 270
    settings.persistence.finalizer = "dpmoe.dev/unused"
    return settings


class _Operator:
    """Everything that lives as long as the process does."""

    def __init__(self, options: OperatorOptions) -> None:
        self._options = options
        self._identity = new_identity(options.pod_uid)
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._listing = asyncio.Lock()
        self._picture: Picture
        self._leadership: Leadership
        self._loop: RoundLoop

    def register(self, registry: kopf.OperatorRegistry) -> None:
        """Attach the handlers."""
        kopf.on.login(registry=registry)(self._login)
        kopf.on.startup(registry=registry)(self._start)
        kopf.on.cleanup(registry=registry)(self._stop)
        kopf.on.probe(registry=registry, id="round", errors=kopf.ErrorsMode.PERMANENT)(self._probe)
        blocks = (PRIVATE_BLOCKS.group, PRIVATE_BLOCKS.version, PRIVATE_BLOCKS.plural)
        jobs = (DPMOE_JOBS.group, DPMOE_JOBS.version, DPMOE_JOBS.plural)
        kopf.on.event(*blocks, registry=registry)(self._on_block)
        kopf.on.event(*jobs, registry=registry)(self._on_job)

    def _login(self, **kwargs: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_via_client(**kwargs)

    async def _start(self, **_: Any) -> None:
        options, settings = self._options, self._options.settings
        client = await self._stack.enter_async_context(KubeClient(options.access))
        self._picture = Picture()
        self._leadership = Leadership(
            client,
            namespace=settings.namespace,
            name=LEASE_NAME,
            identity=self._identity,
            seconds=options.lease_seconds,
            pod_uid=options.pod_uid,
        )
        watch = WorkloadWatch(client, self._picture)
        self._stack.push_async_callback(watch.close)
        self._loop = RoundLoop(
            client=client,
            picture=self._picture,
            ledger=Ledger(
                KubeEntryStore(client, settings.namespace),
                namespace=settings.namespace,
                writer=self._identity,
                anchor=Anchor(options.anchor) if options.anchor is not None else None,
            ),
            leadership=self._leadership,
            resync=lambda: self._resync(client),
            watch=watch,
            settings=settings,
            identity=self._identity,
            round_seconds=options.round_seconds,
        )
        try:
            await self._resync(client)
        except ApiError as error:
            raise kopf.PermanentError(f"cannot start: {error}") from error
        self._tasks = [
            self._spawn(self._leadership.run(), "lease"),
            self._spawn(self._loop.run(), "rounds"),
            self._spawn(poll_progress(self._picture), "progress"),
            self._spawn(self._resync_for_ever(client), "resync"),
        ]

    async def _stop(self, **_: Any) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._leadership.release()
        await self._stack.aclose()

    async def _probe(self, **_: Any) -> float:
        """Seconds since the last good round. Raises when rounds have stalled."""
        age = time.monotonic() - self._loop.last_round
        if age > STALLED_SECONDS:
            raise RuntimeError(f"no round for {age:.0f} s")
        return age

    # Asynchronous, so that kopf calls them in the event loop: the picture is of one thread.
    async def _on_block(self, event: Any, body: Any, **_: Any) -> None:
        manifest = dict(event["object"])
        if event["type"] == "DELETED":
            self._picture.drop_block(manifest["metadata"]["uid"])
        else:
            self._picture.put_block(manifest)

    async def _on_job(self, event: Any, body: Any, **_: Any) -> None:
        manifest = dict(event["object"])
        if event["type"] == "DELETED":
            self._picture.drop_job(manifest["metadata"]["uid"])
        else:
            self._picture.put_job(manifest)

    async def _resync(self, client: KubeClient) -> None:
        async with self._listing:
            blocks, jobs = await client.list(PRIVATE_BLOCKS), await client.list(DPMOE_JOBS)
            self._picture.replace_all(blocks, jobs)

    async def _resync_for_ever(self, client: KubeClient) -> None:
        while True:
            await asyncio.sleep(RESYNC_SECONDS)
            try:
                await self._resync(client)
            except ApiError as error:
                logger.warning("resync: %s", error)

    def _spawn(self, coroutine: Any, name: str) -> asyncio.Task[None]:
        """Start a task whose failure ends the process: half an operator is worse than none."""
        task: asyncio.Task[None] = asyncio.create_task(coroutine, name=name)

        def check(done: asyncio.Task[None]) -> None:
            if not done.cancelled() and (error := done.exception()) is not None:
                logger.critical("%s failed", name, exc_info=error)
                os._exit(1)

        task.add_done_callback(check)
        return task
