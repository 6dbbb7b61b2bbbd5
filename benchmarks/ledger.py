"""The operator and its ledger at scale: how fast, how large, and how soon back after a crash.

Two parts run on an API server, the embedded one and a real one: the real `dpmoe operator`, timed
from outside, and then its parts, timed in this process. A last part needs no server: a long history
of the ledger, folded, and an operator that starts on it.
"""

import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

if not __package__:
    # Run as a script: Python has put this folder first, where the package is not to be found.
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.cluster import World, api_server, kubernetes_version, world
from benchmarks.common import (
    ROOT,
    Json,
    Quick,
    Recorder,
    Seed,
    note,
    report,
    resident_bytes,
    seconds,
)
from benchmarks.history import History, write_history
from benchmarks.parts import measure_parts
from benchmarks.process import measure_process
from benchmarks.sizes import FULL, MIB, QUICK, Sizes
from benchmarks.table import write_page
from dpmoe_operator.kube.operator import spare_the_collector
from dpmoe_operator.kube.resources import LEDGER_ENTRIES
from dpmoe_operator.ledger.anchor import Anchor
from dpmoe_operator.ledger.fold import LedgerState, checkpoints_in, fold
from dpmoe_operator.local.stack import Api

PACKAGES = ("aiohttp", "dp-accounting", "kopf", "kubernetes", "numpy", "pydantic")

RESULTS = ROOT / "docs" / "results" / "ledger.md"

Object = dict[str, Any]
Choice = Literal["both", "embedded", "envtest", "none"]

SERVERS: dict[Choice, tuple[Api, ...]] = {
    "both": ("embedded", "envtest"),
    "embedded": ("embedded",),
    "envtest": ("envtest",),
    "none": (),
}


def main(
    quick: Quick = False,
    json_file: Json = None,
    seed: Seed = 1,
    api: Annotated[
        Choice,
        typer.Option(help="API server; envtest is the real one, none is none."),
    ] = "both",
) -> None:
    """Measure the operator and its ledger; at full size, its page of results is written anew."""
    sizes, load = QUICK if quick else FULL, os.getloadavg()[0]
    spare_the_collector()  # As the operator does: nothing here should differ from its process.
    out = Recorder()
    versions = {"kube-apiserver": kubernetes_version()} if "envtest" in SERVERS[api] else {}
    for each in SERVERS[api]:
        note(f"{each} API server")
        with api_server(each) as stack:
            asyncio.run(measure_process(stack, sizes, seed, out.at(each)))
            asyncio.run(measure_parts(stack, sizes, seed, out.at(each)))
    note("history")
    with tempfile.TemporaryDirectory(prefix="dpmoe-benchmark-") as folder:
        asyncio.run(_history(Path(folder), sizes, seed, out.at("history")))
    whole = api == "both" and not quick
    if whole:
        json_file = json_file or RESULTS.with_suffix(".json")
    report(
        out.rows,
        packages=PACKAGES,
        versions=versions,
        seed=seed,
        quick=quick,
        load=load,
        path=json_file,
    )
    if whole and json_file is not None:
        command = "python benchmarks/ledger.py"
        write_page(RESULTS, "Ledger and operator", command, json.loads(json_file.read_text()))


async def _history(folder: Path, sizes: Sizes, seed: int, out: Recorder) -> None:
    with seconds() as writing:
        history = await write_history(folder, grants=sizes.grants, blocks=sizes.accounts, seed=seed)
    note(f"  {sizes.grants} grants written in {writing():.0f} s")
    _folds(history, sizes.repeats, out)
    title = f"{sizes.grants} grants over {sizes.accounts} blocks"
    out.add(f"{title}: largest entry", history.largest_entry, "bytes", target=1.0 * MIB)
    out.add(f"{title}: most bytes ever in the cluster", history.most_bytes, "bytes", target=1e8)
    with api_server("embedded") as stack:
        Anchor(stack.anchor).replace(history.due, "aside")
        async with world(stack, sizes.quiet_seconds) as cluster:
            await cluster.create(LEDGER_ENTRIES, history.due)
            memory = await _memory_on(cluster)
    out.add(f"{title}: memory of the operator", memory / MIB, "MiB")


def _folds(history: History, repeats: int, out: Recorder) -> None:
    """Folds from the last checkpoint, against the fold of every entry there ever was."""
    whole_fold, whole_read = _fold_of_all(history.archive)
    name = "every entry from the first"
    for title, entries in (
        ("checkpoint just written", history.fresh),
        ("next checkpoint about due", history.due),
    ):
        start = (checkpoints_in(entries) or [0])[-1]
        texts = [json.dumps(entry) for entry in entries[start:]]
        folds, reads = [], []
        for _ in range(repeats):
            with seconds() as reading:
                tail = [json.loads(text) for text in texts]
            with seconds() as folding:
                fold(tail)
            folds.append(folding())
            reads.append(reading() + folding())
        ours = statistics.median(folds)
        out.add(f"fold, {title}", ours, "s", target=2.0, peer=whole_fold, peer_name=name)
        ours = statistics.median(reads)
        out.add(f"decode + fold, {title}", ours, "s", peer=whole_read, peer_name=name)


def _fold_of_all(archive: Path) -> tuple[float, float]:
    """Seconds to fold the whole log, and to decode and fold it; one entry in memory at a time."""
    state, decoded, folded = LedgerState(), 0.0, 0.0
    for line in _lines(archive):
        with seconds() as decoding:
            manifest = json.loads(line)
        with seconds() as folding:
            state.apply(manifest)
        decoded, folded = decoded + decoding(), folded + folding()
    return folded, decoded + folded


def _lines(archive: Path) -> Iterator[bytes]:
    for segment in sorted(archive.glob("log-*.jsonl")):
        with segment.open("rb") as file:
            yield from file


async def _memory_on(cluster: World) -> int:
    """Resident bytes of an operator that has loaded the ledger and run a few rounds."""
    cluster.stack.start_operator()
    operator = cluster.stack.operator
    assert operator is not None
    # The jobs of its open grants do not exist: its first round settles them all.
    await cluster.until(lambda: b"settled" in operator.log.read_bytes(), "a first round", 300)
    await cluster.quiet()
    assert operator.pid is not None
    return resident_bytes(operator.pid)


if __name__ == "__main__":
    typer.run(main)
