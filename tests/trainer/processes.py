"""Several real processes that meet over gloo, as the ranks of a run do."""

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from dpmoe_trainer.contract import ParallelPlan
from dpmoe_trainer.parallel.ranks import Ranks, meet, part

CPU = torch.device("cpu")


def run_ranks(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    experts: int = 1,
    pod: int = 1,
    timeout: int = 60,
) -> list[Any]:
    """What `function(ranks, *arguments)` returns on each of so many ranks, `pod` of them a pod.

    They are forks of this process, so a test may pass whatever it has.
    """
    context = get_context("fork")
    plan = ParallelPlan(workers=world, expert_parallel=experts, timeout_seconds=timeout)
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        processes = [
            context.Process(
                target=_rank,
                args=(plan, _variables(rank, pod, port), folder, function, arguments),
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        found = [_read(Path(folder) / str(rank)) for rank in range(world)]
    failed = [each for each in found if isinstance(each, Failure)]
    assert not failed, "\n".join(each.text for each in failed)
    return found


class Failure:
    """How a rank failed."""

    def __init__(self, text: str) -> None:
        self.text = text


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _variables(rank: int, pod: int, port: int) -> dict[str, str]:
    own = {"RANK": rank, "LOCAL_RANK": rank % pod, "LOCAL_WORLD_SIZE": pod, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in own.items()}


def _read(file: Path) -> Any:
    return torch.load(file, weights_only=False) if file.exists() else Failure("it left no word")


def _rank(
    plan: ParallelPlan,
    environment: dict[str, str],
    folder: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    rank = environment["RANK"]
    try:
        ranks: Ranks = meet(plan, CPU, environment)
        result = function(ranks, *arguments)
        part(ranks)
    except BaseException:
        result = Failure(f"rank {rank}: {traceback.format_exc()}")
    torch.save(result, Path(folder) / rank)
    os._exit(0)
