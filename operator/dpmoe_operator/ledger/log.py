"""Appending by compare-and-swap.

Creating an entry whose name exists fails: the name is the next sequence number, so two writers can
never both follow the same head. A writer that lost learns what the other wrote and decides anew;
a writer that got no answer looks whether its entry is there before it tries the same entry again.

Where there is an anchor, nothing that the log says may take effect before `secure` has copied it.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence, Set
from datetime import UTC, datetime
from typing import Any, Protocol

from dpmoe_operator.api.ledgerentry import Record
from dpmoe_operator.ledger.anchor import BEFORE_ALL, Anchor, AnchorError, Head, follows
from dpmoe_operator.ledger.checkpoint import checkpoint_records
from dpmoe_operator.ledger.entry import LedgerError, entry_name, open_entry, seal, to_manifest
from dpmoe_operator.ledger.fold import LedgerState, checkpoints_in, fold

ATTEMPTS = 5
"""How often an append without an answer is looked up and tried again."""

CHECKPOINT_ENTRIES = 2_000
CHECKPOINT_BYTES = 8_000_000
"""A checkpoint is due behind this many entries or bytes, and not before half as many bytes as the
last checkpoint had: what is kept, and what a start must read, stays in proportion to the state."""


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

    async def remove(self, name: str) -> None:
        """Remove an entry that is in the archive; it may be gone already."""


class Ledger:
    """The log and its fold, kept in step by one writer.

    Attributes:
        state: fold of the log as far as this writer knows it.
        anchor: the copy on a volume; None where the platform team wants none.
    """

    def __init__(
        self, store: EntryStore, *, namespace: str, writer: str, anchor: Anchor | None = None
    ) -> None:
        self.state = LedgerState()
        self.anchor = anchor
        self._store, self._namespace, self._writer = store, namespace, writer
        self._digests: dict[int, str] = {}
        self._secured = BEFORE_ALL
        self._unsecured: list[dict[str, Any]] = []
        self._checkpoints: list[int] = []
        self._sizes: list[int] = []
        self._checkpoint_size = 0

    async def load(self) -> None:
        """Read the log, fold it from its last checkpoint on, and compare it with the anchor.

        Raises:
            Unverified: the log does not hold, lost what this writer or the anchor saw in it, or the
                anchor lost what the log holds; nothing may be granted on it.
            NoAnswer: the store is silent.
        """
        manifests = await self._store.entries()
        checkpoints = checkpoints_in(manifests)
        start = checkpoints[-1] if checkpoints else 0
        state, known = fold(manifests, start=start), self._in_effect()
        digests = {m["spec"]["sequence"]: m["spec"]["digest"] for m in manifests}
        if known != BEFORE_ALL and digests.get(known.sequence) != known.digest:
            raise _rolled_back(known.sequence)
        self.state, self._digests = state, digests
        self._checkpoints = [manifests[position]["spec"]["sequence"] for position in checkpoints]
        sizes = [_size(manifest) for manifest in manifests[start:]]
        parts = manifests[start]["spec"]["records"][0]["checkpoint"]["of"] if checkpoints else 0
        self._checkpoint_size, self._sizes = sum(sizes[:parts]), sizes[parts:]
        self._unsecured = await self._unsecured_of(manifests)
        await self.secure()

    async def append(self, records: Sequence[Record], *, time: str) -> str:
        """Commit records together, in one entry. They take effect once `secure` has returned.

        Args:
            records: what commits; must be legal on the current state.
            time: RFC 3339 UTC.

        Returns:
            The name of the entry.

        Raises:
            StaleView: another writer was first; `state` now includes what it wrote.
            NoAnswer: the store stayed silent; whether the entry is there is unknown, and a later
                append of anything finds out by the same compare-and-swap.
            LedgerError: the records break a rule, or the log lost its last entry; nothing was
                written.
        """
        spec = seal(
            sequence=self.state.sequence,
            previous=self.state.head,
            time=time,
            writer=self._writer,
            records=records,
        )
        manifest = to_manifest(spec, self._namespace)
        # What this writer could not read back would end the log for everybody.
        change = self.state.prepare(manifest)
        await self._check_head()
        if await self._create(manifest):
            self.state.adopt(change)
            self._took(manifest)
            return entry_name(spec["sequence"])
        await self.catch_up()
        raise StaleView(f"{entry_name(spec['sequence'])} was written by another operator")

    async def catch_up(self) -> None:
        """Take in what other writers appended."""
        while (manifest := await self._store.entry(entry_name(self.state.sequence))) is not None:
            self.state.apply(manifest)
            self._took(manifest)

    async def confirm(self) -> None:
        """Look that `state` is the whole log, as a successful append would show.

        Raises:
            StaleView: another writer has appended; `state` now includes what it wrote.
            LedgerError: the log lost its last entry.
            NoAnswer: the store is silent.
        """
        known = self.state.sequence
        await self.catch_up()
        # After that: entries are removed in their order, so the next one was not there before.
        await self._check_head()
        if self.state.sequence != known:
            raise StaleView(f"{entry_name(known)} was written by another operator")

    async def secure(self) -> None:
        """Copy to the anchor what is not there yet. Only then may it take effect.

        Raises:
            AnchorError: the anchor cannot take it in.
        """
        if self.anchor is not None and self._unsecured:
            await asyncio.to_thread(self.anchor.append, list(self._unsecured))
        self._secured = Head(self.state.sequence - 1, self.state.head)
        self._unsecured.clear()

    async def tidy(self, now: datetime, live: Set[str]) -> None:
        """Write a checkpoint where one is due, and remove entries that the archive holds.

        Args:
            now: the time.
            live: uids of the DPMoEJobs that exist.

        Raises:
            StaleView, NoAnswer, Unverified: as `append` and `secure`; the rest is done next time.
        """
        full = sum(self._sizes) >= max(CHECKPOINT_BYTES, self._checkpoint_size // 2)
        if full or len(self._sizes) >= CHECKPOINT_ENTRIES:
            contents = self.state.contents().shortened(now, live)
            for record in checkpoint_records(contents):
                await self.append([record], time=format_time(now))
            await self.secure()
        if self.anchor is not None and len(self._checkpoints) > 1:
            await self._remove_before(self._checkpoints[-2])

    def _in_effect(self) -> Head:
        """The last entry that took effect; one that the anchor refused may be taken out again."""
        if self.anchor is not None:
            return self._secured
        return Head(self.state.sequence - 1, self.state.head)

    async def _check_head(self) -> None:
        """An entry is only put behind one that is there: the log may have been taken back.

        It may also have been taken back to the very entry at which this writer stands, while
        another one had gone on: that only the anchor knows.
        """
        last = self.state.sequence - 1
        if last >= 0:
            there = await self._store.entry(entry_name(last))
            if there is None or there["spec"].get("digest") != self.state.head:
                raise _rolled_back(last)
        copied = await asyncio.to_thread(self.anchor.head) if self.anchor is not None else None
        if (
            copied is not None
            and copied.sequence > last
            and await self._store.entry(entry_name(last + 1)) is None
        ):
            raise _rolled_back(copied.sequence)

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

    def _took(self, manifest: dict[str, Any]) -> None:
        """An entry is in the log and in the state: remember what follows from that."""
        self._digests[manifest["spec"]["sequence"]] = manifest["spec"]["digest"]
        self._unsecured.append(manifest)
        self._sizes.append(_size(manifest))
        newest = self.state.checkpoint
        if newest is not None and newest not in self._checkpoints:
            parts = self.state.sequence - newest
            self._checkpoints.append(newest)
            self._checkpoint_size, self._sizes = sum(self._sizes[-parts:]), []

    async def _unsecured_of(self, manifests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What of a log the anchor does not hold yet."""
        if self.anchor is None:
            return []
        head = await asyncio.to_thread(self.anchor.head)
        if head is None and not manifests:
            await asyncio.to_thread(self.anchor.begin)
            return []
        if head is None:
            raise AnchorError(
                "AnchorLost",
                f"{self.anchor.folder} holds no copy of the log, which has"
                f" {self.state.sequence} entries; put the volume back, or accept the log as it is"
                " with `dpmoe ledger reanchor`",
            )
        tail = _without_gaps(manifests)
        follows(head, tail)
        missing = [m for m in tail if m["spec"]["sequence"] > head.sequence]
        for manifest in missing:
            spec = manifest["spec"]
            open_entry(manifest, sequence=spec["sequence"], previous=spec["previous"])
        return missing

    async def _remove_before(self, boundary: int) -> None:
        """Remove the entries before a checkpoint, each once the archive is seen to hold it.

        An entry that took the number of an archived one goes too: it is in no chain, had no effect
        (its writer could not anchor it), and would look like a fork when the log is put back.
        """
        assert self.anchor is not None
        old = sorted(sequence for sequence in self._digests if sequence < boundary)
        if not old:
            return
        archived = await asyncio.to_thread(_digests_in, self.anchor, old[0], boundary)
        for sequence in old:
            archive_has_it = archived.get(sequence) == self._digests[sequence]
            stray = sequence in archived and sequence + 1 not in self._digests
            if archive_has_it or stray:
                await self._store.remove(entry_name(sequence))
                del self._digests[sequence]


def format_time(now: datetime) -> str:
    """RFC 3339 in UTC, to the microsecond."""
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _size(manifest: Mapping[str, Any]) -> int:
    return len(json.dumps(manifest["spec"]))


def _rolled_back(sequence: int) -> LedgerError:
    return LedgerError(
        entry_name(sequence),
        "was in the log and is not any more, as after a restored backup; run"
        " `dpmoe ledger recover` in the operator's pod",
        reason="RolledBack",
    )


def _without_gaps(manifests: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The longest end of a log in which no number is missing."""
    for position in range(len(manifests) - 1, 0, -1):
        before, after = manifests[position - 1]["spec"], manifests[position]["spec"]
        if before["sequence"] + 1 != after["sequence"]:
            return manifests[position:]
    return manifests


def _digests_in(anchor: Anchor, start: int, end: int) -> dict[int, str]:
    """Digests of the anchor's entries from `start` to before `end`, read and checked."""
    found: dict[int, str] = {}
    for manifest in anchor.entries(start):
        sequence = manifest["spec"]["sequence"]
        if sequence >= end:
            break
        found[sequence] = manifest["spec"]["digest"]
    return found
