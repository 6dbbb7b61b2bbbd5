"""A writer that stood still so long that the entry it is about to write was archived and removed.

The number is free again then, and the create succeeds: the anchor must know better.
"""

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.builders import NOW, MemoryStore, granted, opened, wrapped

from dpmoe_operator.ledger import log
from dpmoe_operator.ledger.anchor import Anchor
from dpmoe_operator.ledger.entry import LedgerError, Unverified
from dpmoe_operator.ledger.log import Ledger, format_time
from dpmoe_operator.ledger.verification import verify

TIME = format_time(NOW)


class SlowStore(MemoryStore):
    """The same log, to a writer that is stopped just before its entry leaves."""

    def __init__(self, other: MemoryStore, meanwhile: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self.log = other.log
        self._meanwhile = meanwhile

    async def create(self, manifest: Mapping[str, Any]) -> None:
        await self._meanwhile()
        await super().create(manifest)


def in_order(store: MemoryStore) -> list[dict[str, Any]]:
    return [manifest for _, manifest in sorted(store.log.items())]


async def grant(ledger: Ledger, job: str) -> None:
    await ledger.append([wrapped(granted(job, {"a": (1,)}))], time=TIME)
    await ledger.secure()
    await ledger.tidy(NOW, frozenset())


async def test_entry_in_the_place_of_an_archived_one_takes_no_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "CHECKPOINT_ENTRIES", 2)
    store, anchor = MemoryStore(), Anchor(tmp_path)
    active = Ledger(store, namespace="dpmoe-system", writer="active", anchor=anchor)
    await active.load()
    await active.append([wrapped(opened("a", (100,)))], time=TIME)
    await active.secure()

    async def meanwhile() -> None:
        for number in range(12):
            await grant(active, f"job-{number}")

    slow = SlowStore(store, meanwhile)
    stale = Ledger(slow, namespace="dpmoe-system", writer="stale", anchor=anchor)
    await stale.load()
    await stale.append([wrapped(granted("nobodys", {"a": (1,)}))], time=TIME)
    assert store.log["entry-000000000001"]["spec"]["writer"] == "stale"
    with pytest.raises(Unverified, match="disagree about entry-000000000001"):
        await stale.secure()

    fresh = Ledger(store, namespace="dpmoe-system", writer="fresh", anchor=anchor)
    await fresh.load()
    assert not fresh.state.knows("nobodys")
    with pytest.raises(LedgerError, match="entry-000000000002: missing"):
        verify(in_order(store))
    await grant(fresh, "job-12")
    assert "entry-000000000001" not in store.log
    assert verify(in_order(store)).state == fresh.state
