"""Reads one table with `datasets`, column by column, without leaving a copy of it anywhere.

A table is streamed once, a few rows at a time. What must be known of all its rows stays in memory:
labels and users, as numbers. The text, or the token ids, goes to a scratch file without a name
(`scratch`), whatever the format, since nothing but Arrow can be read row by row. `datasets` itself
prepares no files, and the folder that it insists on for its locks is temporary. What holds:

- No message of an error here holds anything read from the table: parsers like to quote the row
  that they choke on, so the causes of their errors are dropped, not chained.
- A table that is not what the plan says (a missing column, a label out of range, a null in place of
  a text, an empty file) refuses the whole run, before its first step. Whether a file is well formed
  is thereby taken as public; a row's text, label and user are not.
- Rows outside of the plan's partition are dropped before anything else of them is looked at.
"""

import errno
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dpmoe_trainer.contract import DataPlan
from dpmoe_trainer.data.columns import (
    as_strings,
    class_labels,
    texts,
    token_ids,
    user_names,
    within,
)
from dpmoe_trainer.data.scratch import TEXT, TOKENS, Content, ScratchWriter
from dpmoe_trainer.data.sources import stream
from dpmoe_trainer.errors import BadData


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of one or more tables that belong to their partitions.

    Attributes:
        content: each row's text or token ids, on disk.
        labels: [rows] one class a row, in [0, labels); None where the text itself is learnt.
        users: [rows] the privacy unit that each row belongs to, as a number counted from 0 in order
            of appearance; None where each row is its own.
    """

    content: Content
    labels: npt.NDArray[np.int64] | None
    users: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.content)


def read_table(
    plan: DataPlan,
    field: str,
    labels: int | None,
    unit_column: str | None = None,
    limit: int | None = None,
    vocabulary: int | None = None,
    beat: Callable[[], None] = lambda: None,
) -> Table:
    """Reads a table's labels and users into memory, and its content onto the scratch disk.

    Args:
        plan: where the table is; an absolute path must already lie under the run's root.
        field: the plan's field that holds `plan`, for error messages.
        labels: number of classes; None where the text itself is learnt.
        unit_column: the column that names a row's user; None if each row is a privacy unit.
        limit: keep at most this many rows.
        vocabulary: token ids are below this; needed where the plan names a tokens column.
        beat: called every few rows.

    Raises:
        BadData: the table is missing, unreadable, empty, or lacks what the plan says of it.
    """
    partition = plan.partition
    columns = [plan.text_column or plan.tokens_column or ""]
    columns += [plan.label_column] if plan.label_column else []
    columns += [partition.column] if partition else []
    columns += [unit_column] if unit_column else []

    content = ScratchWriter(TEXT if plan.text_column else TOKENS)
    classes: list[npt.NDArray[np.int64]] = []
    users: list[pa.Array] = []
    rows = 0
    for batch in _chosen(plan, field, columns, beat):
        chosen = batch if limit is None else batch.slice(0, limit - rows)
        rows += len(chosen)
        if plan.label_column:
            assert labels is not None, "the contract pairs labelColumn with labels"
            column = chosen.column(plan.label_column)
            classes.append(class_labels(column, f"{field}.labelColumn", plan.label_column, labels))
        if unit_column:
            users.append(user_names(chosen.column(unit_column), field, unit_column))
        part = _content(chosen, plan, field, vocabulary)
        with _room(field):
            content.write(part)
        if limit is not None and rows >= limit:
            break

    if not rows:
        named = f" with {partition.column!r} in {list(partition.values)}" if partition else ""
        raise BadData(f"{field}: the table has no rows{named}; check the file and the partition")
    with _room(field):
        column = content.finish()
    return Table(
        Content([column]),
        np.concatenate(classes) if plan.label_column else None,
        _numbered(users) if unit_column else None,
    )


def _chosen(
    plan: DataPlan, field: str, columns: list[str], beat: Callable[[], None]
) -> Iterator[pa.RecordBatch]:
    """The partition's rows, in batches that are not empty."""
    for batch in stream(plan, field, columns):
        beat()
        if plan.partition:
            column = as_strings(batch.column(plan.partition.column))
            batch = batch.filter(within(column, plan.partition.values))
        if len(batch):
            yield batch


def _content(batch: pa.RecordBatch, plan: DataPlan, field: str, vocabulary: int | None) -> pa.Array:
    if plan.text_column:
        return texts(batch.column(plan.text_column), f"{field}.textColumn", plan.text_column)
    assert plan.tokens_column is not None, "the contract sets exactly one of the two"
    assert vocabulary is not None, "token ids belong to a vocabulary"
    column = batch.column(plan.tokens_column)
    return token_ids(column, f"{field}.tokensColumn", plan.tokens_column, vocabulary)


@contextmanager
def _room(field: str) -> Iterator[None]:
    """Refuses a table for which the scratch disk has no room."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BadData(
            f"{field}: the scratch folder {tempfile.gettempdir()!r} is too small for the table; "
            f"give the job more of spec.resources.ephemeralStorage"
        ) from None


def _numbered(names: list[pa.Array]) -> npt.NDArray[np.int64]:
    """Users as numbers, counted in order of appearance."""
    encoded = pa.chunked_array(names).dictionary_encode().unify_dictionaries()
    return np.concatenate([part.indices.to_numpy() for part in encoded.chunks]).astype(np.int64)
