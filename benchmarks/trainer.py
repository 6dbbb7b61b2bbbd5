"""The price of privacy in training: a step's time and memory over those of plain training.

The unit is the same model's step in transformers, with its grouped products of experts and its
fused AdamW, in the same process: all ways take turns, so what else runs on the machine meets them
alike. Times of the clock and of the processor are both given: on a busy machine, the processor's
with one thread (`--threads 1`) is what a quiet one would show.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

if not __package__:
    # Run as a script: Python has put this folder first, where the package is not to be found.
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.common import (
    ROOT,
    Device,
    Json,
    Markdown,
    Quick,
    Recorder,
    Seed,
    Turns,
    note,
    report,
)
from benchmarks.trainer_memory import peak_bytes
from benchmarks.trainer_models import (
    Place,
    PlainUpdate,
    PrivateUpdate,
    Shape,
    build_batch,
    build_model,
    halves_step,
    plain_step,
    private_step,
)
from benchmarks.trainer_page import write_page
from benchmarks.trainer_versus import LIBRARY, OURS, PEERS, PLAIN, TORCH_PRODUCTS, compare
from benchmarks.trainer_watch import Stopwatch
from dpmoe_trainer.dp import kernels
from dpmoe_trainer.dp.stream import add_normal
from dpmoe_trainer.machine import keep_freed_memory

PACKAGES = ("torch", "transformers", "opacus")
RESULTS = ROOT / "docs" / "results" / "trainer.md"
MIB = 2**20


@dataclass(frozen=True)
class Targets:
    """What was promised, as a multiple of the plain step."""

    gradient: float | None = None
    step: float | None = None
    halves: float | None = None


BASE = Shape(32, 64, 256, 1024, 8, 2, 4)
SHAPES = {
    BASE: Targets(1.08, 1.15, 1.4),
    BASE.of(128): Targets(1.04, 1.07, 1.4),
    Shape(8, 256, 256, 1024, 8, 2, 4): Targets(1.08, halves=1.4),
    Shape(32, 64, 256, 256, 32, 8, 4): Targets(1.08, halves=1.4),
}
TINY = Shape(8, 32, 64, 128, 4, 2, 2)

Threads = Annotated[int | None, typer.Option(help="Threads; all cores by default.")]


def main(
    quick: Quick = False,
    json_file: Json = None,
    markdown: Markdown = None,
    seed: Seed = 1,
    turns: Turns = 7,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Measure the trainer's step; at full size, its page and file of results are written anew."""
    load = os.getloadavg()[0]
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    keep_freed_memory()
    place = Place(device, torch.float32 if device == "cpu" else torch.bfloat16, seed)
    shapes = {TINY: Targets()} if quick else SHAPES
    base, turns = (TINY, 3) if quick else (BASE, turns)

    out = Recorder()
    for shape, targets in shapes.items():
        _speed(shape, targets, place, turns, out.at(str(shape)))
    _memory(base, place, threads, out.at(str(base)), full=not quick)
    _peers(base, place, threads, max(2, turns // 2), out.at(str(base)), full=not quick)
    _noise(device, turns, out.at("noise"))

    if not quick:
        markdown, json_file = markdown or RESULTS, json_file or RESULTS.with_suffix(".json")
    versions = {"kernels": "none" if kernels.library() is None else "compiled"}
    versions["threads"] = str(threads)
    report(
        out.rows,
        packages=PACKAGES,
        seed=seed,
        quick=quick,
        load=load,
        path=json_file,
        versions=versions,
    )
    if markdown is not None:
        write_page(markdown, out.rows, PACKAGES, seed, load, versions)


def _speed(shape: Shape, targets: Targets, place: Place, turns: int, out: Recorder) -> None:
    note(str(shape))
    model, batch = build_model(shape, place), build_batch(shape, place)
    plain_update, update = PlainUpdate(model), PrivateUpdate(model, shape.samples)
    watch = Stopwatch(place.device)
    for turn in range(turns + 1):
        watch.run("plain", plain_step, model, batch)
        watch.run("plain update", plain_update)
        model.zero_grad(set_to_none=True)
        sums = watch.run("private", private_step, model, batch)
        watch.run("update", update, sums)
        del sums
        watch.run("halves", halves_step, model, batch)
        if turn == 0:
            watch.start_over()
    _ratio(out, "gradient", watch, ["private"], ["plain"], targets.gradient)
    _ratio(
        out,
        "gradient, noise, AdamW",
        watch,
        ["private", "update"],
        ["plain", "plain update"],
        targets.step,
    )
    _ratio(out, "gradient in two physical batches", watch, ["halves"], ["plain"], targets.halves)


def _ratio(
    out: Recorder,
    name: str,
    watch: Stopwatch,
    ours: list[str],
    plain: list[str],
    target: float | None,
) -> None:
    one, other = watch.median(*ours), watch.median(*plain)
    for kind, cost, unit in (
        ("clock", one.clock, other.clock),
        ("processor", one.processor, other.processor),
    ):
        out.add(
            f"{name}, {kind}",
            cost / unit,
            "×",
            target=target,
            peer=unit * 1000,
            peer_name=f"ms, {PLAIN}",
        )


def _memory(shape: Shape, place: Place, threads: int, out: Recorder, full: bool) -> None:
    plain = peak_bytes("plain", shape, place, threads)
    ways: dict[str, tuple[str, float | None]] = {
        "private": ("most memory", 1.2 if full else None),
        "halves": ("most memory, two physical batches", 1.05 if full else None),
    }
    if full:
        ways |= {
            "naive": ("most memory, one sample at a time", None),
            "hooks": ("most memory, Opacus hooks", None),
            "ghost": ("most memory, Opacus ghost", None),
        }
    for way, (name, target) in ways.items():
        peak = peak_bytes(way, shape, place, threads)
        out.add(name, peak / plain, "×", target=target, peer=plain / MIB, peer_name=f"MiB, {PLAIN}")


def _peers(shape: Shape, place: Place, threads: int, turns: int, out: Recorder, full: bool) -> None:
    """Other ways to the same clipped sum, in turns with ours; nobody's memory tuned, and all's."""
    for keeps, how in ((False, "both as they come"), (True, "both with freed memory kept")):
        note(f"peers at {shape}, {how}")
        found = compare(shape, place, threads, turns, keeps)
        if keeps:
            for name, apart in found.differences.items():
                out.add(f"difference of our sum from that of {name}", apart, "relative")
        plain, own = found.costs[PLAIN], found.costs[OURS]
        for name in PEERS:
            out.add(
                f"{name}, {how}, processor",
                found.costs[name] / plain,
                "×",
                peer=own / plain,
                peer_name="ours",
            )
        best = min(found.costs[name] for name in LIBRARY)
        for name, cost, target in (
            ("ours", own, 5.0 if full else None),
            ("ours with torch's own products", found.costs[TORCH_PRODUCTS], None),
        ):
            out.add(
                f"{name} over the best library, {how}, processor",
                best / cost,
                "× faster",
                better="higher",
                target=target,
                peer=cost / plain,
                peer_name=f"× the {PLAIN}",
            )


def _noise(device: str, turns: int, out: Recorder) -> None:
    """A stream's price, against torch's own generator, which is not a secret one."""
    numbers = torch.zeros(1 << 20, device=device)
    watch = Stopwatch(device)
    compiled = kernels.library()
    for turn in range(turns + 1):
        watch.run("ours", add_normal, numbers, bytes(32), 1.0)
        watch.run("torch", lambda: numbers.add_(torch.randn_like(numbers)))
        if turn == 0:
            watch.start_over()
    nanoseconds = 1e9 / numbers.numel()
    out.add(
        "a number, ChaCha20, double precision" + (", compiled" if compiled else ""),
        watch.median("ours").processor * nanoseconds,
        "ns",
        peer=watch.median("torch").processor * nanoseconds,
        peer_name="torch.randn, single precision, predictable",
    )


if __name__ == "__main__":
    typer.run(main)
