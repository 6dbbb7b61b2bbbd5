"""One copy of the tables in each pod: one rank reads, the others map what it wrote."""

import errno
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import write_rows
from tests.trainer.processes import run_ranks
from tests.trainer.test_data_units import block

from dpmoe_trainer.contract import BlockPlan
from dpmoe_trainer.data import once
from dpmoe_trainer.data.once import read_once
from dpmoe_trainer.data.scratch import OpenFile
from dpmoe_trainer.data.tables import Table
from dpmoe_trainer.data.units import Units, load_units
from dpmoe_trainer.errors import BadData, PeerLost
from dpmoe_trainer.parallel.ranks import ALONE, Ranks

Blocks = tuple[BlockPlan, ...]

SECRET = "zebrafish"


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def blocks(tmp_path: Path) -> Blocks:
    """One of 2,500 texts of 40 users, and one of lists of token ids."""
    rows = [{"text": f"{SECRET} {n}", "label": n % 2, "user": f"u{n % 40}"} for n in range(2500)]
    texts = block(write_rows(tmp_path / "texts", rows), kind="user", column="user")
    ids = block(write_rows(tmp_path / "ids", [{"ids": [n, 5], "label": 1} for n in (7, 8)]))
    data = ids.data.model_copy(update={"text_column": None, "tokens_column": "ids"})
    return texts, ids.model_copy(update={"data": data})


def all_of(table: Table, units: Units) -> dict[str, Any]:
    """Everything that a rank knows of its rows."""
    texts, ids = table.content.columns
    assert table.labels is not None
    return {
        "texts": texts.texts(range(len(texts))),
        "ids": [each.tolist() for each in ids.ids(range(len(ids)))],
        "sizes": [*texts.sizes.tolist(), *ids.sizes.tolist()],
        "labels": table.labels.tolist(),
        "units": list(units),
        "digests": [texts.digest(), ids.digest(), units.digest()],
    }


def mapped(folder: Path) -> set[str]:
    """The inodes of the files of a folder that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if f"{folder}/" in line}


def read_together(ranks: Ranks, blocks: Blocks, scratch: Path) -> tuple[Any, ...]:
    calls, told = [], []
    tell_all = once.tell_all
    once.tell_all = lambda word: told.append(word) or tell_all(word)  # type: ignore[func-returns-value]

    def read(beat: Any) -> tuple[Table, Units]:
        calls.append(ranks.rank)
        return load_units(blocks, labels=2, vocabulary=9, beat=beat)

    table, units = read_once(read, ranks)
    assert not list(scratch.glob("dpmoe-*")), "they have no names"
    return calls, mapped(scratch), all_of(table, units), told


def test_the_ranks_of_a_pod_map_one_copy(blocks: Blocks, scratch: Path) -> None:
    found = run_ranks(4, read_together, blocks, scratch, pod=2)
    assert [calls for calls, *_ in found] == [[0], [], [2], []]
    files = [maps for _, maps, *_ in found]
    assert files[0] == files[1]
    assert files[2] == files[3]
    assert [len(maps) for maps in files] == [2] * 4, "one for each block"
    assert not files[0] & files[2], "pods share nothing"
    alone = all_of(*read_once(lambda beat: load_units(blocks, 2, 9, beat), ALONE))
    assert [everything for *_, everything, _ in found] == [alone] * 4


def test_no_rows_leave_the_pod(blocks: Blocks, scratch: Path) -> None:
    for *_, told in run_ranks(4, read_together, blocks, scratch, pod=2):
        [(problem, file)] = told
        assert problem is None
        assert isinstance(file, OpenFile)
        assert len(pickle.dumps(file)) < 200


def read_after_the_reader(ranks: Ranks, blocks: Blocks) -> list[str]:
    def read(beat: Any) -> tuple[Table, int]:
        return load_units(blocks, 2, 9)[0], os.getpid()

    table, reader = read_once(read, ranks)
    if ranks.rank:
        while Path(f"/proc/{reader}").exists():
            time.sleep(0.01)
        return table.content.columns[0].texts([2000])
    return []


def test_the_copy_outlives_the_rank_that_wrote_it(blocks: Blocks, scratch: Path) -> None:
    assert run_ranks(2, read_after_the_reader, blocks, pod=2) == [[], [f"{SECRET} 2000"]]


def refusal(ranks: Ranks, blocks: Blocks, faulty: int) -> str:
    labels = 1 if ranks.rank == faulty else 2
    with pytest.raises(BadData) as caught:
        read_once(lambda beat: load_units(blocks, labels, 9, beat), ranks)
    return str(caught.value)


@pytest.mark.parametrize("faulty", [0, 2])
def test_what_one_rank_refuses_all_refuse(faulty: int, blocks: Blocks) -> None:
    [words] = set(run_ranks(4, refusal, blocks, faulty, pod=2))
    assert words.startswith("blocks[0].data.labelColumn: column 'label' holds a value that is not")


def test_a_full_scratch_folder_is_refused_by_all(
    blocks: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dpmoe_trainer.data.scratch.ScratchWriter.write", full)
    [words] = set(run_ranks(2, refusal, blocks, -1, pod=2))
    assert "ephemeralStorage" in words


def read_slowly(ranks: Ranks, seconds: float) -> int:
    """Signs of progress of this rank, while the first one reads."""
    beats = []

    def read(beat: Any) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            beat()
            time.sleep(0.01)
        return "read"

    assert read_once(read, ranks, lambda: beats.append(ranks.rank)) == "read"
    return len(beats)


def test_ranks_wait_for_one_that_goes_on_longer_than_for_a_silent_one() -> None:
    assert all(beats >= 5 for beats in run_ranks(3, read_slowly, 7.0, pod=3, timeout=5))


def wait_for_a_silent_one(ranks: Ranks) -> float:
    started = time.monotonic()
    with pytest.raises(PeerLost):
        read_once(lambda beat: time.sleep(7.0), ranks)
    return time.monotonic() - started


def test_nobody_waits_for_a_silent_one_for_ever() -> None:
    reader, other = run_ranks(2, wait_for_a_silent_one, pod=2, timeout=5)
    assert other < 6.5 < reader


def test_a_way_leads_to_no_other_file(tmp_path: Path) -> None:
    with (tmp_path / "one").open("w+b") as file:
        way = OpenFile.of(file)
        with way.open() as opened:
            assert os.path.sameopenfile(file.fileno(), opened.fileno())
    with pytest.raises(PeerLost, match="is gone"):
        way.open()
    with (tmp_path / "two").open("w+b") as file:
        assert OpenFile.of(file).path == way.path
        with pytest.raises(PeerLost, match="or of another pod"):
            way.open()
