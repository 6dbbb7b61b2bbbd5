"""Bringing log and anchor together again, by a person's decision.

`recover` puts back what the log lost, as the anchor has it: the same entries under the same names,
so the chain decides whether it worked. Where a writer that stood still has put another entry into
a lost one's place, the person names that entry to have it taken out: nothing takes effect before
the anchor holds it, so this one never did. `reanchor` accepts the log as it is and begins a new
anchor: it is for a lost volume, and the person says by the head's digest which log is meant.
"""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from dpmoe_operator.ledger.anchor import Anchor, AnchorError
from dpmoe_operator.ledger.entry import LedgerError, entry_name, open_entry, to_manifest
from dpmoe_operator.ledger.fold import checkpoints_in
from dpmoe_operator.ledger.log import EntryExists, EntryStore
from dpmoe_operator.ledger.verification import verify

MIN_DIGEST = 8
"""So many digits of a digest name an entry; fewer may be a slip."""


async def recover(
    store: EntryStore, anchor: Anchor, namespace: str, drop: str | None = None
) -> list[str]:
    """Put back the entries that the log lost. May be repeated, and run beside the operator.

    Args:
        store: the log.
        anchor: its copy.
        namespace: where the entries live.
        drop: the digest of the first entry of the log that is another in the anchor, or its
            beginning. It is taken out with all that follow it; only for an anchor that was never
            taken back itself.

    Returns:
        The names of the entries that were put back.

    Raises:
        Unverified: log and anchor say different things and `drop` does not name which, or the
            anchor is damaged or empty; the message names the first such entry. Nothing was put
            back but what the anchor holds.
        NoAnswer: the store is silent; run it again.
    """
    manifests = await store.entries()
    kept = await asyncio.to_thread(lambda: list(anchor.entries()))
    if not kept:
        raise AnchorError("AnchorLost", f"{anchor.folder} holds no entry of the log")
    forked = _forked(manifests, kept)
    if forked:
        _check_drop(forked[0], drop, kept)
    start = _start(manifests[0]["metadata"]["name"] if manifests else None, kept)
    present = {m["metadata"]["name"] for m in manifests[: len(manifests) - len(forked)]}
    missing = [manifest for manifest in kept[start:] if manifest["metadata"]["name"] not in present]
    for manifest in missing:
        spec = manifest["spec"]
        open_entry(manifest, sequence=spec["sequence"], previous=spec["previous"])
    for manifest in reversed(forked):  # A run that is cut short leaves the named one to name again.
        await store.remove(manifest["metadata"]["name"])
    for manifest in missing:
        await _put_back(store, manifest, namespace)
    return [manifest["metadata"]["name"] for manifest in missing]


def _forked(
    manifests: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]]
) -> Sequence[dict[str, Any]]:
    """The log from its first entry on that is another in the anchor; nothing if none is."""
    copies = {manifest["metadata"]["name"]: manifest["spec"]["digest"] for manifest in kept}
    for position, manifest in enumerate(manifests):
        digest = manifest["spec"].get("digest")
        if copies.get(manifest["metadata"]["name"], digest) != digest:
            return manifests[position:]
    return []


def _check_drop(first: Mapping[str, Any], drop: str | None, kept: Sequence[dict[str, Any]]) -> None:
    """Raises unless the person named the first forked entry, which follows one of the anchor."""
    name, spec = first["metadata"]["name"], first["spec"]
    digest = str(spec.get("digest"))
    problem = f"is another in the log (digest {digest[:16]}) than in the anchor"
    if spec.get("previous") not in {manifest["spec"]["digest"] for manifest in kept}:
        remedy = "it follows nothing that the anchor holds: put this log's own volume in place"
    elif drop is None:
        remedy = (
            "nothing was put back. If the anchor is this log's and was never restored itself,"
            " what it does not hold took no effect: name the digest with `dpmoe ledger recover"
            " --drop`, to take this entry out with all that follow it"
        )
    elif len(drop) < MIN_DIGEST or not digest.startswith(drop):
        remedy = f"--drop {drop!r} does not name it ({MIN_DIGEST} digits or more)"
    else:
        return
    raise LedgerError(name, f"{problem}; {remedy}", "Forked")


def _start(first: str | None, kept: list[dict[str, Any]]) -> int:
    """From where on the log should hold what the anchor holds: a position in `kept`.

    From its first entry on; an empty log from the last checkpoint but one, as the operator keeps.
    """
    if first is not None:
        return next((i for i, each in enumerate(kept) if each["metadata"]["name"] >= first), 0)
    checkpoints = checkpoints_in(kept)
    return checkpoints[-2] if len(checkpoints) > 1 else 0


async def _put_back(store: EntryStore, manifest: Mapping[str, Any], namespace: str) -> None:
    whole = to_manifest(manifest["spec"], namespace)
    name = whole["metadata"]["name"]
    try:
        await store.create(whole)
    except EntryExists:
        there = await store.entry(name)
        if there is None or there["spec"] != manifest["spec"]:
            raise LedgerError(name, "was written by somebody else meanwhile") from None


async def reanchor(store: EntryStore, anchor: Anchor, head: str, now: datetime) -> int:
    """Begin a new anchor with the log as it is. What the folder held is kept aside in it.

    Args:
        store: the log.
        anchor: the folder.
        head: the digest of the log's last entry, or its beginning, as `dpmoe ledger verify` says.
        now: names the folder for what is kept aside.

    Returns:
        How many entries the new anchor holds.

    Raises:
        Unverified: the log does not hold, or it ends with another digest.
    """
    manifests = await store.entries()
    state = verify(manifests).state
    if not manifests:
        raise LedgerError(entry_name(0), "missing: the log is empty, there is nothing to anchor")
    if len(head) < MIN_DIGEST or not state.head.startswith(head):
        raise LedgerError(
            entry_name(state.sequence - 1),
            f"ends the log with digest {state.head[:16]}, not with {head!r}: look at the log with"
            " `dpmoe ledger verify`, and name the digest that it prints"
            f" ({MIN_DIGEST} digits or more)",
        )
    aside = f"replaced-{now:%Y%m%dT%H%M%SZ}"
    await asyncio.to_thread(anchor.replace, manifests, aside)
    return len(manifests)
