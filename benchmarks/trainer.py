"""The price of privacy in training: a step's time and memory over those of plain training.

The unit is the same model's step in transformers, with its grouped products of experts and its
fused AdamW, in the same process: all ways take turns, so what else runs on the machine meets them
alike. Times of the clock and of the processor are both given: on a busy machine, the processor's
with one thread (`--threads 1`) is what a quiet one would show.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

if not __package__:
    # Run as a script: Python has put this folder first, where the package is not to be found.
    sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.common import ROOT, Json, Quick, Recorder, Seed, note, report
from benchmarks.trainer_memory import peak_bytes
from benchmarks.trainer_models import (
    Place,
    PlainUpdate,
    PrivateUpdate,
    Shape,
    build_batch,
    build_model,
    difference,
    halves_step,
    naive_step,
    plain_step,
    private_step,
)
from benchmarks.trainer_page import write_page
from benchmarks.trainer_peers import opacus_ghost, opacus_hooks
from dpmoe_trainer.dp import kernels
from dpmoe_trainer.dp.stream import add_normal
from dpmoe_trainer.machine import keep_freed_memory

PACKAGES = ("torch", "transformers", "opacus")
RESULTS = ROOT / "docs" / "results" / "trainer.md"
MIB = 2**20
PLAIN = "plain transformers step"


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
Turns = Annotated[int, typer.Option(help="How often each way is timed.")]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="In float32, or bfloat16 on a GPU.")]
Markdown = Annotated[Path | None, typer.Option(help="Write the page to this file.")]


@dataclass(frozen=True)
class Cost:
    """Seconds of the clock and of the processor."""

    clock: float
    processor: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.clock + other.clock, self.processor + other.processor)


class Stopwatch:
    """Collects the costs of named parts.

    Attributes:
        costs: of each part, one a turn.
    """

    def __init__(self, device: str) -> None:
        self.costs: dict[str, list[Cost]] = {}
        self._device = device

    def run(self, name: str, part: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a part, and counts what it cost."""
        self._wait()
        clock, processor = time.perf_counter(), time.process_time()
        result = part(*arguments)
        self._wait()
        cost = Cost(time.perf_counter() - clock, time.process_time() - processor)
        self.costs.setdefault(name, []).append(cost)
        return result

    def start_over(self) -> None:
        """Forgets the first turn, which warmed up."""
        self.costs.clear()

    def median(self, *names: str) -> Cost:
        """Of the sum of some parts, each kind of time by itself."""
        sums = [sum(turn, Cost(0, 0)) for turn in zip(*(self.costs[n] for n in names), strict=True)]
        return Cost(
            statistics.median(cost.clock for cost in sums),
            statistics.median(cost.processor for cost in sums),
        )

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


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
    _peers(base, place, max(2, turns // 2), out.at(str(base)), full=not quick)
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


def _peers(shape: Shape, place: Place, turns: int, out: Recorder, full: bool) -> None:
    """Other ways to the same clipped sum, in turns with ours."""
    note(f"peers at {shape}")
    model, batch = build_model(shape, place), build_batch(shape, place)
    watch = Stopwatch(place.device)
    peers = {
        "one sample at a time": lambda: naive_step(model, batch),
        "Opacus hooks": _bound(opacus_hooks(model, shape.samples), batch),
        "Opacus ghost": _bound(opacus_ghost(model, shape.samples), batch),
    }
    for turn in range(turns + 1):
        watch.run("plain", plain_step, model, batch)
        ours = watch.run("ours", private_step, model, batch)
        results = {name: watch.run(name, peer) for name, peer in peers.items()}
        if turn == 0:
            watch.start_over()
    for name, sums in results.items():
        out.add(f"difference of our sum from that of {name}", difference(ours, sums), "relative")
    own, plain = watch.median("ours").processor, watch.median("plain").processor
    costs = {name: watch.median(name).processor for name in peers}
    for name, cost in costs.items():
        out.add(f"{name}, processor", cost / plain, "×", peer=own / plain, peer_name="ours")
    best = min(costs["Opacus hooks"], costs["Opacus ghost"])
    out.add(
        "ours over the best library, processor",
        best / own,
        "× faster",
        better="higher",
        target=5.0 if full else None,
    )


def _bound(step: Callable[[Any], Any], batch: Any) -> Callable[[], Any]:
    return lambda: step(batch)


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
