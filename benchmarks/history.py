"""A long history of the ledger, written by the ledger's own code on a clock that runs ahead.

Grants are granted, launched and settled as rounds do it, checkpoints are written and entries
archived where the ledger says that it is due. All happens within the time in which no settled job
may be forgotten: a slower history would keep less.
"""

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dpmoe_operator.api.ledgerentry import (
    AccountOpened,
    Charge,
    Granted,
    Launched,
    ObjectReference,
    Record,
    Settled,
)
from dpmoe_operator.ledger.anchor import Anchor
from dpmoe_operator.ledger.checkpoint import FORGET_AFTER, checkpoint_records
from dpmoe_operator.ledger.entry import in_entries
from dpmoe_operator.ledger.fold import part_of
from dpmoe_operator.ledger.log import EntryExists, Ledger, format_time
from dpmoe_operator.privacy.capacity import capacity
from dpmoe_operator.privacy.mechanisms import demand
from dpmoe_operator.privacy.orders import DEFAULT_ORDERS

NAMESPACE = "dpmoe-system"
START = datetime(2030, 1, 1, tzinfo=UTC)
GRANTS_PER_ROUND = 20
ROUNDS_OPEN = 50
"""After how many rounds a grant is settled: so many rounds' grants are open at any time."""

PLANS = 50
EPSILON, DELTA = "10", "1e-7"

Object = dict[str, Any]


@dataclass(frozen=True)
class History:
    """What a history left.

    Attributes:
        grants: how many there were.
        archive: folder with every entry there ever was.
        fresh: entries that are still in the cluster, the last of them a checkpoint.
        due: the same just before the longest way that a fold ever had to go.
        most_bytes: the most that the cluster ever held at a time.
        largest_entry: bytes of the largest entry.
    """

    grants: int
    archive: Path
    fresh: list[Object]
    due: list[Object]
    most_bytes: int
    largest_entry: int


async def write_history(folder: Path, *, grants: int, blocks: int, seed: int) -> History:
    """Write a ledger with so many grants over so many blocks.

    Args:
        folder: for the archive.
        grants: how many jobs were granted, a multiple of `GRANTS_PER_ROUND`.
        blocks: how many accounts they charge, one to three each.
        seed: of what is drawn at random.
    """
    anchor, store = Anchor(folder), _Store()
    anchor.begin()
    ledger = Ledger(store, namespace=NAMESPACE, writer="benchmark", anchor=anchor)
    await ledger.load()
    rounds = grants // GRANTS_PER_ROUND
    step = (FORGET_AFTER - timedelta(days=1)) / rounds
    now = START
    for records in _rounds(random.Random(seed), rounds, blocks):
        now += step
        for batch in in_entries(records):
            await ledger.append(batch, time=format_time(now))
        await ledger.secure()
        await ledger.tidy(now, frozenset())
    due = store.longest
    for record in checkpoint_records(ledger.state.contents().shortened(now, frozenset())):
        await ledger.append([record], time=format_time(now))
    await ledger.secure()
    await ledger.tidy(now, frozenset())
    fresh = list(store.log.values())
    return History(grants, folder, fresh, due, store.most_bytes, store.largest_entry)


def openings(blocks: int) -> list[Record]:
    """The records that open the accounts of so many blocks."""
    return [Record(account_opened=_opening(number, account_of(number))) for number in range(blocks)]


def random_grants(rng: random.Random, blocks: int) -> Iterator[Granted]:
    """Grants without end, each on one to three of the accounts."""
    plans = [_plan(rng) for _ in range(PLANS)]
    while True:
        chosen = rng.sample(range(blocks), rng.randint(1, min(3, blocks)))
        yield _grant(rng, [account_of(number) for number in chosen], rng.choice(plans))


def account_of(number: int) -> str:
    """Name of a block's account."""
    return f"claim://clinic/notes/part-{number:06d}.jsonl"


def _rounds(rng: random.Random, rounds: int, blocks: int) -> Iterator[list[Record]]:
    """The records of each round: grants, and what becomes of those of earlier rounds."""
    yield openings(blocks)
    grants = random_grants(rng, blocks)
    history: list[list[Granted]] = []
    for number in range(rounds):
        history.append([next(grants) for _ in range(GRANTS_PER_ROUND)])
        records = [Record(granted=granted) for granted in history[-1]]
        if number >= 1:
            records += [Record(launched=_launch(granted)) for granted in history[number - 1]]
        if number >= ROUNDS_OPEN:
            ended = history[number - ROUNDS_OPEN]
            records += [Record(settled=_settlement(rng, granted)) for granted in ended]
            history[number - ROUNDS_OPEN] = []
        yield records


def _opening(number: int, account: str) -> AccountOpened:
    return AccountOpened(
        account=account,
        block=_reference("clinic", f"part-{number:06d}", number),
        unit="example",
        epsilon=EPSILON,
        delta=DELTA,
        conversion="tight",
        orders=list(DEFAULT_ORDERS),
        capacity=list(capacity(EPSILON, DELTA, DEFAULT_ORDERS, "tight")),
        disjoint_from=[],
    )


def _plan(rng: random.Random) -> Object:
    """A plan so cheap that a block has budget for all jobs of a long history."""
    sigma, rate, steps = rng.uniform(4, 8), rng.choice((0.002, 0.005, 0.01)), 100
    return {
        "noise_multiplier": repr(sigma),
        "sampling_rate": repr(rate),
        "steps": steps,
        "amounts": list(demand(sigma, rate, steps, DEFAULT_ORDERS)),
    }


def _grant(rng: random.Random, accounts: list[str], plan: Object) -> Granted:
    uid = rng.getrandbits(128)
    return Granted(
        job=_reference("team-a", f"job-{uid % 10**8:08d}", uid),
        plan_digest=f"{rng.getrandbits(256):064x}",
        epsilon="0.1",
        delta="1e-6",
        clipping_norm="1.0",
        image=f"ghcr.io/dpmoe/trainer@sha256:{rng.getrandbits(256):064x}",
        reports_prove=True,
        noise_multiplier=plan["noise_multiplier"],
        sampling_rate=plan["sampling_rate"],
        steps=plan["steps"],
        charges=[Charge(account=name, amounts=plan["amounts"]) for name in accounts],
    )


def _launch(granted: Granted) -> Launched:
    job = granted.job
    workload = ObjectReference(namespace="clinic", name=f"{job.name}-run", uid=job.uid[::-1])
    return Launched(job=job, workload=workload)


def _settlement(rng: random.Random, granted: Granted) -> Settled:
    """Most jobs run to their end; some stop early and get a part of the reservation back."""
    steps = granted.steps if rng.random() < 0.9 else rng.randrange(granted.steps)
    return Settled(
        job=granted.job,
        outcome="Completed" if steps == granted.steps else "Failed",
        steps=steps,
        message=f"{steps} of {granted.steps} steps were run",
        charges=[
            Charge(
                account=charge.account,
                amounts=[-(-amount * steps // granted.steps) for amount in charge.amounts],
            )
            for charge in granted.charges
        ],
    )


def _reference(namespace: str, name: str, uid: int) -> ObjectReference:
    text = f"{uid:032x}"
    parts = (text[:8], text[8:12], text[12:16], text[16:20], text[20:32])
    return ObjectReference(namespace=namespace, name=name, uid="-".join(parts))


class _Store:
    """An `EntryStore` in memory that keeps the figures.

    Attributes:
        log: the entries that are there, by name.
        longest: the entries that were there when most bytes lay behind the start of a fold.
    """

    def __init__(self) -> None:
        self.log: dict[str, Object] = {}
        self.longest: list[Object] = []
        self.most_bytes = self.largest_entry = 0
        self._sizes: dict[str, int] = {}
        self._bytes = self._way = self._longest_way = self._checkpoint = 0

    async def entries(self) -> list[Object]:
        return list(self.log.values())

    async def entry(self, name: str) -> Object | None:
        return self.log.get(name)

    async def create(self, manifest: Mapping[str, Any]) -> None:
        name = manifest["metadata"]["name"]
        if name in self.log:
            raise EntryExists(name)
        size = len(json.dumps(manifest, separators=(",", ":")).encode())
        self.log[name] = dict(manifest)
        self._sizes[name] = size
        self._bytes += size
        self.most_bytes = max(self.most_bytes, self._bytes)
        self.largest_entry = max(self.largest_entry, size)
        self._walk(manifest, size)

    async def remove(self, name: str) -> None:
        self._bytes -= self._sizes.pop(name)
        del self.log[name]

    def _walk(self, manifest: Mapping[str, Any], size: int) -> None:
        """Count the bytes that a fold reads: from the last complete checkpoint on."""
        part = part_of(manifest)
        if part is None:
            self._way += size
        else:
            self._checkpoint = size if part == 1 else self._checkpoint + size
            if part == manifest["spec"]["records"][0]["checkpoint"]["of"]:
                self._way = self._checkpoint
        if self._way >= self._longest_way:
            self._longest_way, self.longest = self._way, list(self.log.values())
