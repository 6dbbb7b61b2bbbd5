"""The anchor: a copy of the log on a volume of its own, outside the cluster's storage.

The log's chain shows a changed entry, but not a log that was taken back as a whole, as a restored
backup is. The anchor does: every entry is copied to it, and forced to the disk, before what it
says takes effect. What holds:

- An entry is only added behind its predecessor: the copy is one chain, whoever writes it.
- A write that was cut short is cut off; it was not forced to the disk, so nothing rests on it.
- Lines that follow a checkpoint are in a file of their own. Entries that left the cluster for good
  stay here: the anchor is the archive too.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import IO, Any

from dpmoe_operator.ledger.entry import GENESIS, Unverified, digest_of, entry_name
from dpmoe_operator.ledger.fold import part_of

_TAIL_BYTES = 2 * 1024 * 1024
"""More than the longest line, so that the end of a file always holds a whole one."""

LOCK_SECONDS = 10.0
"""Writing takes milliseconds: who holds the lock for longer stands still or hangs on its volume."""


@dataclass(frozen=True)
class Head:
    """The last entry of a log; number −1 before the first one."""

    sequence: int
    digest: str


BEFORE_ALL = Head(-1, GENESIS)


class AnchorError(Unverified):
    """Log and anchor do not belong together, or the anchor cannot be read or written."""

    def __init__(self, reason: str, problem: str) -> None:
        self.reason = reason
        super().__init__(problem)


class Anchor:
    """The copy of one log in a folder. Several processes may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def head(self) -> Head | None:
        """The last entry that was copied; None where nothing was ever begun here.

        Raises:
            AnchorError: the folder cannot be read, or its last line makes no sense.
        """
        with self._errors("read"):
            segments = self._segments()
            for segment in reversed(segments):
                line = _last_line(segment)
                if line is not None:
                    spec = _parse(line, segment)["spec"]
                    return Head(spec["sequence"], spec["digest"])
            return BEFORE_ALL if segments else None

    def begin(self) -> None:
        """Begin the copy of a log that has no entry yet.

        Raises:
            AnchorError: the folder cannot be written.
        """
        with self._errors("write"), self._locked():
            if not self._segments():
                _write(self._segment(0), b"")

    def append(self, manifests: Sequence[Mapping[str, Any]]) -> None:
        """Copy entries behind the last one, and force them to the disk. Known ones are skipped.

        Raises:
            AnchorError: they do not follow what is here, or the volume refuses them.
        """
        with self._errors("write"), self._locked():
            head = self.head()
            if head is None:
                raise AnchorError("AnchorLost", f"{self.folder} holds no copy of the log any more")
            self._append(manifests, head)

    def replace(self, manifests: Sequence[Mapping[str, Any]], aside: str) -> None:
        """Begin anew with these entries; what was here is kept in the folder `aside`.

        Raises:
            AnchorError: the volume refuses.
        """
        with self._errors("write"), self._locked():
            if segments := self._segments():
                target = self.folder / aside
                target.mkdir(exist_ok=True)
                for segment in segments:
                    segment.rename(target / segment.name)
            first = manifests[0]["spec"]
            _write(self._segment(first["sequence"]), b"")
            self._append(manifests, Head(first["sequence"] - 1, first["previous"]))

    def entries(self, start: int = 0) -> Iterator[dict[str, Any]]:
        """The copies from an entry's number on, in order, checked to be one chain.

        Args:
            start: the first number; lower ones are skipped, in whole files where possible.

        Raises:
            AnchorError: a line is missing, changed or unreadable.
        """
        before: Head | None = None
        with self._errors("read"):
            segments = self._segments()
            ends = [_first_of(segment) for segment in segments[1:]]
            for segment, end in zip_longest(segments, ends):
                if end is not None and end <= start:
                    continue
                for line in _lines(segment):
                    manifest = _parse(line, segment)
                    before = _next(manifest, before, segment)
                    if before.sequence >= start:
                        yield manifest

    def first(self) -> int | None:
        """Number of the oldest entry that is kept here; None where there is none."""
        with self._errors("read"):
            segments = self._segments()
            return _first_of(segments[0]) if segments else None

    def _append(self, manifests: Sequence[Mapping[str, Any]], head: Head) -> None:
        self._check_known([m["spec"] for m in manifests if m["spec"]["sequence"] <= head.sequence])
        segment = self._segments()[-1]
        lines: list[bytes] = []
        for manifest in manifests:
            spec = manifest["spec"]
            if spec["sequence"] <= head.sequence:
                continue
            if spec["sequence"] != head.sequence + 1:
                raise AnchorError(
                    "AnchorBehind",
                    f"{self.folder} ends at {entry_name(head.sequence)} and cannot take in"
                    f" {entry_name(spec['sequence'])}: what is between is missing",
                )
            if spec["previous"] != head.digest:
                raise _forked(head)
            if part_of(manifest) == 1 and segment != self._segment(spec["sequence"]):
                _write(segment, b"".join(lines))
                segment, lines = self._segment(spec["sequence"]), []
            lines.append(_line(manifest))
            head = Head(spec["sequence"], spec["digest"])
        _write(segment, b"".join(lines))

    def _check_known(self, specs: Sequence[Mapping[str, Any]]) -> None:
        """Entries that were copied before must be these.

        The log alone does not show it: where an entry was archived and removed, its number is free
        again, and a writer that stood still since then could put another entry there.
        """
        if not specs:
            return
        copies = islice(self.entries(specs[0]["sequence"]), len(specs))
        here = {copy["spec"]["sequence"]: copy["spec"]["digest"] for copy in copies}
        for spec in specs:
            if here.get(spec["sequence"]) != spec["digest"]:
                raise _forked(Head(spec["sequence"], spec["digest"]))

    def _segments(self) -> list[Path]:
        names = sorted(os.listdir(self.folder))
        return [self.folder / n for n in names if n.startswith("log-") and n.endswith(".jsonl")]

    def _segment(self, sequence: int) -> Path:
        return self.folder / f"log-{sequence:012d}.jsonl"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as lock:
            deadline = time.monotonic() + LOCK_SECONDS
            while not _try_lock(lock):
                if time.monotonic() > deadline:
                    raise AnchorError(
                        "AnchorUnusable",
                        f"another process has held {lock.name} for {LOCK_SECONDS:g} s: an operator"
                        " that stands still must be ended, nothing is granted until then",
                    )
                time.sleep(0.05)
            yield

    @contextmanager
    def _errors(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise AnchorError(
                "AnchorUnusable",
                f"cannot {verb} the anchor in {self.folder}: {error.strerror or error};"
                " mend the volume, nothing is granted until then",
            ) from error


def _try_lock(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def follows(head: Head, manifests: Sequence[Mapping[str, Any]]) -> None:
    """Check that a log, or the end of one, goes on where the anchor's copy ends.

    Args:
        head: the anchor's last entry.
        manifests: entries of the log in order, without gaps; may be none.

    Raises:
        AnchorError: the log is behind the anchor, ahead of it by more than is known, or another.
    """
    first = manifests[0]["spec"]["sequence"] if manifests else 0
    last = first + len(manifests) - 1
    if head.sequence > last:
        end = f"ends at {entry_name(last)}" if manifests else "is empty"
        raise AnchorError(
            "RolledBack",
            f"the log {end}, but {entry_name(head.sequence)} was in it, as after a restored"
            " backup; run `dpmoe ledger recover` in the operator's pod",
        )
    if head.sequence < first - 1:
        raise AnchorError(
            "AnchorBehind",
            f"the anchor ends at {entry_name(head.sequence)} and the log begins at"
            f" {entry_name(first)}: what is between is missing; put the right volume in place, or"
            " accept the log as it is with `dpmoe ledger reanchor`",
        )
    if head.sequence == first - 1:
        known = manifests[0]["spec"]["previous"] if manifests else GENESIS
    else:
        known = manifests[head.sequence - first]["spec"]["digest"]
    if known != head.digest:
        raise _forked(head)


def _forked(head: Head) -> AnchorError:
    return AnchorError(
        "AnchorForked",
        f"log and anchor disagree about {entry_name(head.sequence)}: one of them was written anew"
        " or belongs to another cluster; find out which, and put the right one in place, or run"
        " `dpmoe ledger recover` in the operator's pod, which names the first such entry",
    )


def _line(manifest: Mapping[str, Any]) -> bytes:
    content = {"metadata": {"name": manifest["metadata"]["name"]}, "spec": manifest["spec"]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return text.encode(errors="surrogatepass") + b"\n"


def _parse(line: bytes, segment: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(line)
        sequence, digest = manifest["spec"]["sequence"], manifest["spec"]["digest"]
        if isinstance(sequence, int) and isinstance(digest, str):
            return dict(manifest)
    except (ValueError, KeyError, TypeError):
        pass
    raise AnchorError("AnchorDamaged", f"{segment} holds a line that is no entry of the log")


def _next(manifest: Mapping[str, Any], before: Head | None, segment: Path) -> Head:
    spec = manifest["spec"]
    head = Head(spec["sequence"], spec["digest"])
    name = entry_name(head.sequence)
    if digest_of(spec) != head.digest:
        raise AnchorError("AnchorDamaged", f"{segment}: {name} was changed")
    if before is not None and (head.sequence, spec.get("previous")) != (
        before.sequence + 1,
        before.digest,
    ):
        raise AnchorError(
            "AnchorDamaged", f"{segment}: {name} does not follow {entry_name(before.sequence)}"
        )
    return head


def _first_of(segment: Path) -> int:
    return int(segment.stem.removeprefix("log-"))


def _lines(segment: Path) -> Iterator[bytes]:
    with segment.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def _last_line(segment: Path) -> bytes | None:
    """The last whole line; None where there is none."""
    with segment.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read()
    whole = tail[: tail.rfind(b"\n") + 1]
    return whole[:-1].rsplit(b"\n", 1)[-1] if whole else None


def _write(segment: Path, content: bytes) -> None:
    """Put content behind the last whole line, and force it to the disk."""
    new = not segment.exists()
    with segment.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - _TAIL_BYTES)
        file.seek(start)
        file.truncate(start + file.read().rfind(b"\n") + 1)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if new:
        _force(segment.parent)


def _force(folder: Path) -> None:
    """Force new names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
