"""Ours against other ways to the same clipped sum, all in turns, in a process of their own.

So that it can be chosen whether the C library keeps what is freed: how a process uses its memory
cannot be set back, and large blocks that come and go cost some ways more than others.
"""

from dataclasses import dataclass
from multiprocessing import get_context
from unittest.mock import patch

import torch

from benchmarks.trainer_models import (
    Place,
    Shape,
    build_batch,
    build_model,
    difference,
    naive_step,
    plain_step,
    private_step,
)
from benchmarks.trainer_peers import opacus_ghost, opacus_hooks
from benchmarks.trainer_watch import Stopwatch
from dpmoe_trainer.dp import kernels
from dpmoe_trainer.machine import keep_freed_memory

PLAIN = "plain transformers step"
OURS = "ours"
TORCH_PRODUCTS = "ours with torch's own products"
NAIVE = "one sample at a time"
LIBRARY = ("Opacus hooks", "Opacus ghost")
PEERS = (NAIVE, *LIBRARY)


@dataclass(frozen=True)
class Comparison:
    """Each way's median seconds of the processor, and how far its sum is from ours."""

    costs: dict[str, float]
    differences: dict[str, float]


def compare(shape: Shape, place: Place, threads: int, turns: int, keeps: bool) -> Comparison:
    """Times all ways; `keeps` says whether freed memory is kept, for all of them alike."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_compare, (shape, place, threads, turns, keeps))


def _compare(shape: Shape, place: Place, threads: int, turns: int, keeps: bool) -> Comparison:
    torch.set_num_threads(threads)
    if keeps:
        keep_freed_memory()
    model, batch = build_model(shape, place), build_batch(shape, place)
    hooks, ghost = opacus_hooks(model, shape.samples), opacus_ghost(model, shape.samples)
    watch = Stopwatch(place.device)
    for turn in range(turns + 1):
        watch.run(PLAIN, plain_step, model, batch)
        ours = watch.run(OURS, private_step, model, batch)
        with patch.object(kernels, "multiplies", return_value=False):
            watch.run(TORCH_PRODUCTS, private_step, model, batch)
        results = {
            NAIVE: watch.run(NAIVE, naive_step, model, batch),
            LIBRARY[0]: watch.run(LIBRARY[0], hooks, batch),
            LIBRARY[1]: watch.run(LIBRARY[1], ghost, batch),
        }
        if turn == 0:
            watch.start_over()
    return Comparison(
        {name: watch.median(name).processor for name in watch.costs},
        {name: difference(ours, sums) for name, sums in results.items()},
    )
