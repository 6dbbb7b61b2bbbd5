"""Bringing log and anchor together again, by a person's decision.

`recover` puts back what the log lost, as the anchor has it: the same entries under the same names,
so the chain decides whether it worked. `reanchor` accepts the log as it is and begins a new anchor:
it is for a lost volume, and the person says by the head's digest which log is meant.
"""

import asyncio
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from dpmoe_operator.ledger.anchor import Anchor, AnchorError
from dpmoe_operator.ledger.entry import LedgerError, entry_name, open_entry, to_manifest
from dpmoe_operator.ledger.fold import checkpoints_in
from dpmoe_operator.ledger.log import EntryExists, EntryStore
from dpmoe_operator.ledger.verification import verify


async def recover(store: EntryStore, anchor: Anchor, namespace: str) -> list[str]:
    """Put back the entries that the log lost. May be repeated, and run beside the operator.

    Args:
        store: the log.
        anchor: its copy.
        namespace: where the entries live.

    Returns:
        The names of the entries that were put back.

    Raises:
        Unverified: log and anchor say different things, or the anchor is damaged or empty; the
            message names the first such entry. Nothing was put back but what the anchor holds.
        NoAnswer: the store is silent; run it again.
    """
    manifests = await store.entries()
    present = {m["metadata"]["name"]: m["spec"].get("digest") for m in manifests}
    kept = await asyncio.to_thread(lambda: list(anchor.entries()))
    if not kept:
        raise AnchorError("AnchorLost", f"{anchor.folder} holds no entry of the log")
    start = _start(manifests[0]["metadata"]["name"] if manifests else None, kept)
    missing = []
    for manifest in kept[start:]:
        name, spec = manifest["metadata"]["name"], manifest["spec"]
        if name not in present:
            open_entry(manifest, sequence=spec["sequence"], previous=spec["previous"])
            missing.append(manifest)
        elif present[name] != spec["digest"]:
            raise LedgerError(
                name, "is another in the log than in the anchor; nothing was put back", "Forked"
            )
    for manifest in missing:
        await _put_back(store, manifest, namespace)
    return [manifest["metadata"]["name"] for manifest in missing]


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
    if len(head) < 8 or not state.head.startswith(head):
        raise LedgerError(
            entry_name(state.sequence - 1),
            f"ends the log with digest {state.head[:16]}, not with {head!r}: look at the log with"
            " `dpmoe ledger verify`, and name the digest that it prints (8 digits or more)",
        )
    aside = f"replaced-{now:%Y%m%dT%H%M%SZ}"
    await asyncio.to_thread(anchor.replace, manifests, aside)
    return len(manifests)
