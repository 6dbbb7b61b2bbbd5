"""Reading tables: the same rows from every format, and errors that hold nothing of them."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpmoe_trainer.contract import DataPlan
from dpmoe_trainer.data.tables import Table, read_table
from dpmoe_trainer.errors import BadData

SECRET = "zebrafish"

ROWS: list[dict[str, Any]] = [
    {"text": 'Quoted "words", and\nlines', "label": 1, "day": "mon", "user": "ann"},
    {"text": "NA", "label": 0, "day": "tue", "user": "bob"},
    {"text": "007", "label": 2, "day": "mon", "user": "ann"},
    {"text": "żółw\tтабуляция", "label": 1, "day": "wed", "user": "null"},
]


def write_delimited(path: Path, delimiter: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS: dict[str, Callable[[Path], object]] = {
    "csv": lambda path: write_delimited(path, ","),
    "tsv": lambda path: write_delimited(path, "\t"),
    "jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
}


def data_plan(path: Path, format: str, **changes: Any) -> DataPlan:
    fields = {"path": str(path), "format": format, "text_column": "text", "label_column": "label"}
    return DataPlan.model_validate(fields | changes)


@pytest.mark.parametrize("format", WRITERS)
def test_all_formats_give_the_same_rows(format: str, tmp_path: Path) -> None:
    path = tmp_path / "table [1] *.data"  # a name, not a pattern
    WRITERS[format](path)
    table = read_table(data_plan(path, format), "data", labels=3, unit_column="user")
    assert table == Table(
        texts=[row["text"] for row in ROWS],
        labels=[1, 0, 2, 1],
        users=["ann", "bob", "ann", "null"],
    )


@pytest.mark.parametrize("format", WRITERS)
def test_a_partition_keeps_its_own_rows(format: str, tmp_path: Path) -> None:
    path = tmp_path / "table"
    WRITERS[format](path)
    partition = {"column": "label", "values": ["0", "2"]}
    table = read_table(data_plan(path, format, partition=partition), "data", labels=3)
    assert table == Table(texts=["NA", "007"], labels=[0, 2], users=None)


def test_rows_outside_the_partition_are_nobodys_business(tmp_path: Path) -> None:
    path = tmp_path / "table"
    rows = [{"text": "mine", "label": 1, "day": True}, {"text": None, "label": 99, "day": False}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partition = {"column": "day", "values": ["true"]}
    table = read_table(data_plan(path, "jsonl", partition=partition), "data", labels=2)
    assert table.texts == ["mine"]


def test_a_folder_is_all_files_of_the_format_in_it(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        (tmp_path / name).write_text(json.dumps({"text": name, "label": 0}) + "\n")
    table = read_table(data_plan(tmp_path, "jsonl"), "data", labels=2)
    assert table.texts == ["a.jsonl", "b.jsonl"]


def test_a_limit_takes_the_first_rows(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text("".join(json.dumps({"text": str(n), "label": 0}) + "\n" for n in range(2500)))
    table = read_table(data_plan(path, "jsonl"), "data", labels=2, limit=1001)
    assert table.texts == [str(n) for n in range(1001)]
    assert len(table.labels) == 1001
    assert len(read_table(data_plan(path, "jsonl"), "data", labels=2).texts) == 2500


def test_no_copy_of_a_table_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    for format, write in WRITERS.items():
        path = tmp_path / f"table.{format}"
        write(path)
        read_table(data_plan(path, format), "data", labels=3)
    assert not home.exists()
    assert not list(temporary.iterdir())


def with_row(**changes: Any) -> str:
    rows: list[dict[str, Any]] = [{"text": f"row {n}", "label": 0, "user": "u"} for n in range(6)]
    rows[3] |= {"text": SECRET, **changes}
    return "".join(json.dumps(row) + "\n" for row in rows)


REFUSED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "label too large": (with_row(label=2), {}, ["labelColumn", "'label'", "[0, 2)"]),
    "label negative": (with_row(label=-1), {}, ["labelColumn", "[0, 2)"]),
    "label is a word": (with_row(label=SECRET), {}, ["labelColumn", "[0, 2)", "encode"]),
    "label is a fraction": (with_row(label=0.5), {}, ["labelColumn", "[0, 2)"]),
    "label is a truth": (with_row(label=True), {}, ["labelColumn", "[0, 2)"]),
    "label is missing": (with_row(label=None), {}, ["labelColumn", "[0, 2)"]),
    "text is missing": (with_row(text=None), {}, ["textColumn", "'text'", "not text"]),
    "text is a list": (with_row(text=[SECRET]), {}, ["data"]),
    "broken line": (with_row() + '{"text": "zebrafish', {}, ["cannot be read as jsonl"]),
    "not even text": ("\x00zebrafish\x80", {}, ["cannot be read as jsonl"]),
    "empty file": ("", {}, ["no rows"]),
    "only a header": ("text,label\n", {"format": "csv"}, ["no rows"]),
    "no text column": (with_row(), {"text_column": "body"}, ["no column 'body'"]),
    "no label column": (with_row(), {"label_column": "stars"}, ["no column 'stars'"]),
    "no partition column": (
        with_row(),
        {"partition": {"column": "day", "values": ["1"]}},
        ["no column 'day'"],
    ),
    "empty partition": (
        with_row(),
        {"partition": {"column": "user", "values": ["nobody"]}},
        ["no rows with 'user' in ['nobody']"],
    ),
    "no such split": (with_row(), {"split": "test"}, ["cannot be read as jsonl", "split"]),
    "not parquet": (with_row(), {"format": "parquet"}, ["cannot be read as parquet"]),
    "not csv": (f"text,label\na,1\n{SECRET},1,2,3\n", {"format": "csv"}, ["cannot be read as csv"]),
    "csv label": (f"text,label\na,1\nb,{SECRET}\n", {"format": "csv"}, ["labelColumn", "[0, 2)"]),
    "csv without label": ("text,label\na,1\nb,\n", {"format": "csv"}, ["labelColumn", "[0, 2)"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_table_that_is_not_what_the_plan_says(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content, changes, words = REFUSED[case]
    path = tmp_path / "table"
    path.write_text(content, encoding="latin-1")
    plan = data_plan(path, changes.pop("format", "jsonl"), **changes)
    with pytest.raises(BadData) as caught:
        read_table(plan, "blocks[0].data", labels=2)
    assert str(caught.value).startswith("blocks[0].data")
    for word in words:
        assert word in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_row_without_a_user(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text(with_row(user=None))
    with pytest.raises(BadData, match="column 'user' names no user"):
        read_table(data_plan(path, "jsonl"), "data", labels=2, unit_column="user")


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"data\.path: .*nowhere' does not exist; check the path"):
        read_table(data_plan(tmp_path / "nowhere", "jsonl"), "data", labels=2)
    with pytest.raises(BadData, match=r"is a folder without \*\.jsonl files"):
        read_table(data_plan(tmp_path, "jsonl"), "data", labels=2)
