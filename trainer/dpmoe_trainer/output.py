"""Puts the trained model where the plan says: whole, or not at all.

The model is written to a staging folder and then moved file by file, `config.json` last. A folder
without that file does not load, on a volume as in an object store, so a run that is killed while
it saves leaves nothing that looks like a model. What `save` returned for outlives a loss of power:
the run's key and checkpoints are destroyed then. Whether a target can be written is tried before
any data is touched: a run that cannot keep its model should cost no privacy.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import fsspec

from dpmoe_trainer.contract import OutputPlan
from dpmoe_trainer.environment import Settings
from dpmoe_trainer.errors import BadPlan, SavingFailed
from dpmoe_trainer.journal import is_there, sync_file, sync_folder

LAST_FILE = "config.json"
"""The file that `transformers` looks for first; it arrives last."""

_STAGING = ".partial-"

SPARE_BYTES = 16 * 2**20
"""Room beyond the parameters: tokenizer, configuration, report."""


class Target(Protocol):
    """A place for one model."""

    name: str
    """The place as the report names it."""

    def check(self) -> None:
        """Tries to write there, and refuses a place that already holds another's model."""

    def holds_model(self) -> bool:
        """Whether a whole model is there."""

    def check_room(self, size: int) -> None:
        """Refuses a place with too little room for a model of `size` bytes, where one can ask."""

    def save(self, write: Callable[[Path], None], size: int) -> None:
        """Lets `write` fill a staging folder, and moves its files to the place, to stay there."""


def open_target(plan: OutputPlan | None, settings: Settings, again: bool = False) -> Target | None:
    """The run's target, checked (see `Target.check`).

    Args:
        plan: the plan's output.
        settings: may name a folder in its place.
        again: this run had begun to save: a model there is its own, to be written over.

    Raises:
        BadPlan: the target cannot be written, or already holds a model.
    """
    target = target_of(plan, settings, again)
    if target is not None:
        target.check()
    return target


def target_of(plan: OutputPlan | None, settings: Settings, again: bool = False) -> Target | None:
    """The command line's folder, else the plan's output, else none."""
    if settings.output is not None:
        return FolderTarget(settings.output, str(settings.output), "--output", again)
    if plan is None:
        return None
    if plan.path is not None:
        folder = settings.resolve(plan.path, "output.path")
        return FolderTarget(folder, plan.path, "output.path", again)
    assert plan.uri is not None, "the contract sets exactly one of path and uri"
    return UriTarget(plan.uri, again)


class FolderTarget:
    """A folder, on a mounted volume or a workstation."""

    def __init__(self, folder: Path, name: str, field: str, again: bool = False) -> None:
        self.folder = folder
        self.name = name
        self._field = field
        self._again = again

    def check(self) -> None:
        """See `Target`."""
        try:
            _make(self.folder)
            for abandoned in self.folder.glob(f"{_STAGING}*") if self._again else ():
                shutil.rmtree(abandoned, ignore_errors=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise BadPlan(
                f"{self._field}: {self.name!r} cannot be written ({error.strerror}); name a "
                f"folder that the trainer's user may write to"
            ) from error
        if not self._again and self.holds_model():
            raise BadPlan(
                f"{self._field}: {self.name!r} already holds a model; name another folder, or "
                f"move that model away"
            )

    def holds_model(self) -> bool:
        """See `Target`."""
        return is_there(self.folder / LAST_FILE)

    def check_room(self, size: int) -> None:
        """See `Target`."""
        free = self._free() + sum(file.stat().st_size for file in self._own())
        if free < size + SPARE_BYTES:
            raise BadPlan(
                f"{self._field}: {self.name!r} has {_megabytes(free)} free and the model needs "
                f"{_megabytes(size + SPARE_BYTES)}; make room, or name another volume"
            )

    def save(self, write: Callable[[Path], None], size: int) -> None:
        """See `Target`; staging lies inside the folder, so that each move is a rename."""
        try:
            if self._free() < size + SPARE_BYTES:
                for file in self._own():
                    file.unlink()
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=_STAGING) as staging:
                write(Path(staging))
                names = _files(Path(staging))
                for name in names:
                    (self.folder / name).parent.mkdir(exist_ok=True)
                    # Some writers make files for their owner's eyes only; this one is released.
                    os.chmod(staging / name, 0o644)
                    sync_file(staging / name)
                    os.replace(staging / name, self.folder / name)
            _sync_names({self.folder, *((self.folder / name).parent for name in names)})
        except Exception as error:
            free = self._free()
            raise SavingFailed(
                f"{self._field}: the model could not be saved to {self.name!r} "
                f"({_reason(error)}); it needs {_megabytes(size)} and {_megabytes(free)} are free "
                f"there: make room and run the job again, which pays its privacy again unless it "
                f"goes on from a checkpoint"
            ) from error

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _own(self) -> list[Path]:
        """What this run saved before and may take back: `LAST_FILE`, and what takes the room."""
        if not self._again:
            return []
        last = self.folder / LAST_FILE
        return [*([last] if last.exists() else []), *self.folder.glob("model*.safetensors")]


class UriTarget:
    """A prefix of an object store, through the `fsspec` driver of its scheme."""

    def __init__(self, uri: str, again: bool = False) -> None:
        self.name = uri
        self._again = again
        self._prefix = uri.rstrip("/")

    def check(self) -> None:
        """See `Target`."""
        scheme, separator, rest = self.name.partition("://")
        if not separator or not rest or "::" in self.name or scheme in ("file", "local"):
            raise BadPlan(
                f"output.uri: {self.name!r} is not the URI of a store; write "
                f"scheme://bucket/prefix, and use output.path for a folder"
            )
        try:
            fsspec.get_filesystem_class(scheme)
        except (ImportError, ValueError) as error:
            raise BadPlan(
                f"output.uri: no driver for scheme {scheme!r} of {self.name!r} is installed; add "
                f"its fsspec driver to the trainer image (s3: s3fs, gs: gcsfs, abfs: adlfs), or "
                f"use output.path"
            ) from error
        try:
            store, path = fsspec.core.url_to_fs(self._prefix)
            store.makedirs(path, exist_ok=True)
            probe = f"{path}/.write-check"
            store.pipe_file(probe, b"")
            with suppress(Exception):  # a store that forbids deletion may keep the empty file
                store.rm_file(probe)
            taken = not self._again and self.holds_model()
        except Exception as error:
            raise BadPlan(
                f"output.uri: {self.name!r} cannot be written ({_reason(error)}); check the "
                f"bucket, and the credentials that the owner gave to trainer pods"
            ) from error
        if taken:
            raise BadPlan(f"output.uri: {self.name!r} already holds a model; name another prefix")

    def holds_model(self) -> bool:
        """See `Target`."""
        store, path = fsspec.core.url_to_fs(self._prefix)
        return bool(store.exists(f"{path}/{LAST_FILE}"))

    def check_room(self, size: int) -> None:
        """See `Target`; object stores have no notion of it."""

    def save(self, write: Callable[[Path], None], size: int) -> None:
        """See `Target`; staging is a private temporary folder on this machine."""
        try:
            store, path = fsspec.core.url_to_fs(self._prefix)
            with tempfile.TemporaryDirectory(prefix="dpmoe-model-") as staging:
                write(Path(staging))
                for name in _files(Path(staging)):
                    store.put_file(str(staging / name), f"{path}/{name.as_posix()}")
        except Exception as error:
            raise SavingFailed(
                f"output.uri: the model ({_megabytes(size)}) could not be saved to {self.name!r} "
                f"({_reason(error)}); check the bucket and run the job again, which pays its "
                f"privacy again unless it goes on from a checkpoint"
            ) from error


def _make(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, to stay."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    _sync_names({each.parent for each in new})


def _sync_names(folders: Iterable[Path]) -> None:
    """Brings the names in folders to the disk, where the volume knows how."""
    for folder in folders:
        try:
            sync_folder(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # as SMB shares say
                raise


def _files(folder: Path) -> list[Path]:
    """The names of all files below the folder, `LAST_FILE` at the end."""
    names = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    return sorted(names, key=lambda name: (name == Path(LAST_FILE), name))


def _reason(error: Exception) -> str:
    """The system's own words for an error, else the error's type: nothing from a foreign text."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return type(error).__name__


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
