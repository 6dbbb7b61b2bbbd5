"""Reads one table of labelled text with `datasets`, without leaving a copy of it anywhere.

Private rows must not outlive the run, so tables are streamed into memory: `datasets` prepares no
Arrow files, and the folder that it insists on for its locks is temporary. What holds:

- No message of an error here holds anything read from the table: parsers like to quote the row
  that they choke on, so the causes of their errors are dropped, not chained.
- A table that is not what the plan says (a missing column, a label out of range, an empty file)
  refuses the whole run. Whether a file is well formed is thereby taken as public; a row's text,
  label and user are not.
"""

import glob
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpmoe_trainer.contract import DataFormat, DataPlan
from dpmoe_trainer.errors import BadData

READ_ROWS = 1000
"""Rows that are converted at a time while a table is read."""


@dataclass(frozen=True)
class Table:
    """The rows of one table that belong to its partition, column by column.

    Attributes:
        texts: one text a row.
        labels: one class a row, in [0, labels); None where the text itself is learnt.
        users: the privacy unit that each row belongs to, or None where each row is its own.
    """

    texts: list[str]
    labels: list[int] | None
    users: list[str] | None = None


def read_table(
    plan: DataPlan,
    field: str,
    labels: int | None,
    unit_column: str | None = None,
    limit: int | None = None,
) -> Table:
    """Reads a table into memory.

    Args:
        plan: where the table is; an absolute path must already lie under the run's root.
        field: the plan's field that holds `plan`, for error messages.
        labels: number of classes; None where the text itself is learnt.
        unit_column: the column that names a row's user; None if each row is a privacy unit.
        limit: keep at most this many rows.

    Raises:
        BadData: the table is missing, unreadable, empty, or lacks what the plan says of it.
    """
    partition = plan.partition
    columns = [plan.text_column]
    columns += [plan.label_column] if plan.label_column else []
    columns += [partition.column] if partition else []
    columns += [unit_column] if unit_column else []

    texts: list[str] = []
    classes: list[int] = []
    users: list[str] = []
    for batch in _batches(plan, field, columns):
        for column in columns:
            if column not in batch:
                raise BadData(
                    f"{field}: the table has no column {column!r}; name a column that it has, or "
                    f"add the column to the table"
                )
        for row in range(len(batch[plan.text_column])):
            if partition and _as_string(batch[partition.column][row]) not in partition.values:
                continue
            texts.append(_text(batch[plan.text_column][row], f"{field}.textColumn", plan))
            if plan.label_column:
                assert labels is not None, "the contract pairs labelColumn with labels"
                value = batch[plan.label_column][row]
                classes.append(_label(value, f"{field}.labelColumn", plan, labels))
            if unit_column:
                users.append(_user(batch[unit_column][row], field, unit_column))
        if limit is not None and len(texts) >= limit:
            break

    if not texts:
        chosen = f" with {partition.column!r} in {list(partition.values)}" if partition else ""
        raise BadData(f"{field}: the table has no rows{chosen}; check the file and the partition")
    return Table(
        texts[:limit],
        classes[:limit] if plan.label_column else None,
        users[:limit] if unit_column else None,
    )


def _batches(plan: DataPlan, field: str, columns: list[str]) -> Iterator[dict[str, list[Any]]]:
    """Streams the table, and turns every error of the parsers into one without content."""
    # Imported late: it takes more than a second, and a refused plan needs none of it.
    import datasets

    files = _files(plan, field)
    with tempfile.TemporaryDirectory(prefix="dpmoe-locks-") as locks:
        try:
            if plan.path is not None:
                assert plan.format is not None, "the contract pairs path with format"
                builder, options = _builder(plan.format, columns)
                dataset = datasets.load_dataset(
                    builder,
                    data_files=[glob.escape(str(file)) for file in files],
                    split=plan.split or "train",
                    streaming=True,
                    cache_dir=locks,
                    **options,
                )
            else:
                dataset = datasets.load_dataset(
                    plan.hugging_face,
                    revision=plan.revision,
                    split=plan.split or "train",
                    streaming=True,
                    cache_dir=locks,
                )
            yield from dataset.iter(batch_size=READ_ROWS)
        except StopIteration:
            return  # how `datasets` answers a file without a single byte
        except Exception as error:
            source = plan.path if plan.path is not None else plan.hugging_face
            kind = f" as {plan.format}" if plan.format else ""
            raise BadData(
                f"{field}: {source!r} cannot be read{kind} ({type(error).__name__}); check that "
                f"the table is complete, and that its format and split are as the plan says"
            ) from None


def _files(plan: DataPlan, field: str) -> list[Path]:
    """The table's file, or the files of its format in the folder; none for a table of a hub."""
    if plan.path is None:
        return []
    path = Path(plan.path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise BadData(f"{field}.path: {plan.path!r} does not exist; check the path and its volume")
    files = sorted(path.glob(f"*.{plan.format}"))
    if not files:
        raise BadData(
            f"{field}.path: {plan.path!r} is a folder without *.{plan.format} files; name a file, "
            f"or a folder that has some"
        )
    return files


def _builder(format: DataFormat, columns: list[str]) -> tuple[str, dict[str, Any]]:
    """The builder of `datasets` for a format, and its options."""
    if format is DataFormat.JSONL:
        return "json", {}
    if format is DataFormat.PARQUET:
        return "parquet", {}
    # Cells stay the strings that they are: no guessed numbers, no "NA" turned to null.
    options = {"converters": dict.fromkeys(columns, str), "keep_default_na": False}
    return "csv", options | {"sep": "\t" if format is DataFormat.TSV else ","}


def _text(value: object, field: str, plan: DataPlan) -> str:
    if not isinstance(value, str):
        raise BadData(
            f"{field}: column {plan.text_column!r} holds a value that is not text; every row of "
            f"the partition needs one"
        )
    return value


def _label(value: object, field: str, plan: DataPlan, labels: int) -> int:
    """A class, from an integer or the digits of one (all that CSV has)."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < labels:
        raise BadData(
            f"{field}: column {plan.label_column!r} holds a value that is not an integer in "
            f"[0, {labels}); encode the classes so, or correct model.labels"
        )
    return value


def _user(value: object, field: str, column: str) -> str:
    if value is None or value == "":
        raise BadData(
            f"{field}: column {column!r} names no user in some row; every row needs one, since "
            f"the user is the privacy unit"
        )
    return _as_string(value)


def _as_string(value: object) -> str:
    """A cell as the plan's strings spell it; JSON's spelling for booleans."""
    return str(value).lower() if isinstance(value, bool) else str(value)
