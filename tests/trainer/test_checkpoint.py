"""Checkpoints alone: written by any layout of ranks, read by any other, whole or not there."""

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dpmoe_trainer import checkpoint
from dpmoe_trainer.checkpoint import (
    Part,
    clear,
    lacking_room,
    names,
    newest_whole,
    read_checkpoint,
    write_checkpoint,
)
from dpmoe_trainer.errors import BadCheckpoint, CheckpointFailed, PeerLost
from dpmoe_trainer.peers import Peers

RUN = "a" * 64
EXPERTS = 4


def whole() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "experts": torch.randn(EXPERTS, 3, 2, generator=generator, dtype=torch.float64),
        "dense": torch.randn(5, generator=generator).to(torch.bfloat16),
        "moment.experts": torch.randn(EXPERTS, 3, 2, generator=generator),
        "count": torch.tensor(7),
    }


def shard(rank: int, parallel: int) -> Part:
    each = EXPERTS // parallel
    return Part(rank % parallel * each, each, EXPERTS, writes=rank < parallel)


SHARDED = ("experts", "moment.experts")


def slices(rank: int, parallel: int) -> tuple[dict[str, torch.Tensor], dict[str, Part]]:
    part = shard(rank, parallel)
    tensors = whole()
    for name in SHARDED:
        tensors[name] = tensors[name][part.first : part.first + part.count]
    return tensors, dict.fromkeys(SHARDED, part)


def together(world: int, act: Callable[[Peers], Any]) -> list[Any]:
    """Runs a function on so many ranks, each a thread; what it returned or raised."""
    barrier = threading.Barrier(world)
    said = [False] * world
    results: list[Any] = [None] * world

    def work(rank: int) -> None:
        def any_of(mine: bool) -> bool:
            said[rank] = mine
            barrier.wait(20)
            answer = any(said)
            barrier.wait(20)
            return answer

        try:
            results[rank] = act(Peers(rank, world, any_of))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def write(folder: Path, world: int, parallel: int, step: int = 3) -> list[Any]:
    def act(ranks: Peers) -> None:
        tensors, shards = slices(ranks.rank, parallel)
        write_checkpoint(folder, step, RUN, tensors, shards, ranks)

    return together(world, act)


LAYOUTS = [(1, 1), (2, 2), (4, 4), (4, 2), (2, 1)]


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS)
@pytest.mark.parametrize("reading", [1, 2, 4])
def test_any_layout_reads_what_any_other_wrote(
    tmp_path: Path, world: int, parallel: int, reading: int
) -> None:
    assert write(tmp_path, world, parallel) == [None] * world
    newest = newest_whole(tmp_path, RUN)
    assert newest is not None
    path, step, faults = newest
    assert (path.name, step, faults) == ("step-000000003", 3, [])
    assert names(path) == sorted(whole())
    for rank in range(reading):
        expected, shards = slices(rank, reading)
        wanted: Mapping[str, Part | None] = {name: shards.get(name) for name in expected}
        found = read_checkpoint(path, wanted)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name


def test_uneven_parts_and_an_empty_one(tmp_path: Path) -> None:
    rows = torch.arange(5.0)
    parts = [Part(0, 3, 5), Part(3, 2, 5), Part(5, 0, 5)]

    def act(ranks: Peers) -> None:
        part = parts[ranks.rank]
        mine = rows[part.first : part.first + part.count]
        write_checkpoint(tmp_path, 1, RUN, {"rows": mine}, {"rows": part}, ranks)

    assert together(3, act) == [None] * 3
    path = tmp_path / "step-000000001"
    for part in [*parts, Part(1, 3, 5), Part(0, 5, 5)]:
        found = read_checkpoint(path, {"rows": part})["rows"]
        assert torch.equal(found, rows[part.first : part.first + part.count])


def test_replicated_tensors_are_written_once(tmp_path: Path) -> None:
    write(tmp_path, 4, 2)
    sizes = [
        (tmp_path / f"step-000000003/rank-{rank:05d}.safetensors").stat().st_size
        for rank in range(4)
    ]
    assert sizes[2] == sizes[3] < sizes[1] < sizes[0]


def test_a_missing_slice_is_named(tmp_path: Path) -> None:
    part = Part(0, 2, 4)
    rows = {"experts": torch.zeros(2, 3)}
    write_checkpoint(tmp_path, 1, RUN, rows, {"experts": part}, Peers())
    path = tmp_path / "step-000000001"
    with pytest.raises(BadCheckpoint, match="does not hold rows 0 to 3 of 4 of 'experts'"):
        read_checkpoint(path, {"experts": None})
    with pytest.raises(BadCheckpoint, match="has no tensor 'other'"):
        read_checkpoint(path, {"other": None})


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 11, 120):
        write(tmp_path, 1, 1, step)
    assert sorted(os.listdir(tmp_path)) == ["step-000000011", "step-000000120"]


def test_what_is_not_finished_is_no_checkpoint_and_is_removed(tmp_path: Path) -> None:
    write(tmp_path, 1, 1, 1)
    write(tmp_path, 1, 1, 2)
    (tmp_path / "step-000000002").rename(tmp_path / "step-000000002.tmp-1")
    newest = newest_whole(tmp_path, RUN)
    assert newest is not None
    assert newest[1] == 1
    clear(tmp_path, keep=newest[0])
    assert os.listdir(tmp_path) == ["step-000000001"]
    clear(tmp_path)
    assert not os.listdir(tmp_path)
    assert newest_whole(tmp_path, RUN) is None


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1, 1)
    with pytest.raises(BadCheckpoint, match=f"run {RUN}, and this plan's is {'b' * 64}"):
        newest_whole(tmp_path, "b" * 64)


def test_a_rank_that_cannot_write_ends_all_and_the_older_checkpoints_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 2, 2, 1)
    save = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        if "rank-00001" in path.name:
            raise OSError(28, "No space left on device", str(path))
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    first, second = write(tmp_path, 2, 2, 2)
    assert isinstance(first, PeerLost)
    assert isinstance(second, CheckpointFailed)
    assert f"written to {str(tmp_path)!r} (No space left on device)" in str(second)
    assert not list(tmp_path.glob("*.tmp-*")), "what is left of it still fills the volume"
    newest = newest_whole(tmp_path, RUN)
    assert newest is not None
    assert newest[1] == 1


def test_room_counts_what_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").write_bytes(b"x" * 2_000_000)
    usage = type("Usage", (), {"free": 2_100_000})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    assert lacking_room(tmp_path, 1_000_000) is None
    problem = lacking_room(tmp_path, 1_100_000)
    assert problem is not None
    assert "2,100,000 bytes free" in problem
    assert "need 2,348,576" in problem
