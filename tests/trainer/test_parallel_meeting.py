"""How ranks find each other where they do not start together."""

import itertools
import time
from multiprocessing import get_context

import pytest
import torch
from tests.trainer.processes import free_port

from dpmoe_trainer.contract import ParallelPlan
from dpmoe_trainer.errors import PeerLost
from dpmoe_trainer.parallel import ranks
from dpmoe_trainer.parallel.ranks import meet, part

PLAN = ParallelPlan(workers=2, expert_parallel=2, timeout_seconds=5)


def join(rank: int, port: int, beats: list[float]) -> None:
    environment = {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    beat = lambda: beats.append(time.monotonic())  # noqa: E731
    part(meet(PLAN, torch.device("cpu"), environment, beat))


def start_late(rank: int, port: int) -> None:
    time.sleep(PLAN.timeout_seconds + 1)
    join(rank, port, [])


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_starts_late_is_waited_for_with_signs_of_life(late: int) -> None:
    port = free_port()
    other = get_context("fork").Process(target=start_late, args=(late, port))
    other.start()
    beats = [time.monotonic()]
    try:
        join(1 - late, port, beats)
    finally:
        other.join(30)
    assert other.exitcode == 0
    silence = [b - a for a, b in itertools.pairwise(beats)]
    assert len(silence) > PLAN.timeout_seconds
    assert max(silence) < PLAN.timeout_seconds


@pytest.mark.parametrize("rank", [0, 1])
def test_nobody_waits_for_ever(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "STARTUP_SECONDS", 1)
    monkeypatch.setattr(ranks, "_RETRY_SECONDS", 0.1)
    plan = PLAN.model_copy(update={"timeout_seconds": 1})
    environment = {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with pytest.raises(PeerLost, match="within 1 s"):
        meet(plan, torch.device("cpu"), environment)
