"""Builders that the tests of api, ledger, control and launch share.

Manifests are plain dictionaries, as an API server stores them. Overrides are merged into a valid
manifest; a field that is overridden with `ABSENT` is left out.
"""

import itertools
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from dpmoe_operator.api.base import API_VERSION
from dpmoe_operator.api.ledgerentry import (
    AccountOpened,
    AccountRetired,
    Charge,
    Granted,
    Launched,
    ObjectReference,
    Record,
    Settled,
)
from dpmoe_operator.control.accounts import to_open
from dpmoe_operator.control.settings import Settings
from dpmoe_operator.control.times import format_time
from dpmoe_operator.control.views import BlockView, JobView, Snapshot, WorkloadView
from dpmoe_operator.ledger.entry import seal, to_manifest
from dpmoe_operator.ledger.fold import LedgerState
from dpmoe_operator.ledger.log import EntryExists, NoAnswer

Object = dict[str, Any]
T = TypeVar("T")

ABSENT = object()
"""Override of a field that is to be left out."""

OWNER, TEAM, OTHER_TEAM = "vault", "team-a", "team-b"
NOW = datetime(2030, 1, 1, 12, 0, 0, tzinfo=UTC)
IMAGE = "registry.example/dpmoe-trainer:1"
SETTINGS = Settings(namespace="dpmoe-system", trainer_image=IMAGE)
UNITS = 10_000

_uids = itertools.count(1)


def merged(base: Any, overrides: Mapping[str, Any]) -> Any:
    """A deep copy of `base` with `overrides` in it, mappings merged, everything else replaced."""
    result = deepcopy(base)
    for key, value in overrides.items():
        if value is ABSENT:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            below = result.get(key)
            result[key] = merged(below if isinstance(below, Mapping) else {}, value)
        else:
            result[key] = deepcopy(value)
    return result


BLOCK_SPEC: Object = {
    "dataset": {
        "claim": {"claimName": "data", "path": "reviews.jsonl"},
        "format": "jsonl",
        "textColumn": "text",
        "labelColumn": "label",
        "units": UNITS,
    },
    "budget": {"epsilon": "10", "delta": "1e-6"},
    "access": [
        {"namespace": TEAM, "models": ["models"], "outputs": [{"claimName": "results"}]},
        {"namespace": OTHER_TEAM, "models": ["models"], "outputs": [{"claimName": "results"}]},
    ],
}

JOB_SPEC: Object = {
    "blocks": {"namespace": OWNER, "names": ["reviews"]},
    "privacy": {"epsilon": "1", "delta": "1e-6"},
    "model": {"claim": {"claimName": "models", "path": "tiny"}},
    "training": {"logicalBatch": 100, "steps": 100, "optimizer": {"learningRate": "0.001"}},
    "output": {"claim": {"claimName": "results", "path": "run"}},
}


def block_spec(**overrides: Any) -> Object:
    """The spec of a PrivateBlock over one file of a claim, open to two teams."""
    result: Object = merged(BLOCK_SPEC, overrides)
    return result


def job_spec(**overrides: Any) -> Object:
    """The spec of a DPMoEJob that asks ε 1 of the block `reviews`."""
    result: Object = merged(JOB_SPEC, overrides)
    return result


def metadata(name: str, namespace: str, uid: str, **overrides: Any) -> Object:
    """Metadata as the API server fills it in."""
    result: Object = merged(
        {
            "name": name,
            "namespace": namespace,
            "uid": uid,
            "generation": 1,
            "resourceVersion": "1",
            "creationTimestamp": format_time(NOW - timedelta(hours=1)),
        },
        overrides,
    )
    return result


def block(
    name: str = "reviews",
    namespace: str = OWNER,
    *,
    uid: str | None = None,
    meta: Mapping[str, Any] | None = None,
    status: Mapping[str, Any] | None = None,
    **spec: Any,
) -> Object:
    """A stored PrivateBlock. Its data is a file of its own, named after it, unless overridden."""
    path = {"dataset": {"claim": {"path": f"{name}.jsonl"}}}
    base = merged(BLOCK_SPEC, {} if "dataset" in spec and "claim" in spec["dataset"] else path)
    return {
        "apiVersion": API_VERSION,
        "kind": "PrivateBlock",
        "metadata": metadata(name, namespace, uid or f"block-{next(_uids)}", **(meta or {})),
        "spec": merged(base, spec),
        **({"status": dict(status)} if status else {}),
    }


def job(
    name: str = "train",
    namespace: str = TEAM,
    *,
    uid: str | None = None,
    meta: Mapping[str, Any] | None = None,
    status: Mapping[str, Any] | None = None,
    **spec: Any,
) -> Object:
    """A stored DPMoEJob."""
    return {
        "apiVersion": API_VERSION,
        "kind": "DPMoEJob",
        "metadata": metadata(name, namespace, uid or f"job-{next(_uids)}", **(meta or {})),
        "spec": job_spec(**spec),
        **({"status": dict(status)} if status else {}),
    }


def snapshot(
    blocks: Iterable[Object] = (),
    jobs: Iterable[Object] = (),
    *,
    ledger: LedgerState | None = None,
    now: datetime = NOW,
    workloads: Mapping[str, WorkloadView] | None = None,
    **rest: Any,
) -> Snapshot:
    """A snapshot of these objects; an empty ledger unless one is given."""
    block_views = [BlockView.of(manifest) for manifest in blocks]
    job_views = [JobView.of(manifest) for manifest in jobs]
    return Snapshot(
        blocks={view.meta.key: view for view in block_views},
        jobs={view.meta.uid: view for view in job_views},
        workloads=workloads or {},
        ledger=ledger if ledger is not None else LedgerState(),
        now=now,
        **rest,
    )


def commit(ledger: LedgerState, *records: Any, time: datetime = NOW) -> Object:
    """Append records (bare or wrapped) to a ledger as one entry; the entry's manifest."""
    spec = seal(
        sequence=ledger.sequence,
        previous=ledger.head,
        time=time.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        writer="test",
        records=[wrapped(record) for record in records],
    )
    manifest = to_manifest(spec, "dpmoe-system")
    ledger.apply(manifest)
    return manifest


def with_accounts(*blocks: Object, time: datetime = NOW) -> LedgerState:
    """A ledger in which the accounts of these blocks are open."""
    ledger = LedgerState()
    if openings := to_open(snapshot(blocks)):
        commit(ledger, *openings, time=time)
    return ledger


def wrapped(record: Any) -> Record:
    """The record that holds one change."""
    if isinstance(record, Record):
        return record
    if isinstance(record, AccountOpened):
        return Record(account_opened=record)
    if isinstance(record, AccountRetired):
        return Record(account_retired=record)
    if isinstance(record, Granted):
        return Record(granted=record)
    if isinstance(record, Launched):
        return Record(launched=record)
    return Record(settled=record)


def reference(uid: str, name: str = "train", namespace: str = TEAM) -> ObjectReference:
    """A reference to an object."""
    return ObjectReference(namespace=namespace, name=name, uid=uid)


def opened(name: str = "a", capacity: Sequence[int] = (10, 10)) -> AccountOpened:
    """The opening of an account with a capacity in bare units."""
    return AccountOpened(
        account=name,
        block=reference(f"block-of-{name}", name="reviews", namespace=OWNER),
        unit="example",
        epsilon="10",
        delta="1e-6",
        conversion="tight",
        orders=[str(order) for order in range(2, 2 + len(capacity))],
        capacity=list(capacity),
        disjoint_from=[],
    )


def granted(
    uid: str = "job-1", charges: Mapping[str, Sequence[int]] | None = None, **fields: Any
) -> Granted:
    """A grant of bare units by account."""
    values: Object = {
        "job": reference(uid),
        "plan_digest": "0" * 64,
        "epsilon": "1",
        "delta": "1e-6",
        "noise_multiplier": "1.0",
        "sampling_rate": "0.01",
        "clipping_norm": "1.0",
        "steps": 100,
        "image": IMAGE,
        "reports_prove": True,
        "charges": charges_of(charges or {"a": (1, 1)}),
    }
    return Granted(**(values | fields))


def launched(uid: str = "job-1", workload_uid: str = "workload-1") -> Launched:
    """A launch."""
    return Launched(job=reference(uid), workload=reference(workload_uid, namespace=OWNER))


def settled(
    uid: str = "job-1", charges: Mapping[str, Sequence[int]] | None = None, steps: int = 100
) -> Settled:
    """A settlement for bare units by account."""
    return Settled(
        job=reference(uid),
        outcome="Completed",
        steps=steps,
        message="",
        charges=charges_of(charges or {"a": (1, 1)}),
    )


def charges_of(amounts: Mapping[str, Sequence[int]]) -> list[Charge]:
    """Charges from amounts by account."""
    return [Charge(account=name, amounts=list(units)) for name, units in amounts.items()]


class MemoryStore:
    """An `EntryStore` in memory that fails as an API server behind a bad network does.

    Attributes:
        faults: what happens to the next creates, in order; none left means they just work.
            `lost`: it never arrives. `unheard`: it is stored, the answer is lost. `late`: it
            arrives when `deliver` is called, long after the client gave up.
        deaf: how many of the next reads get no answer.
    """

    def __init__(self) -> None:
        self.log: dict[str, Object] = {}
        self.faults: list[str] = []
        self.deaf = 0
        self.late: list[Object] = []

    async def entries(self) -> list[Object]:
        """All entries, by name."""
        return [deepcopy(self.log[name]) for name in sorted(self.log)]

    async def entry(self, name: str) -> Object | None:
        """One entry, or None."""
        if self.deaf:
            self.deaf -= 1
            raise NoAnswer("no answer to a read")
        return deepcopy(self.log.get(name))

    async def create(self, manifest: Mapping[str, Any]) -> None:
        """Add an entry, unless a fault is due."""
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "lost":
            raise NoAnswer("the request was lost")
        if fault == "late":
            self.late.append(deepcopy(dict(manifest)))
            raise NoAnswer("the request is on its way")
        self._store(manifest)
        if fault == "unheard":
            raise NoAnswer("the answer was lost")

    async def remove(self, name: str) -> None:
        """Remove an entry."""
        self.log.pop(name, None)

    def deliver(self) -> None:
        """Let the oldest late create arrive; nobody hears the answer."""
        if self.late:
            try:
                self._store(self.late.pop(0))
            except EntryExists:
                return

    def _store(self, manifest: Mapping[str, Any]) -> None:
        name = manifest["metadata"]["name"]
        if name in self.log:
            raise EntryExists(name)
        self.log[name] = deepcopy(dict(manifest))


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits for anything."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("the coroutine waited")
