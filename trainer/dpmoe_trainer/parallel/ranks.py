"""The processes of a run: which one this is, and how they find each other.

The world is a mesh of replicas × experts. The ranks of a row hold all experts between them and
exchange tokens; those of a column hold the same experts. Every rank computes samples of its own.

Ranks meet at a store that rank 0 serves. A rank that is started anew must not join the store of a
rank 0 that is about to end: it would wait for ranks that are gone. So each announces itself, and
one whose place is taken already waits for the next rank 0.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dpmoe_trainer.contract import ParallelPlan
from dpmoe_trainer.errors import PeerLost
from dpmoe_trainer.parallel.collectives import Group, sum_in_place, tell
from dpmoe_trainer.peers import Peers
from dpmoe_trainer.supervise import STARTUP_SECONDS

_RETRY_SECONDS = 0.5
_CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        local_rank: its place in its pod, whose ranks follow each other.
        local_ranks: how many its pod has.
        expert_rank: its place among those that share the experts.
        expert_ranks: how many share them.
        experts: these ranks; None where there is but one process.
        replicas: the ranks that hold the same experts; likewise.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_ranks: int = 1
    expert_rank: int = 0
    expert_ranks: int = 1
    experts: Group = None
    replicas: Group = None

    @property
    def alone(self) -> bool:
        """Whether there is no other rank, and nothing to exchange."""
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that reports and writes what all hold alike."""
        return self.rank == 0

    @property
    def first_here(self) -> int:
        """The number of its pod's first rank, which reads tables for the pod."""
        return self.rank - self.local_rank

    @property
    def peers(self) -> Peers:
        """How they agree on what a run does next."""
        if self.alone:
            return Peers()
        return Peers(self.rank, self.world, _any_of, tell)


ALONE = Ranks()


def _any_of(mine: bool) -> bool:
    votes = torch.tensor([int(mine)])
    sum_in_place(votes)
    return bool(votes.any())


def meet(
    plan: ParallelPlan,
    device: torch.device,
    environment: Mapping[str, str],
    beat: Callable[[], None] = lambda: None,
) -> Ranks:
    """Joins the other ranks of the plan.

    Args:
        plan: how many there are, and how long to wait for them once they are there.
        device: where this rank computes.
        environment: torchrun's variables: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without
            LOCAL_RANK and LOCAL_WORLD_SIZE, each rank is a pod of its own.
        beat: called while it waits for others to start; to wait is no silence. What it raises ends
            the wait.

    Raises:
        PeerLost: they did not come in time.
    """
    if plan.world == 1:
        return ALONE
    rank, world = int(environment["RANK"]), plan.world
    local_ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    timeout = timedelta(seconds=plan.timeout_seconds)
    patience = _Patience(max(plan.timeout_seconds, STARTUP_SECONDS), beat)
    store = _store(rank, timeout, environment, patience)
    try:
        while not store.check([_joined(other) for other in range(world)]):
            patience.wait(f"the {world} ranks did not meet")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=timeout,
        )
        shape = (world // plan.expert_parallel, plan.expert_parallel)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replica", "expert"))
    except RuntimeError as error:
        raise PeerLost(f"the {world} ranks did not meet within {timeout}") from error
    return Ranks(
        rank=rank,
        world=world,
        local_rank=int(environment.get("LOCAL_RANK", "0")) if local_ranks > 1 else 0,
        local_ranks=local_ranks,
        expert_rank=rank % plan.expert_parallel,
        expert_ranks=plan.expert_parallel,
        experts=mesh.get_group("expert"),
        replicas=mesh.get_group("replica"),
    )


def part(ranks: Ranks) -> None:
    """Leaves the others, at the end of a run."""
    if not ranks.alone:
        dist.destroy_process_group()


class _Patience:
    """Waits for others a little at a time, and not for ever."""

    def __init__(self, seconds: float, beat: Callable[[], None]) -> None:
        self._seconds, self._beat = seconds, beat
        self._end = time.monotonic() + seconds

    def wait(self, problem: str, cause: Exception | None = None) -> None:
        """Lets a moment pass.

        Raises:
            PeerLost: all the time has passed.
        """
        self._beat()
        if time.monotonic() >= self._end:
            raise PeerLost(f"{problem} within {self._seconds:g} s") from cause
        time.sleep(_RETRY_SECONDS)


def _joined(rank: int) -> str:
    return f"joined/{rank}"


def _store(
    rank: int, timeout: timedelta, environment: Mapping[str, str], patience: _Patience
) -> dist.Store:
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    # torchrun's agent serves the store itself, for each of its restarts anew.
    serves = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    prefix = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    while True:
        try:
            if not serves:
                # The store's own client would wait for its server without a beat.
                socket.create_connection((host, port), _CONNECT_SECONDS).close()
            served = dist.TCPStore(
                host, port, is_master=serves, timeout=timeout, wait_for_workers=False
            )
            store = dist.PrefixStore(f"dpmoe/{prefix}", served)
            if store.add(_joined(rank), 1) == 1:
                return store
            problem: Exception | None = None
        except (RuntimeError, ValueError, OSError) as error:
            problem = error
        patience.wait(f"rank {rank} found no rank 0 that waits for it at {host}:{port}", problem)
