"""Sealing: one entry of the log, its name, its digest, its place in the chain.

The digest covers the canonical JSON of the whole spec but the digest itself, so a changed byte in
any field breaks it, and a changed predecessor breaks every entry behind it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpmoe_operator.api import ledgerentry
from dpmoe_operator.api.base import API_VERSION, SpecError, parse
from dpmoe_operator.api.ledgerentry import MAX_RECORDS, LedgerEntrySpec, Record

GENESIS = "0" * 64
"""The digest that stands before the first entry."""

MAX_ENTRY_BYTES = 900_000
"""An entry's records stay below this, so that the object stays below etcd's 1.5 MiB."""


MAX_RECORD_BYTES = 400_000
"""A record stays below this, so that a checkpoint can keep a grant with all that became of it."""


class Unverified(ValueError):
    """Nothing may be granted: the log, or its copy on the anchor's volume, is not what it was.

    Attributes:
        reason: one word for conditions and events.
    """

    reason: str


class LedgerError(Unverified):
    """The log does not hold. Names the entry and what is wrong with it."""

    def __init__(self, entry: str, problem: str, reason: str = "ChainBroken") -> None:
        self.entry, self.problem, self.reason = entry, problem, reason
        super().__init__(f"{entry}: {problem}")


def entry_name(sequence: int) -> str:
    """The object name of an entry: `entry-000000000042`."""
    return f"entry-{sequence:012d}"


def digest_of(spec: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical JSON of an entry's spec without its own digest."""
    content = {key: value for key, value in spec.items() if key != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    # A lone surrogate has no UTF-8; it must break the digest, not the verification.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def seal(
    *, sequence: int, previous: str, time: str, writer: str, records: Sequence[Record]
) -> dict[str, Any]:
    """Build the spec of the next entry.

    Args:
        sequence: dense number of the entry, from 0.
        previous: digest of the entry before it, or `GENESIS`.
        time: RFC 3339 UTC time of the decision.
        writer: identity of the operator process.
        records: what commits together.
    """
    spec: dict[str, Any] = {
        "sequence": sequence,
        "previous": previous,
        "time": time,
        "writer": writer,
        "records": [record.to_object() for record in records],
    }
    spec["digest"] = digest_of(spec)
    return spec


def to_manifest(spec: Mapping[str, Any], namespace: str) -> dict[str, Any]:
    """The LedgerEntry object of a sealed spec."""
    return {
        "apiVersion": API_VERSION,
        "kind": ledgerentry.KIND,
        "metadata": {"name": entry_name(spec["sequence"]), "namespace": namespace},
        "spec": dict(spec),
    }


def open_entry(manifest: Mapping[str, Any], *, sequence: int, previous: str) -> LedgerEntrySpec:
    """Check one entry's place in the chain and parse it.

    Args:
        manifest: the LedgerEntry object.
        sequence: the number that it must carry.
        previous: the digest that it must name as its predecessor's.

    Raises:
        LedgerError: name, sequence, predecessor, digest or schema is wrong.
    """
    expected = entry_name(sequence)
    metadata = manifest.get("metadata")
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    if name != expected:
        raise LedgerError(expected, f"missing: the next entry in the log is {name}")
    spec = manifest.get("spec")
    if not isinstance(spec, Mapping):
        raise LedgerError(name, "has no spec")
    if spec.get("digest") != digest_of(spec):
        raise LedgerError(name, "digest does not match the content: the entry was changed")
    try:
        entry = parse(LedgerEntrySpec, spec)
    except SpecError as error:
        raise LedgerError(name, str(error)) from error
    if entry.sequence != sequence:
        raise LedgerError(name, f"carries sequence {entry.sequence} under another name")
    if entry.previous != previous:
        raise LedgerError(name, "does not follow its predecessor: the chain is broken here")
    return entry


def size_of(record: Record) -> int:
    """Bytes that a record takes in an entry."""
    return len(record.model_dump_json(by_alias=True, exclude_none=True).encode())


def in_entries(records: Sequence[Record]) -> Iterator[list[Record]]:
    """Split records over as few entries as the size limit allows, keeping their order.

    A record is never cut: a grant stays atomic over all its accounts.
    """
    batch: list[Record] = []
    size = 0
    for record in records:
        length = size_of(record)
        if batch and (size + length > MAX_ENTRY_BYTES or len(batch) == MAX_RECORDS):
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += length
    if batch:
        yield batch
