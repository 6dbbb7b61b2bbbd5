"""The most memory that a way of taking the gradient needs over imports and weights.

Measured in a process of its own: what another way had freed would count as this one's otherwise.
"""

from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.trainer_models import (
    Place,
    Shape,
    build_batch,
    build_model,
    halves_step,
    naive_step,
    plain_step,
    private_step,
)
from benchmarks.trainer_peers import opacus_ghost, opacus_hooks
from dpmoe_trainer.dp import kernels
from dpmoe_trainer.machine import keep_freed_memory

STEPS = 3

WAYS: dict[str, Callable[..., object]] = {
    "plain": plain_step,
    "private": private_step,
    "halves": halves_step,
    "naive": naive_step,
}
PEERS = {"hooks": opacus_hooks, "ghost": opacus_ghost}


def peak_bytes(way: str, shape: Shape, place: Place, threads: int) -> int:
    """What some steps of a way (of `WAYS` or `PEERS`) need at most, in bytes."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (way, shape, place, threads))


def _measure(way: str, shape: Shape, place: Place, threads: int) -> int:
    torch.set_num_threads(threads)
    keep_freed_memory()
    kernels.library()
    model, batch = build_model(shape, place), build_batch(shape, place)
    peer = PEERS[way](model, shape.samples) if way in PEERS else None
    before = _start(place)
    for _ in range(STEPS):
        result = peer(batch) if peer else WAYS[way](model, batch)
        # Freed before the next step, as the trainer does with sums and gradients.
        del result
        model.zero_grad(set_to_none=True)
    return _peak(place) - before


def _start(place: Place) -> int:
    """Forgets earlier peaks; the bytes held now."""
    if place.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(place: Place) -> int:
    if place.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(key))
    return int(line.split()[1]) * 1024
