"""Reading tables: the same rows from every format, and errors that hold nothing of them."""

import csv
import errno
import json
from collections.abc import Callable
from decimal import Decimal
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


def texts(table: Table) -> list[str]:
    (column,) = table.content.columns
    return column.texts(range(len(table)))


def data_plan(path: Path, format: str, **changes: Any) -> DataPlan:
    fields = {"path": str(path), "format": format, "text_column": "text", "label_column": "label"}
    return DataPlan.model_validate(fields | changes)


@pytest.mark.parametrize("format", WRITERS)
def test_all_formats_give_the_same_rows(format: str, tmp_path: Path) -> None:
    path = tmp_path / "table [1] *.data"  # a name, not a pattern
    WRITERS[format](path)
    table = read_table(data_plan(path, format), "data", labels=3, unit_column="user")
    assert texts(table) == [row["text"] for row in ROWS]
    assert table.labels is not None
    assert table.labels.tolist() == [1, 0, 2, 1]
    assert table.users is not None
    assert table.users.tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize("format", WRITERS)
def test_a_partition_keeps_its_own_rows(format: str, tmp_path: Path) -> None:
    path = tmp_path / "table"
    WRITERS[format](path)
    partition = {"column": "label", "values": ["0", "2"]}
    table = read_table(data_plan(path, format, partition=partition), "data", labels=3)
    assert texts(table) == ["NA", "007"]
    assert table.labels is not None
    assert table.labels.tolist() == [0, 2]
    assert table.users is None


def test_rows_outside_the_partition_are_nobodys_business(tmp_path: Path) -> None:
    path = tmp_path / "table"
    rows = [{"text": "mine", "label": 1, "day": True}, {"text": None, "label": 99, "day": False}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partition = {"column": "day", "values": ["true"]}
    table = read_table(data_plan(path, "jsonl", partition=partition), "data", labels=2)
    assert texts(table) == ["mine"]


def test_a_folder_is_all_files_of_the_format_in_it(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        (tmp_path / name).write_text(json.dumps({"text": name, "label": 0}) + "\n")
    table = read_table(data_plan(tmp_path, "jsonl"), "data", labels=2)
    assert texts(table) == ["a.jsonl", "b.jsonl"]


def test_a_limit_takes_the_first_rows(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text("".join(json.dumps({"text": str(n), "label": 0}) + "\n" for n in range(2500)))
    table = read_table(data_plan(path, "jsonl"), "data", labels=2, limit=1001)
    assert texts(table) == [str(n) for n in range(1001)]
    assert table.labels is not None
    assert len(table.labels) == 1001
    assert len(read_table(data_plan(path, "jsonl"), "data", labels=2)) == 2500


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
    "csv label without end": (
        f"text,label\na,{'9' * 5000}\n",
        {"format": "csv"},
        ["labelColumn", "[0, 2)"],
    ),
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


def write_users(path: Path, users: pa.Array) -> None:
    rows = {"text": ["a"] * len(users), "label": [0] * len(users), "user": users}
    pq.write_table(pa.table(rows), path)


def test_a_user_is_one_unit_however_files_store_its_id(tmp_path: Path) -> None:
    alike = {
        "a": pa.array([7, 8]),
        "b": pa.array([8, 7], pa.uint16()),
        "c": pa.array(["7", "8"]),
        "d": pa.array(["8", "7"], pa.large_string()),
        "e": pa.array(["7", "7"]).dictionary_encode(),
    }
    for name, users in alike.items():
        write_users(tmp_path / f"{name}.parquet", users)
    plan = data_plan(tmp_path, "parquet")
    table = read_table(plan, "data", labels=2, unit_column="user")
    assert table.users is not None
    assert table.users.tolist() == [0, 1, 1, 0, 0, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("users", "kind"),
    [
        (pa.array([7.0]), "double"),
        (pa.array([7.0], pa.float32()).dictionary_encode(), "float"),
        (pa.array([Decimal("7.0")]), r"decimal128\(2, 1\)"),
        (pa.array([True]), "bool"),
        (pa.array([7], pa.date32()), "date32"),
        (pa.array([7], pa.timestamp("us")), "timestamp"),
        (pa.array([b"zebrafish"]), "binary"),
        (pa.array([["zebrafish"]]), "lists or records"),
        (pa.array([{"zebrafish": 7}]), "lists or records"),
    ],
)
def test_a_users_id_is_text_or_an_integer(users: pa.Array, kind: str, tmp_path: Path) -> None:
    write_users(tmp_path / "a.parquet", pa.array([7]))
    write_users(tmp_path / "b.parquet", users)
    plan = data_plan(tmp_path, "parquet")
    words = rf"^data: column 'user' holds users as {kind}.*; cast it to text or to integers"
    with pytest.raises(BadData, match=words) as caught:
        read_table(plan, "data", labels=2, unit_column="user")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("user", "kind"), [(7.5, "double"), (True, "bool"), ("2026-01-31", "timestamp")]
)
def test_what_json_takes_for_no_text_names_no_user(user: object, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text(json.dumps({"text": "a", "label": 0, "user": user}) + "\n")
    with pytest.raises(BadData, match=f"column 'user' holds users as {kind}"):
        read_table(data_plan(path, "jsonl"), "data", labels=2, unit_column="user")


def test_csvs_users_are_text_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text("text,label,user\na,0,7\nb,0,7.0\nc,0,07\nd,0,7\n")
    table = read_table(data_plan(path, "csv"), "data", labels=2, unit_column="user")
    assert table.users is not None
    assert table.users.tolist() == [0, 1, 2, 0]


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"data\.path: .*nowhere' does not exist; check the path"):
        read_table(data_plan(tmp_path / "nowhere", "jsonl"), "data", labels=2)
    with pytest.raises(BadData, match=r"is a folder without \*\.jsonl files"):
        read_table(data_plan(tmp_path, "jsonl"), "data", labels=2)


TOKEN_ROWS: list[dict[str, Any]] = [
    {"ids": [5, 6, 7], "label": 1},
    {"ids": [], "label": 0},
    {"ids": [19], "label": 0},
]

TOKEN_WRITERS: dict[str, Callable[[Path], object]] = {
    "jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in TOKEN_ROWS)),
    "parquet": lambda path: pq.write_table(pa.Table.from_pylist(TOKEN_ROWS), path),
}


def tokens_plan(path: Path, format: str) -> DataPlan:
    fields = {"path": str(path), "format": format, "tokens_column": "ids", "label_column": "label"}
    return DataPlan.model_validate(fields)


@pytest.mark.parametrize("format", TOKEN_WRITERS)
def test_token_ids_in_place_of_text(format: str, tmp_path: Path) -> None:
    path = tmp_path / "table"
    TOKEN_WRITERS[format](path)
    table = read_table(tokens_plan(path, format), "data", labels=2, vocabulary=20)
    (column,) = table.content.columns
    assert not column.is_text
    assert [ids.tolist() for ids in column.ids([2, 0, 1])] == [[19], [5, 6, 7], []]
    assert column.sizes.tolist() == [3, 0, 1]


@pytest.mark.parametrize("kind", [pa.uint8(), pa.int64()])
def test_integers_of_every_width_are_ids(kind: pa.DataType, tmp_path: Path) -> None:
    path = tmp_path / "table"
    lists = pa.array([[1, 2], [3, 4]], pa.list_(kind, 2))
    pq.write_table(pa.table({"ids": lists, "label": [0, 1]}), path)
    table = read_table(tokens_plan(path, "parquet"), "data", labels=2, vocabulary=5)
    assert [ids.tolist() for ids in table.content.columns[0].ids([0, 1])] == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "bad",
    [[4, 20], [-1], [777777], [2**40], [1, None], None, [0.5], ["zebrafish"], [[1]], 3],
    ids=repr,
)
def test_what_is_no_list_of_the_vocabularys_ids(bad: object, tmp_path: Path) -> None:
    path = tmp_path / "table"
    rows: list[dict[str, Any]] = [{"ids": bad, "label": 0}]
    if bad is None:
        rows += [{"ids": [1], "label": 0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadData, match=r"data\.tokensColumn: column 'ids' holds a value") as caught:
        read_table(tokens_plan(path, "jsonl"), "data", labels=2, vocabulary=20)
    assert "[0, 20)" in str(caught.value)
    assert "777777" not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_text_that_is_no_unicode_is_found_before_the_first_step(tmp_path: Path) -> None:
    path = tmp_path / "table"
    broken = pa.array([b"fine", b"zebrafish\xff"]).view(pa.string())
    pq.write_table(pa.table({"text": broken, "label": [0, 1]}), path)
    with pytest.raises(BadData, match="cannot be read as parquet") as caught:
        read_table(data_plan(path, "parquet"), "data", labels=2)
    assert SECRET not in str(caught.value)


def test_columns_as_parquet_also_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "table"
    columns = {
        "text": pa.array(["one", "two", "three"]).dictionary_encode(),
        "label": pa.array(["1", " 0", "1"]).dictionary_encode(),
        "user": pa.array([7, 3, 7], pa.uint16()),
        "score": pa.array([1.0, 1.0, 2.5]),
        "unused": pa.array([None, None, None]),
    }
    pq.write_table(pa.table(columns), path)
    plan = data_plan(path, "parquet", partition={"column": "score", "values": ["1.0"]})
    table = read_table(plan, "data", labels=2, unit_column="user")
    assert texts(table) == ["one", "two"]
    assert table.labels is not None
    assert table.labels.tolist() == [1, 0]
    assert table.users is not None
    assert table.users.tolist() == [0, 1]


def test_one_column_may_have_two_roles(tmp_path: Path) -> None:
    path = tmp_path / "table"
    WRITERS["csv"](path)
    partition = {"column": "user", "values": ["ann"]}
    plan = data_plan(path, "csv", partition=partition)
    table = read_table(plan, "data", labels=3, unit_column="user")
    assert table.users is not None
    assert table.users.tolist() == [0, 0]


def test_columns_that_nobody_named_are_not_read(tmp_path: Path) -> None:
    """In CSV their types are guessed anew for every chunk, so they may differ."""
    path = tmp_path / "table"
    rows = "".join(f"{n},0,{n if n < 1500 else 'x'}\n" for n in range(3000))
    path.write_text("text,label,note\n" + rows)
    assert len(read_table(data_plan(path, "csv"), "data", labels=2)) == 3000


def test_a_table_of_a_hub_is_read_like_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "reviews"
    folder.mkdir()
    WRITERS["parquet"](folder / "train.parquet")
    plan = DataPlan(hugging_face=str(folder), text_column="text", label_column="label")
    table = read_table(plan, "data", labels=3, unit_column="user")
    assert texts(table) == [row["text"] for row in ROWS]
    with pytest.raises(BadData, match="no column 'stars'"):
        read_table(plan.model_copy(update={"label_column": "stars"}), "data", labels=3)


@pytest.mark.parametrize("when", ["write", "finish"])
def test_a_scratch_folder_that_is_full(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table"
    WRITERS["jsonl"](path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"dpmoe_trainer.data.scratch.ScratchWriter.{when}", full)
    with pytest.raises(BadData, match=r"scratch folder .* is too small .*ephemeralStorage"):
        read_table(data_plan(path, "jsonl"), "data", labels=3)
