"""Expert parallelism on real processes: the price of privacy, and what travels for it.

Ranks are processes that meet over gloo, or NCCL on a GPU each. In every turn they take one step
without privacy and one with it, so what else runs on the machine meets both alike; then rank 0
takes the whole batch alone, with all threads, while the others wait.
"""

import os
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
from benchmarks.distributed_paper import as_markdown
from benchmarks.distributed_peers import plain_parallel_step
from benchmarks.page import heading, targets
from benchmarks.trainer_models import Place, Shape, build_batch, build_model, private_step
from dpmoe_trainer.contract import ParallelPlan
from dpmoe_trainer.dp import kernels
from dpmoe_trainer.machine import keep_freed_memory
from dpmoe_trainer.parallel.ranks import Ranks, meet, part
from dpmoe_trainer.parallel.shards import shard_experts, sharded_parameters
from dpmoe_trainer.parallel.sums import sum_over_ranks

PACKAGES = ("torch", "transformers")
RESULTS = ROOT / "docs" / "results" / "distributed.md"

BASE = Shape(32, 64, 256, 1024, 8, 2, 4)
FINE = Shape(32, 64, 256, 256, 32, 8, 4)
TINY = Shape(8, 32, 64, 128, 4, 2, 2)
WORLD = 2

NOTES = """\
Two ranks share the experts and half of the samples each, one thread a rank. The unit is the same
expert-parallel step without privacy (`benchmarks/distributed_peers.py`): the same tokens take the
same way, weight gradients are autograd's, products are torch's grouped ones. Both sum what is no
expert's over the ranks, after the backward pass. A turn's time is the slower rank's; medians.

Bytes are what a rank gives to collectives in one step, its own part included. Time in exchanges is
rank 0's, from giving its rows to having all that come, so waiting for the other rank is in it: no
overlap of exchanges and computation could gain more.
"""


def main(
    quick: Quick = False,
    json_file: Json = None,
    markdown: Markdown = None,
    seed: Seed = 1,
    turns: Turns = 9,
    device: Device = "cpu",
) -> None:
    """Measure expert-parallel steps; at full size, the page and file of results are written."""
    load = os.getloadavg()[0]
    out = Recorder()
    for shape in (TINY,) if quick else (BASE, FINE):
        note(f"{WORLD} ranks, {shape}")
        _measure(shape, seed, 3 if quick else turns, device, out.at(str(shape)), full=not quick)
    if not quick:
        markdown, json_file = markdown or RESULTS, json_file or RESULTS.with_suffix(".json")
    versions = {"kernels": "none" if kernels.library() is None else "compiled"}
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
        head = heading(
            "Expert parallelism: the price of privacy between ranks",
            "python benchmarks/distributed.py",
            packages=PACKAGES,
            seed=seed,
            load=load,
            versions=versions,
        )
        markdown.write_text("\n".join([*head, NOTES, *targets(out.rows), as_markdown()]))


def _measure(
    shape: Shape, seed: int, turns: int, device: str, out: Recorder, *, full: bool
) -> None:
    context = get_context("spawn")
    answers = context.SimpleQueue()
    port = _free_port()
    ranks = [
        context.Process(target=_rank, args=(rank, port, shape, seed, turns, device, answers))
        for rank in range(WORLD)
    ]
    for process in ranks:
        process.start()
    times, traffic = answers.get()
    for process in ranks:
        process.join()
    plain, private, alone = (statistics.median(times[way]) for way in ("plain", "private", "alone"))
    unit = {"peer": plain * 1000, "peer_name": "ms, the same without privacy"}
    out.add("private step", private / plain, "×", target=1.15 if full else None, **unit)
    out.add(
        "private step, one process with all threads",
        alone / private,
        "× that of the ranks",
        peer=private * 1000,
        peer_name="ms, of the ranks",
    )
    shares = {
        way: 100 * statistics.median(turn.seconds["tokens"] for turn in steps) / each
        for (way, steps), each in zip(traffic.items(), (plain, private), strict=True)
    }
    out.add(
        "private step, in exchanges of tokens",
        shares["private"],
        "% of its time",
        peer=shares["plain"],
        peer_name="%, of the step without privacy",
    )
    sent = {way: steps[-1].bytes for way, steps in traffic.items()}
    tokens = sent["private"]["tokens"]
    added = sum(sent["private"].values()) - sum(sent["plain"].values())
    out.add(
        "sent for privacy",
        100 * added / tokens,
        "% of the tokens' bytes",
        target=0.1 if full else None,
        peer=tokens / 1e6,
        peer_name="MB of tokens a step and rank",
    )


def _rank(
    rank: int, port: int, shape: Shape, seed: int, turns: int, device: str, answers: Any
) -> None:
    keep_freed_memory()
    threads = len(os.sched_getaffinity(0))
    each = max(1, threads // WORLD)
    torch.set_num_threads(each)
    place = Place(device, torch.float32 if device == "cpu" else torch.bfloat16, seed)
    environment = {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    plan = ParallelPlan(workers=WORLD, expert_parallel=WORLD)
    ranks = meet(plan, torch.device(device), environment)
    whole, model = build_model(shape, place), build_model(shape, place)
    shard_experts(model, ranks)
    batch = build_batch(shape, place)
    mine = {key: value[rank::WORLD] for key, value in batch.items()}
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain_parallel_step(model, mine),
        "private": lambda: _private_step(model, mine, ranks),
    }
    times: dict[str, list[float]] = {"plain": [], "private": [], "alone": []}
    traffic: dict[str, list[Traffic]] = {"plain": [], "private": []}
    for turn in range(turns + 1):
        for name, step in ways.items():
            dist.barrier()
            with watched_traffic() as seen:
                started = time.perf_counter()
                step()
                dist.barrier()
                took = time.perf_counter() - started
            model.zero_grad(set_to_none=True)
            if turn:
                times[name].append(took)
                traffic[name].append(seen)
        if rank == 0:
            torch.set_num_threads(threads)
            started = time.perf_counter()
            private_step(whole, batch)
            if turn:
                times["alone"].append(time.perf_counter() - started)
            torch.set_num_threads(each)
        dist.barrier()
    if rank == 0:
        answers.put((times, traffic))
    part(ranks)


def _private_step(model: Any, batch: dict[str, torch.Tensor], ranks: Ranks) -> Any:
    sums = private_step(model, batch)
    return sum_over_ranks(sums, sharded_parameters(model), ranks)


@dataclass
class Traffic:
    """What a rank gave to collectives, tokens' rows and all else, and how long these took."""

    bytes: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)


@contextmanager
def watched_traffic() -> Iterator[Traffic]:
    """Watches this rank's collectives."""
    seen = Traffic()
    names = ("all_to_all_single", "all_reduce", "all_gather_single")
    before = {name: getattr(dist, name) for name in names}

    def watched(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            given = arguments[0] if name == "all_reduce" else arguments[1]
            tokens = name == "all_to_all_single" and given.is_floating_point()
            kind = "tokens" if tokens else "other"
            seen.bytes[kind] += given.nbytes
            started = time.perf_counter()
            done = before[name](*arguments, **keywords)
            if given.is_cuda:
                torch.cuda.synchronize()
            seen.seconds[kind] += time.perf_counter() - started
            return done

        return call

    try:
        for name in names:
            setattr(dist, name, watched(name))
        yield seen
    finally:
        for name in names:
            setattr(dist, name, before[name])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    typer.run(main)
