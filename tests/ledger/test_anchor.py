"""The anchor: one chain, forced to the disk, that shows when the log was taken back."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.builders import Object, commit, granted, opened

from dpmoe_operator.ledger import anchor as module
from dpmoe_operator.ledger.anchor import BEFORE_ALL, Anchor, AnchorError, Head, follows
from dpmoe_operator.ledger.checkpoint import checkpoint_records
from dpmoe_operator.ledger.fold import LedgerState


def log_of(count: int, *, checkpoint_at: int | None = None) -> list[Object]:
    """A log of `count` entries; at one of them a checkpoint begins."""
    state, manifests = LedgerState(), []
    for number in range(count):
        if number == checkpoint_at:
            [record] = checkpoint_records(state.contents())
            manifests.append(commit(state, record))
        elif number == 0:
            manifests.append(commit(state, opened("a", (1000,))))
        else:
            manifests.append(commit(state, granted(f"job-{number}", {"a": (1,)})))
    return manifests


LOG = log_of(7, checkpoint_at=4)


def head_of(manifest: Object) -> Head:
    return Head(manifest["spec"]["sequence"], manifest["spec"]["digest"])


@pytest.fixture
def anchor(tmp_path: Path) -> Anchor:
    """An anchor of a log without entries."""
    result = Anchor(tmp_path)
    result.begin()
    return result


def reason(error: pytest.ExceptionInfo[AnchorError]) -> str:
    return error.value.reason


def test_nothing_was_begun(tmp_path: Path) -> None:
    assert Anchor(tmp_path).head() is None
    assert list(Anchor(tmp_path).entries()) == []
    with pytest.raises(AnchorError) as error:
        Anchor(tmp_path).append(LOG)
    assert reason(error) == "AnchorLost"


def test_entries_come_back_as_they_were(anchor: Anchor) -> None:
    assert anchor.head() == BEFORE_ALL
    anchor.append(LOG[:2])
    anchor.append(LOG[2:])
    assert anchor.head() == head_of(LOG[-1])
    assert [m["spec"] for m in anchor.entries()] == [m["spec"] for m in LOG]
    assert [m["spec"]["sequence"] for m in anchor.entries(5)] == [5, 6]


def test_known_entries_are_skipped(anchor: Anchor) -> None:
    """Two operators may copy the same entries, in any portions."""
    other = Anchor(anchor.folder)
    anchor.append(LOG[:4])
    other.append(LOG[:3])
    other.append(LOG[2:6])
    anchor.append(LOG[3:])
    assert [m["spec"]["sequence"] for m in anchor.entries()] == list(range(7))


def test_a_file_begins_at_each_checkpoint(anchor: Anchor) -> None:
    anchor.append(LOG)
    names = sorted(name for name in os.listdir(anchor.folder) if name.startswith("log-"))
    assert names == ["log-000000000000.jsonl", "log-000000000004.jsonl"]
    assert anchor.first() == 0


@pytest.mark.parametrize("kept", [0, 1, 30, -1])
def test_a_write_cut_short_is_cut_off(anchor: Anchor, kept: int) -> None:
    """As after a power failure in the midst of a write: it was not forced to the disk."""
    anchor.append(LOG[:2])
    [segment] = anchor.folder.glob("log-*.jsonl")
    whole = segment.read_bytes()
    anchor.append(LOG[2:3])
    line = segment.read_bytes()[len(whole) :]
    segment.write_bytes(whole + line[:kept])
    assert anchor.head() == head_of(LOG[1])
    anchor.append(LOG[2:])
    assert [m["spec"]["sequence"] for m in anchor.entries()] == list(range(7))


def test_new_file_without_a_whole_line(anchor: Anchor) -> None:
    anchor.append(LOG[:4])
    (anchor.folder / "log-000000000004.jsonl").write_bytes(b'{"metadata"')
    assert anchor.head() == head_of(LOG[3])
    anchor.append(LOG[4:])
    assert [m["spec"]["sequence"] for m in anchor.entries()] == list(range(7))


def test_gaps_and_other_logs_are_refused(anchor: Anchor) -> None:
    anchor.append(LOG[:2])
    with pytest.raises(AnchorError) as error:
        anchor.append(LOG[3:])
    assert reason(error) == "AnchorBehind"
    other = log_of(1)
    state = LedgerState()
    state.apply(other[0])
    other.append(commit(state, granted("somebody", {"a": (1,)})))
    other.append(commit(state, granted("else", {"a": (1,)})))
    for manifests in (other[1:], other[2:]):
        with pytest.raises(AnchorError) as error:
            anchor.append(manifests)
        assert reason(error) == "AnchorForked"
    assert anchor.head() == head_of(LOG[1])


def changed(line: bytes) -> bytes:
    manifest = json.loads(line)
    manifest["spec"]["writer"] = "somebody"
    return json.dumps(manifest).encode() + b"\n"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda lines: [lines[0], changed(lines[1]), *lines[2:]], "entry-000000000001 was changed"),
        (lambda lines: [lines[0], *lines[2:]], "entry-000000000002 does not follow"),
        (lambda lines: [lines[0], b"{}\n", *lines[2:]], "no entry of the log"),
        (lambda lines: [lines[0], b"\xff\n", *lines[2:]], "no entry of the log"),
    ],
)
def test_damage_is_found(anchor: Anchor, damage: Any, problem: str) -> None:
    anchor.append(LOG)
    segment = anchor.folder / "log-000000000000.jsonl"
    segment.write_bytes(b"".join(damage(segment.read_bytes().splitlines(keepends=True))))
    with pytest.raises(AnchorError, match=problem) as error:
        list(anchor.entries())
    assert reason(error) == "AnchorDamaged"


def test_missing_file_is_found(anchor: Anchor) -> None:
    anchor.append(LOG)
    (anchor.folder / "log-000000000000.jsonl").unlink()
    assert anchor.first() == 4
    longer = log_of(10, checkpoint_at=8)
    anchor.replace(longer, "aside")
    (anchor.folder / "log-000000000008.jsonl").write_bytes(
        (anchor.folder / "aside" / "log-000000000004.jsonl").read_bytes()
    )
    with pytest.raises(AnchorError, match="does not follow"):
        list(anchor.entries())


def test_a_volume_that_is_not_there(tmp_path: Path) -> None:
    for use in (Anchor.head, Anchor.begin, lambda anchor: anchor.append(LOG)):
        with pytest.raises(AnchorError, match="mend the volume") as error:
            use(Anchor(tmp_path / "none"))
        assert reason(error) == "AnchorUnusable"


def test_another_operator_that_stands_still_in_the_midst_of_a_write(
    anchor: Anchor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock is not waited for without a word."""
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    with (anchor.folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(AnchorError, match="must be ended") as error:
            anchor.append(LOG)
    assert reason(error) == "AnchorUnusable"
    anchor.append(LOG)


def test_full_disk(anchor: Anchor, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AnchorError, match="No space left on device") as error:
        anchor.append(LOG)
    assert reason(error) == "AnchorUnusable"


def test_replaced_copies_are_kept_aside(anchor: Anchor) -> None:
    anchor.append(LOG[:3])
    anchor.replace(LOG[4:], "replaced")
    assert anchor.first() == 4
    assert anchor.head() == head_of(LOG[-1])
    assert [m["spec"]["sequence"] for m in Anchor(anchor.folder / "replaced").entries()] == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize(
    ("head", "log", "expected"),
    [
        (BEFORE_ALL, [], None),
        (BEFORE_ALL, LOG, None),
        (head_of(LOG[2]), LOG, None),
        (head_of(LOG[-1]), LOG, None),
        (head_of(LOG[3]), LOG[4:], None),
        (head_of(LOG[2]), [], "RolledBack"),
        (head_of(LOG[2]), LOG[:2], "RolledBack"),
        (head_of(LOG[2]), LOG[4:], "AnchorBehind"),
        (Head(2, "0" * 64), LOG, "AnchorForked"),
        (Head(3, "0" * 64), LOG[4:], "AnchorForked"),
    ],
)
def test_whether_a_log_goes_on_where_the_anchor_ends(
    head: Head, log: list[Object], expected: str | None
) -> None:
    if expected is None:
        follows(head, log)
        return
    with pytest.raises(AnchorError) as error:
        follows(head, log)
    assert reason(error) == expected
