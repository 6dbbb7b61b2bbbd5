"""The run's secret key on its checkpoint volume: made once, read by restarts, destroyed at the end.

Whoever has the key can take the noise off the trained model. So the file is for the trainer's user
alone, its content is never logged, and it is overwritten before it is unlinked. Only a fingerprint
is journalled, of which nothing follows: with another key, a step that is drawn again would be a
second release.
"""

import hashlib
import os
import secrets
from pathlib import Path

from dpmoe_trainer.errors import JournalLost
from dpmoe_trainer.journal import Journal, sync_folder

KEY_FILE = "key"
KEY_BYTES = 32


def open_key(journal: Journal) -> bytes:
    """The run's key; a fresh one, if no step was drawn yet.

    Raises:
        JournalLost: steps were drawn, and the key that they were drawn with is not there.
        OSError: it cannot be read or written.
    """
    path = journal.folder / KEY_FILE
    named = journal.history.key
    if journal.history.drawn == 0:
        secret = _read(path)
        # A kill may have cut it off, and a loss of power may leave zeros of its length.
        if _fingerprint(secret) != named:
            journal.check_newest()
            path.unlink(missing_ok=True)
            secret = _create(path)
        journal.name_key(_fingerprint(secret))
        return secret
    secret = _read(path)
    if _fingerprint(secret) != named:
        state = "is not the run's" if path.exists() else "is missing"
        raise JournalLost(
            f"checkpoint.path: the secret key {path} {state}, so the {journal.history.drawn} steps "
            f"that were drawn cannot be drawn again alike, and count in full; apply the job anew"
        )
    return secret


def destroy_key(folder: Path) -> None:
    """Overwrites and removes the key, if it is there."""
    path = folder / KEY_FILE
    try:
        file = os.open(path, os.O_WRONLY)
    except FileNotFoundError:
        return
    try:
        os.write(file, secrets.token_bytes(KEY_BYTES))
        os.fsync(file)
    finally:
        os.close(file)
    path.unlink()
    sync_folder(folder)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _create(path: Path) -> bytes:
    secret = secrets.token_bytes(KEY_BYTES)
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        os.write(file, secret)
        os.fsync(file)
    finally:
        os.close(file)
    sync_folder(path.parent)
    return secret


def _fingerprint(secret: bytes) -> str:
    return hashlib.sha256(b"dpmoe key\n" + secret).hexdigest()
