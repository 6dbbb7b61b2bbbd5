"""The real `dpmoe operator`, timed from outside while it works through jobs without pods.

Nothing runs the pods: a job that got its budget and its Kubernetes Job holds its reservation for
good, so whoever waits keeps waiting.
"""

import asyncio
import os
import random
import signal
import time
from collections.abc import Sequence

from benchmarks.cluster import OPEN_BLOCK, World, block, crowd, job, world
from benchmarks.common import Recorder, note, quantile, resident_bytes
from benchmarks.sizes import MIB, Sizes
from dpmoe_operator.kube.resources import DPMOE_JOBS, PRIVATE_BLOCKS
from dpmoe_operator.local.processes import Child
from dpmoe_operator.local.stack import Stack

POD = "first"
IDLE_SECONDS = 6.0
"""Longer than the operator waits from round to round."""


async def measure_process(stack: Stack, sizes: Sizes, seed: int, out: Recorder) -> None:
    """Start the operator, bring it jobs, and stop it; its objects stay."""
    rng = random.Random(seed)
    async with world(stack, sizes.quiet_seconds) as cluster:
        names = [f"part-{number:04d}" for number in range(sizes.blocks)]
        await cluster.create(PRIVATE_BLOCKS, [block(name) for name in names])
        await cluster.create(PRIVATE_BLOCKS, [block(OPEN_BLOCK, epsilon="1000")])
        _start_operator(stack, POD)
        assert stack.operator is not None
        await _singles(cluster, sizes.singles, out)
        await _burst(cluster, sizes.burst, out)
        await _crowd(cluster, crowd(rng, "crowd", sizes.waiting, names, sizes.plans), out)
        await _fill_up(cluster, crowd(rng, "more", sizes.waiting, names, sizes.plans), sizes)
        memory = resident_bytes(_pid(stack.operator)) / MIB
        out.add(f"memory of the operator, {cluster.waiting()} jobs wait", memory, "MiB")
        await _idle(cluster, out)
        await _arrivals(cluster, rng, sizes.arrivals, out)
        await _restarts(cluster, sizes, out)
        stack.operator.stop()


async def _singles(cluster: World, count: int, out: Recorder) -> None:
    names = [f"single-{number:03d}" for number in range(count + 1)]
    for name in names:
        await cluster.create(DPMOE_JOBS, [job(name, [OPEN_BLOCK])])
        await cluster.until_launched([name])
        await cluster.quiet()
    # The first one waited for the operator's start.
    _latencies(cluster, names[1:], "1 job waits", out)


async def _burst(cluster: World, count: int, out: Recorder) -> None:
    names = [f"burst-{number:04d}" for number in range(count)]
    await cluster.create(DPMOE_JOBS, [job(name, [OPEN_BLOCK]) for name in names])
    await cluster.until_launched(names)
    _latencies(cluster, names, f"{count} jobs wait", out)
    await cluster.quiet()


async def _crowd(cluster: World, jobs: Sequence[dict], out: Recorder) -> None:
    """Many more jobs than the blocks have budget for."""
    writes, started = cluster.status_writes, time.monotonic()
    await cluster.create(DPMOE_JOBS, jobs)
    applied = time.monotonic()
    note(f"  {len(jobs)} jobs applied in {applied - started:.1f} s")
    await cluster.quiet()
    names = [each["metadata"]["name"] for each in jobs]
    granted = [name for name in names if name in cluster.granted]
    note(f"  {len(granted)} granted, {cluster.status_writes - writes} statuses written")
    title = f"{len(jobs)} jobs wait"
    _latencies(cluster, granted, title, out)
    last_grant = max(cluster.granted[name] for name in granted) - applied
    out.add(f"{title}: last job applied → last grant", last_grant, "s")
    shown = cluster.last_told - applied
    out.add(f"{title}: last job applied → every status written", shown, "s")


async def _fill_up(cluster: World, jobs: Sequence[dict], sizes: Sizes) -> None:
    """Add jobs until so many wait as should, now that the blocks are nearly full."""
    missing = sizes.waiting - cluster.waiting()
    while missing > 0:
        await cluster.create(DPMOE_JOBS, jobs[:missing])
        await cluster.quiet()
        jobs, missing = jobs[missing:], sizes.waiting - cluster.waiting()


async def _idle(cluster: World, out: Recorder) -> None:
    """Rounds go on; as nothing changes, nothing may be written."""
    before = cluster.status_writes
    await asyncio.sleep(IDLE_SECONDS)
    written = cluster.status_writes - before
    title = f"statuses written while nothing changes, {cluster.waiting()} jobs wait"
    out.add(title, written, "writes", target=0)


async def _arrivals(cluster: World, rng: random.Random, count: int, out: Recorder) -> None:
    """Single jobs that come at random, about one each second, and fit."""
    names = [f"arrival-{number:03d}" for number in range(count)]
    waiting, before = cluster.waiting(), cluster.status_writes
    for name in names:
        await cluster.create(DPMOE_JOBS, [job(name, [OPEN_BLOCK])])
        await asyncio.sleep(rng.expovariate(1.0))
    await cluster.until_launched(names)
    title = f"a job arrives, {waiting} wait"
    _latencies(cluster, names, title, out, target=1.0)
    await cluster.quiet()
    written = (cluster.status_writes - before) / count
    out.add(f"{title}: statuses written, all in all", written, "writes")


async def _restarts(cluster: World, sizes: Sizes, out: Recorder) -> None:
    """The operator is killed; a new one grants what came meanwhile.

    In the same pod it knows that the container before it has ended. In another it must wait until
    the lease of the killed one is over.
    """
    waiting = cluster.waiting()
    for place, pods in (
        ("the same pod", [POD] * sizes.restarts),
        ("another pod", [f"another-{number}" for number in range(sizes.takeovers)]),
    ):
        times = [await _restart(cluster, pod) for pod in pods]
        title = f"SIGKILL → granted by the next operator in {place}, {waiting} wait"
        if times:
            out.add(f"{title}, longest of {len(times)}", max(times), "s", target=15.0)


async def _restart(cluster: World, pod: str) -> float:
    """Seconds from the operator's death to the next one's first grant."""
    assert cluster.stack.operator is not None
    name = f"restart-{len(cluster.applied)}"
    os.kill(_pid(cluster.stack.operator), signal.SIGKILL)
    killed = time.monotonic()
    cluster.stack.operator.stop()
    _start_operator(cluster.stack, pod)
    await cluster.create(DPMOE_JOBS, [job(name, [OPEN_BLOCK])])
    await cluster.until_launched([name])
    await cluster.quiet()
    return cluster.granted[name] - killed


def _start_operator(stack: Stack, pod: str) -> None:
    """Start an operator that believes to run in this pod."""
    os.environ["DPMOE_POD_UID"] = pod
    stack.start_operator()


def _latencies(
    cluster: World, names: Sequence[str], title: str, out: Recorder, target: float | None = None
) -> None:
    """Rows of p50 and p95 from the job's creation on; the target is for the grant's p95."""
    for what, seen, goal in (
        ("grant committed", cluster.granted, target),
        ("Kubernetes Job", cluster.launched, None),
    ):
        times = [seen[name] - cluster.applied[name] for name in names]
        out.add(f"{title}: created → {what}, p50", quantile(times, 50), "s")
        out.add(f"{title}: created → {what}, p95", quantile(times, 95), "s", target=goal)


def _pid(operator: Child) -> int:
    assert operator.pid is not None, operator.last_lines()
    return operator.pid
