"""Streams the columns of a table, from files or a hub, in batches of bounded size."""

import glob
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpmoe_trainer.contract import DataFormat, DataPlan
from dpmoe_trainer.errors import BadData

READ_ROWS = 1000
"""Rows that are converted at a time while a table is read."""

READ_BYTES = 1 << 20
"""What is read of a Parquet file at a time; else it were all of a column's row group."""


def stream(plan: DataPlan, field: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Batches of the named columns; every error of the parsers becomes one without content.

    Raises:
        BadData: the table is missing, unreadable, or lacks a column.
    """
    files = _files(plan, field)
    with tempfile.TemporaryDirectory(prefix="dpmoe-locks-") as locks:
        try:
            wanted = list(dict.fromkeys(columns))
            parquet = plan.format is DataFormat.PARQUET and plan.path is not None
            tables = (
                _parquet(plan, files, wanted, field)
                if parquet
                else _stream(plan, files, wanted, field, locks)
            )
            for table in tables:
                table.validate(full=True)  # else text that is no UTF-8 were found when it is drawn
                yield from table.combine_chunks().to_batches()
        except BadData:
            raise
        except Exception as error:
            source = plan.path if plan.path is not None else plan.hugging_face
            kind = f" as {plan.format}" if plan.format else ""
            raise BadData(
                f"{field}: {source!r} cannot be read{kind} ({type(error).__name__}); check that "
                f"the table is complete, and that its format and split are as the plan says"
            ) from None


def _parquet(
    plan: DataPlan, files: list[Path], columns: list[str], field: str
) -> Iterator[pa.Table]:
    """Parquet files page by page: `datasets` has all of a row group in memory at once."""
    if plan.split not in (None, "train"):
        raise ValueError("a file is one split")
    for file in files:
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES) as parquet:
            _check_columns(columns, parquet.schema_arrow.names, field)
            for batch in parquet.iter_batches(batch_size=READ_ROWS, columns=columns):
                yield pa.Table.from_batches([batch])


def _stream(
    plan: DataPlan, files: list[Path], columns: list[str], field: str, locks: str
) -> Iterator[pa.Table]:
    """All other tables, as `datasets` streams them."""
    try:
        dataset = _open(plan, files, columns, locks)
    except StopIteration:
        return  # how `datasets` answers a file without a single byte
    names = dataset.column_names
    if names is None:  # of a format that tells its columns with its rows
        first = next(iter(dataset.with_format("arrow").iter(batch_size=1)), None)
        if first is None:
            return
        names = first.column_names
    _check_columns(columns, names, field)
    yield from dataset.select_columns(columns).with_format("arrow").iter(batch_size=READ_ROWS)


def _check_columns(columns: list[str], names: list[str], field: str) -> None:
    for column in columns:
        if column not in names:
            raise BadData(
                f"{field}: the table has no column {column!r}; name a column that it has, or "
                f"add the column to the table"
            )


def _open(plan: DataPlan, files: list[Path], columns: list[str], locks: str) -> Any:
    """The table as an iterable dataset, of which nothing but the schema is read."""
    # Imported late: it takes more than a second, and a refused plan needs none of it.
    import datasets

    split = plan.split or "train"
    if plan.path is None:
        return datasets.load_dataset(
            plan.hugging_face, revision=plan.revision, split=split, streaming=True, cache_dir=locks
        )
    assert plan.format is not None, "the contract pairs path with format"
    builder, options = _builder(plan.format, columns)
    return datasets.load_dataset(
        builder,
        data_files=[glob.escape(str(file)) for file in files],
        split=split,
        streaming=True,
        cache_dir=locks,
        **options,
    )


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
    """The builder of `datasets` for a format of text, and its options."""
    if format is DataFormat.JSONL:
        return "json", {}
    # Cells stay the strings that they are: no guessed numbers, no "NA" turned to null.
    options: dict[str, Any] = {
        "converters": dict.fromkeys(columns, str),
        "keep_default_na": False,
        "chunksize": READ_ROWS,
    }
    return "csv", options | {"sep": "\t" if format is DataFormat.TSV else ","}
