"""The journal alone: what it remembers, what it refuses, and who may go on writing."""

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dpmoe_trainer.errors import BadCheckpoint, BadPlan, CheckpointFailed, JournalLost, PeerLost
from dpmoe_trainer.journal import MOST_ATTEMPTS, RESERVE_BYTES, Journal, open_journal
from dpmoe_trainer.secret import KEY_FILE, destroy_key, open_key

RUN, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def begin(folder: Path, pod: str = "pod", failures: int = 0) -> Journal:
    return open_journal(folder, RUN, pod, failures)


def test_steps_of_all_attempts_count_once_and_pods_are_named_once(folder: Path) -> None:
    first = begin(folder, "pod-a")
    for drawn in (1, 2, 3):
        first.draw(drawn)
    second = begin(folder, "pod-b", failures=1)
    assert second.history.drawn == 3
    second.draw(2)
    assert second.history.drawn == 3
    second.draw(4)
    # The container of the same pod was started again.
    third = begin(folder, "pod-b", failures=1)
    assert (third.history.attempts, third.history.drawn) == (["pod-a", "pod-b"], 4)


def test_an_attempt_is_in_the_journal_at_once_and_a_step_before_it_is_drawn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}"))
    )
    journal = begin(folder)
    assert synced == [str(folder / "attempt-0001.journal"), str(folder)]
    journal.draw(1)
    assert synced[2:] == [str(folder / "attempt-0001.journal")]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_that_a_kill_cut_off_is_as_if_never_written(folder: Path, cut: int) -> None:
    journal = begin(folder, "pod-a")
    journal.draw(1)
    journal.draw(2)
    path = folder / "attempt-0001.journal"
    os.truncate(path, path.stat().st_size - cut)
    assert begin(folder, "pod-b", 1).history.drawn == 1


def test_a_pod_killed_before_its_first_line_did_nothing(folder: Path) -> None:
    begin(folder, "pod-a")
    os.truncate(folder / "attempt-0001.journal", 9)
    later = begin(folder, "pod-b", 1)
    assert (later.attempt, later.history.attempts) == (2, ["pod-b"])


MALFORMED: dict[str, Callable[[bytes], bytes]] = {
    "a line of garbage": lambda content: content + b"garbage\n",
    "no record": lambda content: content + b"3\n",
    "an unknown record": lambda content: content + b'{"drew":1}\n',
    "no number": lambda content: content + b'{"drawn":"1"}\n',
    "a number below one": lambda content: content + b'{"drawn":0}\n',
    "half a line in the middle": lambda content: content + b'{"dra\n{"drawn":1}\n',
    "an empty line": lambda content: content + b"\n",
    "another version": lambda content: content.replace(b'"version":1', b'"version":2'),
    "no first line": lambda content: b'{"drawn":1}\n',
    "zeros": lambda content: b"\0" * len(content) + b"\n",
    "not text": lambda content: content + b"\xff\xfe\n",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_no_kill_leaves_is_a_lost_journal(folder: Path, case: str) -> None:
    begin(folder)
    path = folder / "attempt-0001.journal"
    path.write_bytes(MALFORMED[case](path.read_bytes()))
    with pytest.raises(
        JournalLost, match=r"attempt-0001.journal is malformed .*apply the job anew"
    ):
        begin(folder, failures=1)


def test_a_missing_attempt_is_a_lost_journal(folder: Path) -> None:
    begin(folder, "a")
    begin(folder, "b", 1)
    (folder / "attempt-0001.journal").unlink()
    with pytest.raises(JournalLost, match=r"attempt-0001.journal is missing"):
        begin(folder, "c", 2)


def test_pods_that_failed_before_must_have_left_a_journal(folder: Path) -> None:
    with pytest.raises(JournalLost, match=r"3 pods .* failed before \(DPMOE_FAILURES\)"):
        begin(folder, failures=3)
    assert begin(folder).attempt == 1


def test_a_folder_with_anything_else_is_refused(folder: Path) -> None:
    folder.mkdir()
    (folder / KEY_FILE).write_bytes(b"k" * 32)
    with pytest.raises(JournalLost, match=r"holds 'key' and no journal"):
        begin(folder)


def test_another_run_is_named(folder: Path) -> None:
    begin(folder)
    with pytest.raises(BadCheckpoint) as caught:
        open_journal(folder, OTHER, "pod", 0)
    for word in ("checkpoint.path", RUN, OTHER, "name a folder"):
        assert word in str(caught.value)


def test_more_attempts_than_a_report_can_name(folder: Path) -> None:
    for number in range(MOST_ATTEMPTS):
        begin(folder, f"pod-{number}").close()
    with pytest.raises(BadCheckpoint, match="64 attempts"):
        begin(folder, "one more")
    assert len(begin(folder, "pod-3").history.attempts) == MOST_ATTEMPTS


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadPlan, match=r"checkpoint.path: .* cannot be written \(Not a directory\)"):
        begin(tmp_path / "file" / "run")


def broken(error: OSError) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_listing_that_fails_does_not_say_that_nobody_was_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(folder).draw(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", broken(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(CheckpointFailed, match=r"Input/output error.* can go on"):
            begin(folder)
    assert begin(folder).history.drawn == 1


@pytest.mark.parametrize(("failures", "kind"), [(0, BadPlan), (1, CheckpointFailed)])
def test_a_folder_of_other_users_was_nobodys_unless_pods_were_here(
    failures: int, kind: type[Exception], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(folder)
    monkeypatch.setattr(os, "listdir", broken(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(kind, match="Permission denied"):
        begin(folder, failures=failures)


def test_an_attempt_that_cannot_read_the_others_anew_draws_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []
    read = Path.read_bytes

    def once(path: Path) -> bytes:
        reads.append(path)
        if len(reads) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    begin(folder).draw(1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", once)
        with pytest.raises(CheckpointFailed, match="Input/output error"):
            begin(folder)
    assert begin(folder).attempt == 3


def test_the_older_of_two_live_attempts_stops_and_its_last_line_counts(folder: Path) -> None:
    older = begin(folder, "a")
    older.draw(1)
    newer = begin(folder, "b")
    with pytest.raises(PeerLost, match="a newer attempt of this run has begun"):
        older.draw(2)
    for act in (older.begin_saving, lambda: older.complete({})):
        with pytest.raises(PeerLost):
            act()
    newer.draw(2)
    assert json.loads((folder / "attempt-0002.journal").read_text().split("\n")[1]) == {"drawn": 2}


def test_a_folder_that_vanished_shows_no_newer_attempt_and_none_is_drawn(
    folder: Path, tmp_path: Path
) -> None:
    older = begin(folder, "a")
    older.draw(1)
    folder.rename(tmp_path / "elsewhere")
    for act in (lambda: older.draw(2), older.begin_saving, lambda: older.complete({})):
        with pytest.raises(CheckpointFailed, match=r"cannot be read \(No such file or directory\)"):
            act()


def test_a_folder_that_cannot_be_asked_shows_no_newer_attempt_either(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = begin(folder, "a")

    def fail(path: object, **options: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(CheckpointFailed, match="Stale file handle"):
        older.draw(1)


def test_attempts_that_begin_at_once_have_numbers_of_their_own(folder: Path) -> None:
    opened: list[Journal] = []
    threads = [
        threading.Thread(target=lambda pod: opened.append(begin(folder, pod)), args=(f"p{n}",))
        for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(journal.attempt for journal in opened) == list(range(1, 13))
    drew = 0
    for journal in opened:
        try:
            journal.draw(1)
            drew += 1
        except PeerLost:
            pass
    assert drew == 1


def test_whoever_draws_is_counted_by_whoever_begins_later(folder: Path) -> None:
    """Two attempts race, over and over: a draw that was allowed is in what the newer one read."""
    for _ in range(40):
        older = begin(folder, "pod")
        drawn = older.history.drawn
        allowed = drawn

        def go_on(older: Journal = older, drawn: int = drawn) -> None:
            nonlocal allowed
            for step in range(drawn + 1, drawn + 50):
                try:
                    older.draw(step)
                except PeerLost:
                    return
                allowed = step

        thread = threading.Thread(target=go_on)
        thread.start()
        newer = begin(folder, "pod")
        thread.join()
        assert newer.history.drawn >= allowed
        older.close()
        newer.close()


def test_a_full_volume_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = begin(folder)

    def full(file: int, line: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CheckpointFailed, match=r"No space left on device.*make room"):
        journal.draw(1)
    assert journal.history.drawn == 0


def test_attempts_on_a_full_volume_are_journalled_and_the_run_may_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full volume has room for a line again once the reserve is gone."""
    begin(folder, "pod-a").draw(1)
    reserve, write = folder / "reserve", os.write
    assert reserve.stat().st_size == RESERVE_BYTES

    def full(file: int, line: bytes) -> int:
        if reserve.exists():
            write(file, line[:7])
            raise OSError(28, "No space left on device")
        return write(file, line)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert begin(folder, "pod-b", failures=1).history.attempts == ["pod-a", "pod-b"]
    third = begin(folder, "pod-c", failures=2)
    assert (third.history.attempts, third.history.drawn) == (["pod-a", "pod-b", "pod-c"], 1)
    assert reserve.exists(), "kept anew, once there is room"
    third.complete({})
    assert not reserve.exists()


def test_a_volume_without_room_for_a_line_refuses_the_attempt_and_not_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, line: bytes) -> int:
        raise OSError(28, "No space left on device")

    begin(folder, "pod-a").draw(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(CheckpointFailed, match="make room there, and the run can go on"):
            begin(folder, "pod-b", failures=1)
    assert begin(folder, "pod-c", failures=2).history.attempts == ["pod-a", "pod-c"]


def test_a_key_is_made_once_and_read_again(folder: Path) -> None:
    first = begin(folder)
    key = open_key(first)
    assert len(key) == 32
    assert (folder / KEY_FILE).stat().st_mode & 0o777 == 0o600
    first.draw(1)
    assert open_key(begin(folder, failures=1)) == key


@pytest.mark.parametrize("left", [b"", b"half", bytes(32)])
@pytest.mark.parametrize("named", [False, True])
def test_a_key_that_is_not_as_it_was_made_is_made_anew_while_nothing_was_drawn(
    folder: Path, left: bytes, named: bool
) -> None:
    first = begin(folder)
    lost = open_key(first) if named else b""
    (folder / KEY_FILE).write_bytes(left)
    second = begin(folder, failures=1)
    key = open_key(second)
    assert len(key) == 32
    assert key not in (left, lost)
    second.draw(1)
    assert open_key(begin(folder, failures=2)) == key


def test_a_key_that_is_whole_stays_while_nothing_was_drawn(folder: Path) -> None:
    key = open_key(begin(folder))
    assert open_key(begin(folder, failures=1)) == key


@pytest.mark.parametrize("left", [None, b"", b"k" * 32])
def test_no_other_key_for_steps_that_were_drawn(folder: Path, left: bytes | None) -> None:
    first = begin(folder)
    open_key(first)
    first.draw(1)
    (folder / KEY_FILE).unlink()
    if left is not None:
        (folder / KEY_FILE).write_bytes(left)
    with pytest.raises(JournalLost, match=r"the secret key .*the 1 steps that were drawn"):
        open_key(begin(folder, failures=1))


def test_a_destroyed_key_is_overwritten_first(folder: Path) -> None:
    key = open_key(begin(folder))
    with (folder / KEY_FILE).open("rb") as held:
        destroy_key(folder)
        assert not (folder / KEY_FILE).exists()
        assert held.read() != key
    destroy_key(folder)
