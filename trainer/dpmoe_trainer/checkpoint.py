"""The run's state on its checkpoint volume: sharded, whole or not there, in safetensors.

    step-000000120/
      rank-00000.safetensors   what rank 0 wrote: tensors, or slices of their rows
      rank-00000.json          which, and the file's size and SHA-256
      manifest.json            step, run, ranks, and the SHA-256 of every rank's list

Ranks write into a folder of another name; rank 0 writes the manifest last, brings everything to the
disk, and renames the folder. So a folder with its name is whole unless the volume lost something,
which the sums show. Any layout of ranks can read what any other wrote: a tensor is put together
from slices along its first dimension: the experts of fused weights, the rows of sharded dense ones.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpmoe_trainer.errors import BadCheckpoint, CheckpointFailed, PeerLost
from dpmoe_trainer.journal import sync_file, sync_folder
from dpmoe_trainer.peers import Peers

KEPT = 2
"""Checkpoints that stay: the newest, and one more in case it is damaged."""

SPARE_BYTES = 2**20
"""Room beyond the tensors: manifests, journal."""

_MANIFEST = "manifest.json"
_FIELD = "checkpoint.path"


@dataclass(frozen=True)
class Part:
    """A rank's part of a tensor: rows [first, first + count) of the `of` of its first dimension.

    Of ranks that hold the same part, one `writes` it.
    """

    first: int
    count: int
    of: int
    writes: bool = True


Tensors = Mapping[str, Tensor]
Parts = Mapping[str, Part]
"""By tensor name; a tensor without one is whole on every rank, and rank 0 writes it."""


def write_checkpoint(
    folder: Path,
    step: int,
    run_digest: str,
    tensors: Tensors,
    parts: Parts,
    ranks: Peers,
    attempt: int = 0,
) -> None:
    """Writes the checkpoint after `step` steps and removes what is older than the one before.

    All ranks call it. Tensors keep their type.

    Args:
        folder: the checkpoint folder.
        step: steps that the state has taken.
        run_digest: the run's name.
        tensors: this rank's state by name.
        parts: which of them are but a part here.
        ranks: the ranks.
        attempt: tells apart what two attempts write at once; the same on all ranks.

    Raises:
        CheckpointFailed: this rank could not write; the older checkpoints are as they were.
        PeerLost: another rank could not.
    """
    mine = {n: t for n, t in tensors.items() if (parts[n].writes if n in parts else ranks.first)}
    staging = folder / f"{_name(step)}.tmp-{attempt}"
    try:
        with _told(folder, mine) as told:
            if ranks.first:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
        _agree(ranks, told.problem)
        with _told(folder, mine) as told:
            _write_rank(staging, mine, parts, ranks.rank)
        _agree(ranks, told.problem)
        with _told(folder, mine) as told:
            if ranks.first:
                _publish(staging, folder / _name(step), step, run_digest, ranks.world)
                _prune(folder)
        _agree(ranks, told.problem)
    except (CheckpointFailed, PeerLost):
        if ranks.first:
            # On a full volume, what was written of it may be what fills it.
            shutil.rmtree(staging, ignore_errors=True)
        raise


def read_checkpoint(path: Path, wanted: Mapping[str, Part | None]) -> dict[str, Tensor]:
    """Tensors of a checkpoint, each whole or the part that is wanted; on the CPU.

    Raises:
        BadCheckpoint: a tensor, or a part of it, is not there.
    """
    pieces = _pieces(path)
    return {name: _assemble(path, name, pieces.get(name, ()), s) for name, s in wanted.items()}


def names(path: Path) -> list[str]:
    """The names of the tensors of a checkpoint."""
    return sorted(_pieces(path))


def newest_whole(
    folder: Path, run_digest: str, only: int | None = None
) -> tuple[Path, int, list[str]] | None:
    """The newest checkpoint that is whole, its step, and what is wrong with those after it.

    Args:
        folder: the checkpoint folder.
        run_digest: the run's name.
        only: after how many steps alone it may be, where the model may have been seen.

    Returns:
        None if there is no checkpoint at all, and any would have done.

    Raises:
        BadCheckpoint: none is whole, or they are another run's.
        CheckpointFailed: none could be read now.
    """
    faults: list[str] = []
    unread = False
    for path in reversed(_checkpoints(folder)) if only is None else [folder / _name(only)]:
        try:
            return path, _verify(path, run_digest), faults
        except (OSError, ValueError, KeyError, TypeError) as error:
            faults.append(_fault(path, error))
            unread |= isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    if not faults:
        return None
    which = "no checkpoint"
    if only is not None:
        which += f" of step {only}, after which the run began to save its model,"
    if unread:
        raise CheckpointFailed(
            f"{_FIELD}: {which} can be read: {'; '.join(faults)}; check the volume, and the run "
            f"can go on"
        )
    raise BadCheckpoint(
        f"{_FIELD}: {which} is whole: {'; '.join(faults)}; restore the file, or apply the job anew"
    )


def clear(folder: Path, keep: Path | None = None) -> None:
    """Removes what was never finished, and all checkpoints newer than `keep`, None for all."""
    for path in [*folder.glob("step-*.tmp-*"), *_checkpoints(folder)]:
        if keep is None or path.suffix or path.name > keep.name:
            shutil.rmtree(path, ignore_errors=True)


def lacking_room(folder: Path, size: int) -> str | None:
    """Says so where a volume has too little room for the checkpoints of a state of `size` bytes."""
    here = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    needed = (KEPT + 1) * size + SPARE_BYTES - here
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return (
        f"{_FIELD}: {str(folder)!r} has {free:,} bytes free and the run's checkpoints need "
        f"{needed:,}; make room, or name another volume"
    )


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _checkpoints(folder: Path) -> list[Path]:
    """Folders with a checkpoint's name, oldest first."""
    return sorted(path for path in folder.glob("step-*") if not path.suffix and path.is_dir())


class _told:  # noqa: N801
    """Turns what a writer raises into a `CheckpointFailed`, to be told to the other ranks first."""

    def __init__(self, folder: Path, tensors: Tensors) -> None:
        self.problem: CheckpointFailed | None = None
        self._folder = folder
        self._size = sum(tensor.nbytes for tensor in tensors.values())

    def __enter__(self) -> "_told":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else ""
        if isinstance(error, SafetensorError):
            reason = str(error)  # it tells of files alone, and hides the system's error in its text
        try:
            free = f"{shutil.disk_usage(self._folder).free:,}"
        except OSError:
            free = "unknown"
        self.problem = CheckpointFailed(
            f"{_FIELD}: a checkpoint could not be written to {str(self._folder)!r} "
            f"({reason or type(error).__name__}); it needs {self._size + SPARE_BYTES:,} bytes and "
            f"{free} are free there: make room, and the run can go on from its last checkpoint"
        )
        self.problem.__cause__ = error
        return True


def _agree(ranks: Peers, problem: CheckpointFailed | None) -> None:
    """All ranks go on, or none does."""
    if ranks.any_of(problem is not None):
        raise problem or PeerLost("another rank could not write its checkpoint; see its message")


def _write_rank(staging: Path, tensors: Tensors, parts: Parts, rank: int) -> None:
    file = staging / f"rank-{rank:05d}.safetensors"
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
    sync_file(file)
    listed = {
        name: [parts[name].first, parts[name].count, parts[name].of] if name in parts else None
        for name in tensors
    }
    content = {"file": file.name, "size": file.stat().st_size, "sha256": _sum(file)}
    _write_json(file.with_suffix(".json"), content | {"tensors": listed})


def _publish(staging: Path, path: Path, step: int, run_digest: str, world: int) -> None:
    lists = {
        f"rank-{rank:05d}.json": _sum(staging / f"rank-{rank:05d}.json") for rank in range(world)
    }
    content = {"version": 1, "step": step, "run": run_digest, "ranks": world, "lists": lists}
    _write_json(staging / _MANIFEST, content)
    sync_folder(staging)
    shutil.rmtree(path, ignore_errors=True)
    os.rename(staging, path)
    sync_folder(path.parent)


def _prune(folder: Path) -> None:
    for path in _checkpoints(folder)[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")))
    sync_file(path)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Damaged(ValueError):
    """A file of a checkpoint is not what its manifest says; its text names the file."""


def _verify(path: Path, run_digest: str) -> int:
    """The step of a checkpoint whose files all have their sums."""
    manifest = json.loads((path / _MANIFEST).read_text())
    if manifest["run"] != run_digest:
        raise BadCheckpoint(
            f"{_FIELD}: {path} is a checkpoint of run {manifest['run']}, and this plan's is "
            f"{run_digest}; name a folder of this run's own"
        )
    for name, expected in manifest["lists"].items():
        if _sum(path / name) != expected:
            raise _Damaged(f"{name} has another SHA-256 than its manifest says")
        listed = json.loads((path / name).read_text())
        file = path / listed["file"]
        if file.stat().st_size != listed["size"]:
            raise _Damaged(f"{file.name} has {file.stat().st_size} bytes of {listed['size']}")
        if _sum(file) != listed["sha256"]:
            raise _Damaged(f"{file.name} has another SHA-256 than its manifest says")
    if _name(int(manifest["step"])) != path.name:
        raise _Damaged(f"{_MANIFEST} is that of step {manifest['step']}")
    return int(manifest["step"])


def _fault(path: Path, error: Exception) -> str:
    if isinstance(error, _Damaged):
        return f"{path}: {error}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be read ({error.strerror})"
    return f"{path / _MANIFEST} is malformed"


@dataclass(frozen=True)
class _Piece:
    """Where rows [first, first + count) of a tensor are; the whole of it if `of` is None."""

    file: str
    first: int
    count: int
    of: int | None


def _pieces(path: Path) -> dict[str, list[_Piece]]:
    pieces: dict[str, list[_Piece]] = {}
    for name in json.loads((path / _MANIFEST).read_text())["lists"]:
        listed = json.loads((path / name).read_text())
        for tensor, part in listed["tensors"].items():
            first, count, of = part or (0, 0, None)
            pieces.setdefault(tensor, []).append(_Piece(listed["file"], first, count, of))
    return pieces


def _assemble(path: Path, name: str, pieces: list[_Piece] | tuple[()], part: Part | None) -> Tensor:
    """A tensor, or a part of it, from the pieces that cover it."""
    if not pieces:
        raise BadCheckpoint(f"{_FIELD}: {path} has no tensor {name!r}; apply the job anew")
    whole = next((piece for piece in pieces if piece.of is None), None)
    if whole is not None:
        with safe_open(path / whole.file, "pt") as file:
            # A number of its own, as an optimiser's count of steps, is nobody's part.
            if part is None or not file.get_slice(name).get_shape():
                return file.get_tensor(name)
            return file.get_slice(name)[part.first : part.first + part.count]
    of = pieces[0].of
    assert of is not None, "a whole tensor was returned"
    wanted = part or Part(0, of, of)
    parts = list(_cover(path, name, pieces, wanted.first, wanted.first + wanted.count))
    if wanted.of != of or sum(len(part) for part in parts) != wanted.count:
        raise BadCheckpoint(
            f"{_FIELD}: {path} does not hold rows {wanted.first} to "
            f"{wanted.first + wanted.count - 1} of {wanted.of} of {name!r}; apply the job anew"
        )
    if not parts:
        with safe_open(path / pieces[0].file, "pt") as file:
            return file.get_slice(name)[0:0]
    return torch.cat(parts)


def _cover(path: Path, name: str, pieces: list[_Piece], first: int, end: int) -> Iterator[Tensor]:
    """The rows [first, end) from pieces in order, each row once."""
    for piece in sorted(pieces, key=lambda piece: piece.first):
        last = min(end, piece.first + piece.count)
        if piece.first <= first < last:
            with safe_open(path / piece.file, "pt") as file:
                yield file.get_slice(name)[first - piece.first : last - piece.first]
            first = last
