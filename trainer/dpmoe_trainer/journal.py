"""What a run drew, told to the checkpoint volume before it is drawn.

Steps that were drawn are spent, also those of a process that was killed before it could report
them. So rank 0 writes ahead: a file for each of its attempts, which only that attempt writes to. It
is made before anything heavy is imported, and a step's line is on the volume before its sample is
drawn. The steps drawn are the highest that any attempt journalled: a restart goes on from an older
checkpoint with the same key, so it draws the same samples and noise again, which tells no more.

Two live attempts must not both draw, and the one on a lost node may still live. Each looks for a
newer one after it has written a step's line and before it draws: whichever of two came second has
read the other's line, or the other sees it and stops (docs/design/checkpoints.md).

Nothing here imports torch.
"""

import errno
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpmoe_trainer.contract import Environment
from dpmoe_trainer.errors import BadCheckpoint, BadPlan, CheckpointFailed, JournalLost, PeerLost

MOST_ATTEMPTS = 64
"""As many as a report can name."""

RESERVE_BYTES = 2**16
"""Room for the first lines of attempts that find the volume full: a block for each."""

_BARRED = (PermissionError, FileExistsError, NotADirectoryError)
"""Of a folder that no trainer can have used, unless one is known that did."""

_RESERVE = "reserve"
_VERSION = 1
_FIELD = "checkpoint.path"


@dataclass
class History:
    """What all attempts of a run journalled.

    Attributes:
        attempts: uids of their pods, oldest first, each once.
        drawn: steps drawn, the highest of all attempts.
        key: fingerprint of the run's secret key, once there is one.
        rows: mark of the rows that the steps are drawn from, likewise.
        saving: whether the trained model began to be written to its target.
        completed: what the report said, once it was there.
    """

    attempts: list[str]
    drawn: int = 0
    key: str | None = None
    rows: str | None = None
    saving: bool = False
    completed: dict[str, Any] | None = None

    def take(self, record: Mapping[str, Any]) -> None:
        """Adds one record, which must be well-formed."""
        match record:
            case {"drawn": int(drawn)} if drawn >= 1:
                self.drawn = max(self.drawn, drawn)
            case {"key": str(key)}:
                self.key = key
            case {"rows": str(rows)}:
                self.rows = rows
            case {"saving": True}:
                self.saving = True
            case {"completed": dict(completed)}:
                self.completed = completed
            case _:
                raise ValueError(f"unknown record {sorted(record)}")


class Journal:
    """The journal of one attempt, open for its records.

    Attributes:
        folder: the checkpoint folder.
        attempt: this attempt's number, from 1.
        history: everything that was journalled, this attempt's records included.
    """

    def __init__(self, folder: Path, attempt: int, file: int, history: History) -> None:
        self.folder = folder
        self.attempt = attempt
        self.history = history
        self._file = file

    def draw(self, drawn: int) -> None:
        """Journals that `drawn` steps are drawn; to be called before the last of them is.

        Raises:
            PeerLost: a newer attempt of the run has begun; nothing may be drawn.
            CheckpointFailed: the record could not be written; nothing may be drawn.
        """
        self._append({"drawn": drawn})
        self.check_newest()

    def name_key(self, fingerprint: str) -> None:
        """Journals which secret key the run's steps are drawn with."""
        self._append({"key": fingerprint})

    def name_rows(self, mark: str) -> None:
        """Journals which rows the run's steps are drawn from, by a mark that tells nothing."""
        self._append({"rows": mark})

    def begin_saving(self) -> None:
        """Journals that from here on a model at the run's target may be its own."""
        self._append({"saving": True})
        self.check_newest()

    def complete(self, content: dict[str, Any]) -> None:
        """Journals what the report of the completed run says."""
        self.check_newest()
        self._append({"completed": content})
        with suppress(OSError):
            (self.folder / _RESERVE).unlink(missing_ok=True)

    def check_newest(self) -> None:
        """Makes sure that no newer attempt has begun.

        Raises:
            PeerLost: one has.
            CheckpointFailed: the folder cannot be read.
        """
        try:
            # Numbers have no gaps, so one name tells, and no stale listing can hide it.
            overtaken = is_there(self.folder / _name(self.attempt + 1))
            # Of a folder that is gone, no name tells anything.
            os.stat(self.folder / _name(self.attempt))
        except OSError as error:
            raise CheckpointFailed(
                f"{_FIELD}: {self.folder} cannot be read ({error.strerror}); check the volume, and "
                f"the run can go on from its last checkpoint"
            ) from error
        if overtaken:
            raise PeerLost(
                f"{_FIELD}: a newer attempt of this run has begun in {self.folder}; this one, "
                f"number {self.attempt}, stops without drawing"
            )

    def close(self) -> None:
        """Closes the attempt's file."""
        os.close(self._file)

    def _append(self, record: dict[str, Any]) -> None:
        try:
            _write(self._file, record)
        except OSError as error:
            raise _unusable(self.folder, error) from error
        self.history.take(record)


def open_journal(folder: Path, run_digest: str, pod_uid: str, failures: int) -> Journal:
    """Begins an attempt of a run; its history tells whether the run has completed already.

    Args:
        folder: the checkpoint folder; it is made if it is missing.
        run_digest: the run's name, `TrainingPlan.run_digest()`.
        pod_uid: of the pod of this attempt.
        failures: how many pods failed before this one.

    Raises:
        BadPlan: the folder cannot be written, and no attempt has.
        CheckpointFailed: it cannot be used any more, or nobody can tell; nothing may be drawn.
        JournalLost: the journal is missing where there must be one, or malformed.
        BadCheckpoint: it is another run's, or has more attempts than a report can name.
    """
    known: int | None = None  # attempts, as long as no listing fails
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = _attempts(folder)
        if not known:
            _require_first(folder, failures)
        history = read_history(folder, run_digest)
        if pod_uid not in history.attempts and len(history.attempts) >= MOST_ATTEMPTS:
            raise BadCheckpoint(
                f"{_FIELD}: {folder} tells of {len(history.attempts)} attempts of this run, as "
                f"many as a report can name; find out why they failed before another is started"
            )
        known, file = _begin(folder, run_digest, pod_uid)
        # Read anew: what an older attempt wrote before it could see this one counts.
        history = read_history(folder, run_digest)
    except OSError as error:
        barred = not failures and isinstance(error, _BARRED)
        if known == 0 or (known is None and barred):
            raise BadPlan(
                f"{_FIELD}: {str(folder)!r} cannot be written ({error.strerror}); name a folder "
                f"that the trainer's user may write to"
            ) from error
        raise _unusable(folder, error) from error
    journal = Journal(folder, known, file, history)
    if history.completed is None:
        _reserve(folder)
    return journal


def past_of(folder: Path, run_digest: str) -> History:
    """What was journalled so far; for ranks that do not write it, and may come before the first.

    Raises:
        JournalLost: the journal is malformed.
        BadCheckpoint: it is another run's.
    """
    return read_history(folder, run_digest) if folder.is_dir() else History([])


def _require_first(folder: Path, failures: int) -> None:
    """No attempt is journalled: then none may ever have been."""
    if failures:
        raise JournalLost(
            f"{_FIELD}: {failures} pods of this run failed before ({Environment.FAILURES}) and "
            f"{folder} has no journal of theirs, so what they drew is unknown and counts in full; "
            f"apply the job anew, on a volume that outlives its pods"
        )
    found = sorted(path.name for path in folder.iterdir())
    if found:
        raise JournalLost(
            f"{_FIELD}: {folder} holds {found[0]!r} and no journal, so what was drawn with it is "
            f"unknown; name an empty folder"
        )


def _attempts(folder: Path) -> int:
    """The number of the newest attempt, 0 if there is none."""
    numbers = [_number(name) for name in os.listdir(folder)]
    return max((number for number in numbers if number is not None), default=0)


def _name(attempt: int) -> str:
    return f"attempt-{attempt:04d}.journal"


def _number(name: str) -> int | None:
    number = name.removeprefix("attempt-").removesuffix(".journal")
    return int(number) if number.isdecimal() and name == _name(int(number)) else None


def _begin(folder: Path, run_digest: str, pod_uid: str) -> tuple[int, int]:
    """Takes the next attempt's number, which no other process can have, and journals its pod."""
    attempt = _attempts(folder) + 1
    while True:
        try:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND
            file = os.open(folder / _name(attempt), flags, 0o644)
        except FileExistsError:
            attempt += 1
            continue
        first = {"version": _VERSION, "run": run_digest, "attempt": pod_uid}
        try:
            _write(file, first)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # An attempt that is not in the journal is one that nobody counts.
            (folder / _RESERVE).unlink(missing_ok=True)
            os.ftruncate(file, 0)
            _write(file, first)
        sync_folder(folder)
        return attempt, file


def _reserve(folder: Path) -> None:
    """Keeps some room for later attempts, where there is any."""
    path = folder / _RESERVE
    if path.exists():
        return
    try:
        path.write_bytes(bytes(RESERVE_BYTES))
    except OSError:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _unusable(folder: Path, error: OSError) -> CheckpointFailed:
    return CheckpointFailed(
        f"{_FIELD}: the journal in {folder} cannot be written or read ({error.strerror}); check "
        f"the volume, or make room there, and the run can go on from its last checkpoint"
    )


def _write(file: int, record: dict[str, Any]) -> None:
    """Appends one line, and returns when it is on the disk."""
    line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
    while line:
        line = line[os.write(file, line) :]
    os.fsync(file)


def is_there(path: Path) -> bool:
    """Whether a name is taken; `Path.exists` also says no where nobody can know.

    Raises:
        OSError: it cannot be told.
    """
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Brings a folder's names to the disk."""
    _sync(folder, os.O_DIRECTORY)


def sync_file(file: Path) -> None:
    """Brings a file's content to the disk."""
    _sync(file)


def _sync(path: Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_history(folder: Path, run_digest: str) -> History:
    """What all attempts journalled.

    Raises:
        JournalLost: an attempt's file is missing or malformed.
        BadCheckpoint: the journal is another run's.
    """
    history = History([])
    for attempt in range(1, _attempts(folder) + 1):
        path = folder / _name(attempt)
        try:
            _read_attempt(path, run_digest, history)
        except FileNotFoundError as error:
            raise JournalLost(f"{_FIELD}: {path} is missing, {_UNKNOWN}") from error
        except ValueError as error:
            raise JournalLost(f"{_FIELD}: {path} is malformed ({error}), {_UNKNOWN}") from error
    return history


_UNKNOWN = "so what the run drew is unknown and counts in full; apply the job anew"


def _read_attempt(path: Path, run_digest: str, history: History) -> None:
    # What follows the last line feed was cut off by a kill: it was never acted upon.
    *lines, _ = path.read_bytes().split(b"\n")
    if not lines:
        return
    match json.loads(lines[0]):
        case {"version": 1, "run": str(run), "attempt": str(uid)}:
            pass
        case _:
            raise ValueError("line 1 does not name a run and an attempt")
    if run != run_digest:
        raise BadCheckpoint(
            f"{_FIELD}: {path.parent} is the folder of run {run}, and this plan's is {run_digest}; "
            f"name a folder of this run's own, or remove that run's if it is over"
        )
    if uid not in history.attempts:
        history.attempts.append(uid)
    for number, line in enumerate(lines[1:], start=2):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("no record")
            history.take(record)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
