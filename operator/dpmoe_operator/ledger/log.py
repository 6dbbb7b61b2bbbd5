"""Appending by compare-and-swap.

Creating an entry whose name exists fails: the name is the next sequence number, so two writers can
never both follow the same head. A writer that lost learns what the other wrote and decides anew;
a writer that got no answer looks whether its entry is there before it tries the same entry again.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dpmoe_operator.api.ledgerentry import Record
from dpmoe_operator.ledger.entry import LedgerError, entry_name, open_entry, seal, to_manifest
from dpmoe_operator.ledger.fold import LedgerState, fold

ATTEMPTS = 5
"""How often an append without an answer is looked up and tried again."""


class EntryExists(Exception):
    """An entry with that name is in the log already."""


class NoAnswer(Exception):
    """The store did not answer: the entry may be in the log or not."""


class StaleView(Exception):
    """Another writer appended first. The state has caught up; decide again on it."""


class EntryStore(Protocol):
    """Where the entries live."""

    async def entries(self) -> list[dict[str, Any]]:
        """All entries, by name."""

    async def entry(self, name: str) -> dict[str, Any] | None:
        """One entry, or None. Raises `NoAnswer`."""

    async def create(self, manifest: Mapping[str, Any]) -> None:
        """Add an entry. Raises `EntryExists` or `NoAnswer`."""


class Ledger:
    """The log and its fold, kept in step by one writer.

    Attributes:
        state: fold of the log as far as this writer knows it.
    """

    def __init__(self, store: EntryStore, *, namespace: str, writer: str) -> None:
        self.state = LedgerState()
        self._store, self._namespace, self._writer = store, namespace, writer

    async def load(self) -> None:
        """Read and verify the whole log.

        Raises:
            LedgerError: the log does not hold, or lost what this writer saw in it; nothing may be
                granted on it.
        """
        manifests = await self._store.entries()
        state, known = fold(manifests), self.state
        last = manifests[known.sequence - 1 : known.sequence]
        if known.sequence > 0 and [entry["spec"]["digest"] for entry in last] != [known.head]:
            raise LedgerError(
                entry_name(known.sequence - 1),
                "was in the log and is not any more, as after a restored backup",
            )
        self.state = state

    async def append(self, records: Sequence[Record], *, time: str) -> str:
        """Commit records together, in one entry.

        Args:
            records: what commits; must be legal on the current state.
            time: RFC 3339 UTC.

        Returns:
            The name of the entry.

        Raises:
            StaleView: another writer was first; `state` now includes what it wrote.
            NoAnswer: the store stayed silent; whether the entry is there is unknown, and a later
                append of anything finds out by the same compare-and-swap.
            LedgerError: the records break a rule; nothing was written.
        """
        self.state.check(records)
        spec = seal(
            sequence=self.state.sequence,
            previous=self.state.head,
            time=time,
            writer=self._writer,
            records=records,
        )
        manifest = to_manifest(spec, self._namespace)
        # What this writer could not read back would end the log for everybody.
        open_entry(manifest, sequence=self.state.sequence, previous=self.state.head)
        if await self._create(manifest):
            self.state.apply(manifest)
            return entry_name(spec["sequence"])
        await self.catch_up()
        raise StaleView(f"{entry_name(spec['sequence'])} was written by another operator")

    async def _create(self, manifest: dict[str, Any]) -> bool:
        """Whether the log now holds `manifest` under its name, as opposed to another's entry."""
        name = manifest["metadata"]["name"]
        for attempt in range(ATTEMPTS):
            try:
                await self._store.create(manifest)
                return True
            except EntryExists:
                there = await self._store.entry(name)
                if there is not None:
                    return bool(there["spec"] == manifest["spec"])
                # It vanished between two calls: entries are never deleted, so nothing is certain.
                raise NoAnswer(f"{name} exists and cannot be read") from None
            except NoAnswer:
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("the loop returns or raises")

    async def catch_up(self) -> None:
        """Take in what other writers appended."""
        while (manifest := await self._store.entry(entry_name(self.state.sequence))) is not None:
            self.state.apply(manifest)
