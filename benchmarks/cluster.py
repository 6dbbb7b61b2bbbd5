"""An API server with a crowd of jobs on it, and a watch that tells when what happened.

One process applies the jobs and sees grants and Kubernetes Jobs appear, so all times are read from
one clock. What is seen late by this process counts as late.
"""

import asyncio
import os
import random
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.config import load_access
from dpmoe_operator.kube.resources import (
    DPMOE_JOBS,
    JOBS,
    LEDGER_ENTRIES,
    NAMESPACES,
    PRIVATE_BLOCKS,
    Resource,
)
from dpmoe_operator.kube.watch import Informer
from dpmoe_operator.launch.launching import JOB_NAME, SELECTOR
from dpmoe_operator.local.envtest import API_SERVER
from dpmoe_operator.local.stack import NAMESPACE, Api, Stack

OWNER, TEAM = "clinic", "team-a"
UNITS = 10_000
PARALLEL = 16
OPEN_BLOCK = "open"
"""A block with budget for all small jobs of a run."""

Object = dict[str, Any]


@contextmanager
def api_server(api: Api) -> Iterator[Stack]:
    """An API server with the custom resources, and nothing that works on them."""
    if api == "envtest":
        os.environ["KUBEBUILDER_ASSETS"] = str(assets())
    with tempfile.TemporaryDirectory(prefix="dpmoe-benchmark-") as folder:
        stack = Stack(Path(folder), api=api)
        try:
            stack.start_api()
            stack.install()
            yield stack
        finally:
            stack.stop()


def assets() -> Path:
    """The real control plane's binaries: those of KUBEBUILDER_ASSETS, else those kept beside."""
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    if folder:
        return Path(folder)
    unpack = ROOT.parent / "shared" / "bin" / "unpack"
    if unpack.exists():
        return Path(subprocess.run([unpack], capture_output=True, text=True).stdout.strip())
    raise SystemExit(
        "--api envtest: KUBEBUILDER_ASSETS is not set; point it at a folder with etcd,"
        " kube-apiserver and kube-controller-manager, or say --api embedded"
    )


def kubernetes_version() -> str:
    """Version of the real API server."""
    command = [str(assets() / API_SERVER), "--version"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()[-1]


class World:
    """The cluster as seen from the benchmark.

    Attributes:
        stack: the server, and the operator where it runs.
        client: an administrator's.
        applied: when the server had confirmed a DPMoEJob, by its name.
        granted: when its grant was seen in the ledger.
        launched: when its Kubernetes Job was seen.
        told: DPMoEJobs whose status says something.
        status_writes: how many changes of DPMoEJobs were seen, beside their creation.
        last_told: when a DPMoEJob was last seen to change.
        last_change: when anything was last seen to.
    """

    def __init__(self, stack: Stack, client: KubeClient, quiet_seconds: float) -> None:
        self.stack, self.client = stack, client
        self._quiet_seconds = quiet_seconds
        self.applied: dict[str, float] = {}
        self.granted: dict[str, float] = {}
        self.launched: dict[str, float] = {}
        self.told: set[str] = set()
        self.status_writes = 0
        self.last_told = self.last_change = time.monotonic()

    async def create(self, resource: Resource, manifests: Sequence[Object]) -> None:
        """Create objects, as fast as a few connections allow."""
        limit = asyncio.Semaphore(PARALLEL)

        async def one(manifest: Object) -> None:
            async with limit:
                meta = manifest["metadata"]
                await self.client.create(resource, meta.get("namespace"), manifest)
                if resource is DPMOE_JOBS:
                    self.applied[meta["name"]] = time.monotonic()

        await asyncio.gather(*(one(manifest) for manifest in manifests))

    async def until(self, holds: Callable[[], bool], what: str, seconds: float) -> None:
        """Wait until something holds; the operator must live until then."""
        deadline = time.monotonic() + seconds
        while not holds():
            operator = self.stack.operator
            if operator is not None and operator.exit_code is not None:
                raise SystemExit(f"the operator ended: {operator.last_lines()}")
            if time.monotonic() > deadline:
                raise SystemExit(f"not within {seconds:.0f} s: {what}")
            await asyncio.sleep(0.05)

    async def quiet(self, limit: float = 900.0) -> None:
        """Wait until every job was told something, and nothing was seen to change for a while."""

        def still() -> bool:
            all_told = self.told >= self.applied.keys()
            return all_told and time.monotonic() - self.last_change > self._quiet_seconds

        await self.until(still, "every job has a status, and nothing changes any more", limit)

    async def until_launched(self, names: Sequence[str], seconds: float = 600.0) -> None:
        """Wait until these jobs have their Kubernetes Jobs."""
        await self.until(
            lambda: self.launched.keys() >= set(names), f"{names[-1]} has its Job", seconds
        )

    def waiting(self) -> int:
        """How many jobs were applied and have no budget."""
        return len(self.applied.keys() - self.granted.keys())

    def follow(self) -> list[Informer]:
        """The watches that keep the times."""
        return [
            Informer(self.client, LEDGER_ENTRIES, NAMESPACE, on_event=self._on_entry),
            Informer(self.client, JOBS, OWNER, SELECTOR, on_event=self._on_workload),
            Informer(self.client, DPMOE_JOBS, TEAM, on_event=self._on_job),
        ]

    def _on_entry(self, event: str, manifest: Object) -> None:
        self.last_change = now = time.monotonic()
        for record in manifest["spec"]["records"]:
            if "granted" in record:
                self.granted.setdefault(record["granted"]["job"]["name"], now)

    def _on_workload(self, event: str, manifest: Object) -> None:
        self.last_change = now = time.monotonic()
        self.launched.setdefault(manifest["metadata"]["labels"][JOB_NAME], now)

    def _on_job(self, event: str, manifest: Object) -> None:
        self.last_told = self.last_change = time.monotonic()
        self.status_writes += event == "MODIFIED"
        if (manifest.get("status") or {}).get("state"):
            self.told.add(manifest["metadata"]["name"])


@asynccontextmanager
async def world(stack: Stack, quiet_seconds: float) -> AsyncIterator[World]:
    """The cluster with its namespaces, watched; quiet is where nothing changes for so long."""
    async with KubeClient(load_access(stack.kubeconfig)) as client:
        result = World(stack, client, quiet_seconds)
        await result.create(NAMESPACES, [{"metadata": {"name": n}} for n in (OWNER, TEAM)])
        informers = result.follow()
        tasks = [asyncio.create_task(informer.run()) for informer in informers]
        try:
            for informer in informers:
                await informer.synced.wait()
            yield result
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def block(name: str, epsilon: str = "10") -> Object:
    """A block with a file of its own, open to the team."""
    return {
        "apiVersion": PRIVATE_BLOCKS.api_version,
        "kind": PRIVATE_BLOCKS.kind,
        "metadata": {"name": name, "namespace": OWNER},
        "spec": {
            "dataset": {
                "claim": {"claimName": "notes", "path": f"{name}.jsonl"},
                "format": "jsonl",
                "textColumn": "text",
                "labelColumn": "label",
                "units": UNITS,
            },
            "budget": {"epsilon": epsilon, "delta": "1e-7"},
            "access": [
                {"namespace": TEAM, "models": ["models"], "outputs": [{"claimName": "results"}]}
            ],
        },
    }


def job(
    name: str, blocks: Sequence[str], *, epsilon: str = "0.1", steps: int = 100, batch: int = 100
) -> Object:
    """A job; by default so small that the open block has budget for thousands of them."""
    return {
        "apiVersion": DPMOE_JOBS.api_version,
        "kind": DPMOE_JOBS.kind,
        "metadata": {"name": name, "namespace": TEAM},
        "spec": {
            "blocks": {"namespace": OWNER, "names": list(blocks)},
            "privacy": {"epsilon": epsilon, "delta": "1e-6"},
            "model": {"claim": {"claimName": "models", "path": "mixtral"}},
            "training": {
                "logicalBatch": batch,
                "steps": steps,
                "optimizer": {"learningRate": "0.001"},
            },
            "output": {"claim": {"claimName": "results", "path": name}},
        },
    }


def crowd(
    rng: random.Random, prefix: str, jobs: int, blocks: Sequence[str], plans: int
) -> list[Object]:
    """Jobs that ask much more than their blocks have, so that most of them wait.

    Args:
        rng: draws plans and blocks.
        prefix: of the jobs' names.
        jobs: how many.
        blocks: of which each job asks one to three.
        plans: how many distinct plans there are; teams run the same recipe again and again.
    """
    recipes = [
        {
            "epsilon": f"{rng.uniform(4, 8):.2f}",
            "steps": rng.randrange(200, 4000, 100),
            "batch": rng.choice((64, 100, 128, 200, 256)),
            "count": rng.randint(1, min(3, len(blocks))),
        }
        for _ in range(plans)
    ]
    result = []
    for number in range(jobs):
        recipe: dict[str, Any] = dict(rng.choice(recipes))
        chosen = rng.sample(list(blocks), recipe.pop("count"))
        result.append(job(f"{prefix}-{number:05d}", chosen, **recipe))
    return result
