"""Checking a log that somebody hands over: an export, an anchor's folder, a cluster's entries.

The chain is checked over all of it. The rules are checked from the first entry on that allows it:
the first of all, or the first checkpoint where older entries are in an archive.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpmoe_operator.ledger.entry import GENESIS, LedgerError, entry_name, open_entry
from dpmoe_operator.ledger.fold import LedgerState, checkpoints_in, fold


@dataclass(frozen=True)
class Verified:
    """A log that holds.

    Attributes:
        state: what it adds up to.
        first: number of its first entry; 0 where it is whole.
        trusted: number of the checkpoint that is taken on trust, since what is before it is not
            there; None where all is there.
    """

    state: LedgerState
    first: int
    trusted: int | None


def verify(manifests: Sequence[Mapping[str, Any]]) -> Verified:
    """Check a whole log, or the end of one.

    Args:
        manifests: LedgerEntry objects in the order of their names.

    Raises:
        LedgerError: names the first entry that breaks the chain or a rule.
    """
    first = _number_of(manifests[0]) if manifests else 0
    if first == 0:
        return Verified(fold(manifests), 0, None)
    starts = checkpoints_in(manifests)
    if not starts:
        raise LedgerError(
            entry_name(0), f"missing: the log begins with {entry_name(first)}, without a checkpoint"
        )
    _check_chain(manifests[: starts[0] + 1])
    state = fold(manifests, start=starts[0])
    return Verified(state, first, _number_of(manifests[starts[0]]))


def _check_chain(manifests: Sequence[Mapping[str, Any]]) -> None:
    previous = None
    for number, manifest in enumerate(manifests, _number_of(manifests[0])):
        if previous is None:
            previous = str(manifest["spec"].get("previous", GENESIS))
        previous = open_entry(manifest, sequence=number, previous=previous).digest


def _number_of(manifest: Mapping[str, Any]) -> int:
    """The number in an entry's name; 0 where it has none, which the check of the entry finds."""
    metadata = manifest.get("metadata")
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    digits = str(name).removeprefix("entry-")
    return int(digits) if digits.isdecimal() else 0
