"""Rows on demand: what is read and tokenised is what was drawn, and memory does not grow."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.tiny import WORDS
from transformers import PreTrainedTokenizerFast

from dpmoe_trainer.data.rows import Rows
from dpmoe_trainer.data.scratch import TEXT, TOKENS, Content, ScratchColumn, ScratchWriter
from dpmoe_trainer.data.tokens import Ids, KnownTokens, TableTokens
from dpmoe_trainer.dp.sampling import lockstep_batches

CPU = torch.device("cpu")


def column(kind: pa.DataType, *parts: list[Any]) -> ScratchColumn:
    writer = ScratchWriter(kind)
    for part in parts:
        writer.write(pa.array(part, kind))
    return writer.finish()


def test_rows_of_several_parts_come_in_the_order_asked() -> None:
    stored = column(TEXT, ["a", "b"], ["c"], ["ü", "", "f"])
    assert stored.texts([5, 0, 3, 2, 0, 4]) == ["f", "a", "ü", "c", "a", ""]
    assert stored.sizes.tolist() == [1, 1, 1, 2, 0, 1]


def test_texts_are_cut_and_never_empty(fast_tokenizer: PreTrainedTokenizerFast) -> None:
    stored = column(TEXT, ["good film"] * 1001, ["", "the the the the"])
    tokens = TableTokens(Content([stored]), fast_tokenizer, max_tokens=3, padding=0)
    read = tokens.of(range(1003))
    assert [ids.tolist() for ids in read[999:]] == [[3, 5], [3, 5], [0], [7, 7, 7]]


def test_texts_and_ids_of_several_blocks_make_one_table(
    fast_tokenizer: PreTrainedTokenizerFast,
) -> None:
    content = Content(
        [
            column(TEXT, ["good", "bad film"]),
            column(TOKENS, [[9, 8, 7, 6, 5], []], [[4]]),
            column(TEXT, ["plot " * 100]),
        ]
    )
    tokens = TableTokens(content, fast_tokenizer, max_tokens=4, padding=2)
    read = tokens.of([5, 2, 0, 4, 3, 1])
    expected = [[6] * 4, [9, 8, 7, 6], [3], [4], [2], [4, 5]]
    assert [ids.tolist() for ids in read] == expected
    assert tokens.sizes.tolist() == [2, 3, 4, 0, 1, 4]


class Counted(KnownTokens):
    """Counts what it is asked for."""

    def __init__(self, ids: Sequence[Ids]) -> None:
        super().__init__(ids)
        self.asked: list[int] = []

    def of(self, rows: Sequence[int]) -> list[Ids]:
        self.asked += rows
        return super().of(rows)


def some_rows(count: int) -> list[Ids]:
    generator = np.random.default_rng(count)
    lengths = generator.integers(1, 9, count)
    return [generator.integers(1, 20, length).astype(np.int32) for length in lengths]


def test_a_rank_reads_the_rows_it_is_given() -> None:
    tokens = Counted(some_rows(100))
    rows = Rows(tokens, np.arange(100), padding=0, device=CPU)
    (group,) = lockstep_batches([(row,) for row in range(10, 50)], 3, 4, rows.sizes)
    assert tokens.asked == []
    seen = [batch["labels"] for batch in rows.batches(group.of(rank=1)) if batch is not None]
    assert sorted(tokens.asked) == sorted(np.concatenate(group.of(rank=1)).tolist())
    assert sorted(torch.cat(seen).tolist()) == sorted(tokens.asked)


def test_rows_are_tokenised_once_while_there_is_room() -> None:
    tokens = Counted([np.arange(1, 11, dtype=np.int32)] * 3)
    room_for_two = 2 * (10 * 4 + 200)
    rows = Rows(tokens, None, padding=0, device=CPU, cache_bytes=room_for_two)
    for _ in range(3):
        assert rows.batch([0, 1, 2])["input_ids"].tolist() == [list(range(1, 11))] * 3
    assert tokens.asked == [0, 1, 2, 2, 2]


def test_batches_match_their_parts_in_number_and_differ_little_in_length() -> None:
    ids = some_rows(3000)

    class Misjudged(KnownTokens):
        """All rows look alike until they are read."""

        def __init__(self) -> None:
            super().__init__(ids)
            self.sizes = np.ones(len(ids), dtype=np.int32)

    rows = Rows(Misjudged(), np.arange(3000), padding=0, device=CPU)
    parts = [np.arange(start, start + 60) for start in range(0, 2400, 60)]
    parts += [np.arange(0), np.arange(2400, 2407), np.arange(0)]
    batches = list(rows.batches(parts))
    assert [0 if each is None else len(each["labels"]) for each in batches] == [*map(len, parts)]
    drawn = torch.cat([each["labels"] for each in batches if each is not None])
    assert sorted(drawn.tolist()) == list(range(2407))
    padded = sum(int((each["attention_mask"] == 0).sum()) for each in batches if each is not None)
    assert padded < 0.1 * sum(len(row) for row in ids)


def test_no_parts_are_no_batches() -> None:
    rows = Rows(some_rows(3), [0, 1, 2], padding=0, device=CPU)
    assert list(rows.batches([])) == []
    assert list(rows.batches([np.arange(0)])) == [None]


ROW_BYTES = 20_000

Row = dict[str, Any]


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: Path, rows: list[Row]) -> None:
    lines = [f"{row['text']},{row['label']},{row['user']}\n" for row in rows]
    path.write_text("text,label,user\n" + "".join(lines))


def write_parquet(path: Path, rows: list[Row]) -> None:
    """In one row group, of pages that cannot be compressed away."""
    pq.write_table(pa.Table.from_pylist(rows), path, compression="none", use_dictionary=False)


PEAK = """
import sys, tracemalloc
import pyarrow as pa, torch
from tests.tiny import WORDS, tokenizer_of
from dpmoe_trainer.contract import DataPlan
from dpmoe_trainer.data.rows import Rows
from dpmoe_trainer.data.tables import read_table
from dpmoe_trainer.data.tokens import TableTokens

tracemalloc.start()
path, form = sys.argv[1:]
plan = DataPlan(path=path, format=form, text_column="text", label_column="label")
table = read_table(plan, "data", labels=2, unit_column="user")
tokens = TableTokens(table.content, tokenizer_of(WORDS), max_tokens=8, padding=0)
batch = Rows(tokens, table.labels, 0, torch.device("cpu")).batch([0, len(table) - 1])
assert batch["labels"].tolist() == [0, 1]
print(pa.default_memory_pool().max_memory() + tracemalloc.get_traced_memory()[1])
"""
"""Tells the bytes that Arrow and Python held at most, in a process of its own."""


def peak_memory(path: Path, format: str) -> int:
    command = [sys.executable, "-c", PEAK, str(path), format]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(
    ("format", "write"),
    [("jsonl", write_jsonl), ("csv", write_csv), ("parquet", write_parquet)],
)
def test_memory_does_not_grow_with_the_text(
    format: str,
    write: Callable[[Path, list[Row]], None],
    tmp_path: Path,
) -> None:
    peaks = []
    for count in (2000, 6000):
        words = " ".join(WORDS) + " "
        text = words * (ROW_BYTES // len(words))
        rows = [{"text": f"{n} {text}", "label": n % 2, "user": n} for n in range(count)]
        path = tmp_path / f"{count}"
        write(path, rows)
        peaks.append(peak_memory(path, format))
        path.unlink()
    assert peaks[1] - peaks[0] < 4000 * ROW_BYTES / 3
