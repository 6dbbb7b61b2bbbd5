"""Parts of the operator, timed in this process on the objects of a real server.

A ledger of their own, in another namespace, starts empty: the round decides about the crowd as if
nothing had been decided yet.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import aiohttp

from benchmarks.cluster import OPEN_BLOCK, TEAM
from benchmarks.common import Recorder, note, quantile, seconds
from benchmarks.history import openings, random_grants
from benchmarks.sizes import Sizes
from dpmoe_operator.api import dpmoejob
from dpmoe_operator.api.ledgerentry import Record
from dpmoe_operator.control.actions import SetStatus
from dpmoe_operator.control.decide import decide, react
from dpmoe_operator.control.planning import Planner
from dpmoe_operator.control.settings import Settings
from dpmoe_operator.control.views import Snapshot
from dpmoe_operator.kube.apply import PARALLEL_WRITES, Applier
from dpmoe_operator.kube.client import KubeClient
from dpmoe_operator.kube.config import Access, load_access
from dpmoe_operator.kube.picture import Listed, Picture
from dpmoe_operator.kube.resources import DPMOE_JOBS, NAMESPACES, PRIVATE_BLOCKS, Resource
from dpmoe_operator.kube.store import KubeEntryStore
from dpmoe_operator.ledger.anchor import Anchor
from dpmoe_operator.ledger.entry import in_entries
from dpmoe_operator.ledger.log import Ledger, format_time
from dpmoe_operator.local.stack import NAMESPACE, TRAINER_IMAGE, Stack
from dpmoe_operator.scheduling.policies import policy

TURNS = 3

Write = Callable[[Sequence[SetStatus]], Awaitable[object]]


async def measure_parts(stack: Stack, sizes: Sizes, seed: int, out: Recorder) -> None:
    """Time a round, the writing of statuses, and appends."""
    access = load_access(stack.kubeconfig)
    async with KubeClient(access) as client:
        await _round(client, stack.directory, sizes, out)
        await _projection(client, access, sizes.patches, out)
        await _appends(client, stack.directory, sizes.appends, seed, out)


async def _round(client: KubeClient, folder: Path, sizes: Sizes, out: Recorder) -> None:
    """Decide about the crowd, commit, and compute what people read."""
    settings = Settings(namespace=NAMESPACE, trainer_image=TRAINER_IMAGE, anchored=True)
    picture, planner = Picture(), Planner(settings)
    picture.replace_all(
        await _without_status(client, PRIVATE_BLOCKS, lambda name: name != OPEN_BLOCK),
        await _without_status(client, DPMOE_JOBS, lambda name: name.startswith("crowd-")),
    )
    ledger = await _own_ledger(client, folder, "round")
    title = f"round of {sizes.waiting} jobs over {sizes.blocks} blocks"
    policy(settings.policy).warm_up()  # As the operator does when it starts.

    def snapshot() -> Snapshot:
        return picture.snapshot(ledger.state, datetime.now(UTC))

    with seconds() as planning:
        first = decide(snapshot(), settings, planner)
    await _commit(ledger, first.records)
    out.add(f"{title}: plan all, {sizes.plans} recipes", planning(), "s")
    with seconds() as deciding:
        second = decide(snapshot(), settings, planner)
    with seconds() as committing:
        await _commit(ledger, second.records)
    note(f"  {len(second.records)} grants")
    out.add(f"{title}: decide", deciding(), "s")
    out.add(f"{title}: commit, with anchor", committing(), "s")
    out.add(f"{title}: decide + commit", deciding() + committing(), "s", target=1.0)
    with seconds() as projecting:
        react(snapshot(), second, settings)
    out.add(f"{title}: compute all statuses", projecting(), "s")
    with seconds() as again:
        decide(snapshot(), settings, planner)
    out.add(f"{title}: decide again, nothing to grant", again(), "s")


async def _projection(client: KubeClient, access: Access, count: int, out: Recorder) -> None:
    """The operator's writer of statuses, in turns with a bare client."""
    picture = Picture()
    picture.replace_all(await client.list(PRIVATE_BLOCKS), await client.list(DPMOE_JOBS))
    picture.changed.clear()
    applier = Applier(client, picture, identity="benchmark", leads=lambda: True)
    writers: dict[str, Write] = {"ours": applier.apply, "bare": partial(_bare, access)}
    rates: dict[str, list[float]] = {name: [] for name in writers}
    for _ in range(TURNS):
        for name, write in writers.items():
            actions = await _new_messages(client, count)
            with seconds() as writing:
                complete = await write(actions)
            assert complete is not False, "what is new may not keep these writes from being made"
            await _check_written(client, actions)
            rates[name].append(len(actions) / writing())
    ours, bare = (statistics.median(rates[name]) for name in writers)
    out.add(
        f"statuses written, {PARALLEL_WRITES} at a time",
        ours,
        "1/s",
        better="higher",
        target=0.8 * bare,
        peer=bare,
        peer_name="bare aiohttp; target is 80 % of it",
    )


async def _check_written(client: KubeClient, actions: Sequence[SetStatus]) -> None:
    """A write that the server refused would have cost little."""
    jobs, _ = await client.list(DPMOE_JOBS, TEAM)
    messages = {each["metadata"]["uid"]: each.get("status", {}).get("message") for each in jobs}
    assert all(messages[each.uid] == each.patch["message"] for each in actions)


async def _bare(access: Access, actions: Sequence[SetStatus]) -> None:
    """The same patches with nothing but aiohttp."""
    limit = asyncio.Semaphore(PARALLEL_WRITES)
    headers = {"Content-Type": "application/merge-patch+json", "Accept": "application/json"}
    if (authorization := access.authorization()) is not None:
        headers["Authorization"] = authorization
    params = {"fieldManager": "bare", "fieldValidation": "Strict"}

    async def one(session: aiohttp.ClientSession, action: SetStatus) -> None:
        url = access.server + DPMOE_JOBS.path(action.namespace, action.name, "status")
        version = {"uid": action.uid, "resourceVersion": action.resource_version}
        body = json.dumps({"metadata": version, "status": action.patch})
        async with (
            limit,
            session.patch(url, data=body, params=params, ssl=access.ssl or True) as answer,
        ):
            await answer.read()
            assert answer.status == 200, await answer.text()

    async with aiohttp.ClientSession(headers=headers) as session:
        await asyncio.gather(*(one(session, action) for action in actions))


async def _new_messages(client: KubeClient, count: int) -> list[SetStatus]:
    """Writes that change the message of some jobs' statuses and of their condition."""
    jobs, _ = await client.list(DPMOE_JOBS, TEAM)
    told = [manifest for manifest in jobs if "status" in manifest][:count]
    return [_new_message(manifest, f"measured at {time.monotonic()}") for manifest in told]


def _new_message(manifest: dict, text: str) -> SetStatus:
    meta, status = manifest["metadata"], manifest["status"]
    message = f"{status['message'].partition(' measured at ')[0]} {text}"
    return SetStatus(
        plural=dpmoejob.PLURAL,
        kind=dpmoejob.KIND,
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        resource_version=meta["resourceVersion"],
        patch={
            "message": message,
            "conditions": [{**each, "message": message} for each in status["conditions"]],
        },
        event=None,
    )


async def _appends(client: KubeClient, folder: Path, count: int, seed: int, out: Recorder) -> None:
    """Entries of one grant each; each is in the anchor before the next one is begun."""
    ledger = await _own_ledger(client, folder, "appends")
    await _commit(ledger, openings(count))
    grants, times = random_grants(random.Random(seed), count), []
    for _ in range(count):
        record = Record(granted=next(grants))
        with seconds() as appending:
            await _commit(ledger, [record])
        times.append(appending())
    out.add("entries of one grant, with anchor", count / sum(times), "1/s", better="higher")
    out.add("entry of one grant, with anchor, p95", quantile(times, 95), "s")


async def _without_status(
    client: KubeClient, resource: Resource, chosen: Callable[[str], bool]
) -> Listed:
    """Objects as if nobody had told them anything yet."""
    objects, version = await client.list(resource)
    kept = [each for each in objects if chosen(each["metadata"]["name"])]
    return [{**each, "status": {}} for each in kept], version


async def _own_ledger(client: KubeClient, folder: Path, name: str) -> Ledger:
    """An empty ledger in a namespace of its own, with its anchor."""
    namespace, anchor = f"benchmark-{name}", folder / f"anchor-{name}"
    await client.create(NAMESPACES, None, {"metadata": {"name": namespace}})
    anchor.mkdir()
    ledger = Ledger(
        KubeEntryStore(client, namespace),
        namespace=namespace,
        writer="benchmark",
        anchor=Anchor(anchor),
    )
    await ledger.load()
    return ledger


async def _commit(ledger: Ledger, records: Sequence[Record]) -> None:
    for batch in in_entries(records):
        await ledger.append(batch, time=format_time(datetime.now(UTC)))
    await ledger.secure()
