"""Checks and conversions of whole columns, as Arrow makes them: no Python object for each row.

None of the errors holds anything of a column but its name.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpmoe_trainer.data.scratch import TEXT, TOKENS
from dpmoe_trainer.errors import BadData

MOST_DIGITS = 1000
"""Of a number that is written out; Python refuses to read ones that are much longer."""


def as_strings(column: pa.Array) -> pa.Array:
    """Cells as the plan's strings spell them: Python's spelling, and JSON's for booleans."""
    column = _decoded(column)
    kind = column.type
    if _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return column.cast(TEXT)
    return pa.array([None if cell is None else str(cell) for cell in column.to_pylist()], TEXT)


def within(column: pa.Array, values: Sequence[str]) -> pa.Array:
    """Which cells, as strings, are among the values; a null is spelled None."""
    return pc.is_in(column.fill_null("None"), pa.array(values, TEXT))


def texts(column: pa.Array, field: str, name: str) -> pa.Array:
    """A column of text.

    Raises:
        BadData: some cell is none.
    """
    column = _decoded(column)
    if not _is_text(column.type) or column.null_count:
        raise BadData(
            f"{field}: column {name!r} holds a value that is not text; every row of the partition "
            f"needs one"
        )
    return column.cast(TEXT)


def token_ids(column: pa.Array, field: str, name: str, vocabulary: int) -> pa.Array:
    """A column of lists of token ids.

    Raises:
        BadData: some cell is no list of integers, or an id is none of the vocabulary's.
    """
    kind = column.type
    if not _is_list(kind) or column.null_count:
        raise _not_ids(field, name, vocabulary)
    ids = column.flatten()
    if not (pa.types.is_integer(ids.type) or len(ids) == 0) or ids.null_count:
        raise _not_ids(field, name, vocabulary)
    if len(ids):
        bounds = pc.min_max(ids)
        if bounds["min"].as_py() < 0 or bounds["max"].as_py() >= vocabulary:
            raise _not_ids(field, name, vocabulary)
    return column.cast(TOKENS)


def _not_ids(field: str, name: str, vocabulary: int) -> BadData:
    return BadData(
        f"{field}: column {name!r} holds a value that is not a list of token ids in "
        f"[0, {vocabulary}); tokenise with the tokenizer of the job's model"
    )


def class_labels(column: pa.Array, field: str, name: str, labels: int) -> npt.NDArray[np.int64]:
    """Classes, from integers or the digits of some (all that CSV has).

    Raises:
        BadData: some cell is not in [0, labels).
    """
    column = _decoded(column)
    refusal = BadData(
        f"{field}: column {name!r} holds a value that is not an integer in [0, {labels}); encode "
        f"the classes so, or correct model.labels"
    )
    if column.null_count:
        raise refusal
    if _is_text(column.type):
        encoded = column.dictionary_encode()
        spelled = [text.strip() for text in encoded.dictionary.to_pylist()]
        if not all(text.isdecimal() and len(text) <= MOST_DIGITS for text in spelled):
            raise refusal
        values = pa.array([min(int(text), labels) for text in spelled], pa.int64())
        column = values.take(encoded.indices)
    if not pa.types.is_integer(column.type):
        raise refusal
    bounds = pc.min_max(column)
    if bounds["min"].as_py() < 0 or bounds["max"].as_py() >= labels:
        raise refusal
    return column.cast(pa.int64()).to_numpy(zero_copy_only=False)


def user_names(column: pa.Array, field: str, name: str) -> pa.Array:
    """The users that rows belong to, as strings; from text or integers alone.

    All else has a spelling for each type (7.0 is the integer 7, and a day its midnight), and the
    files of a folder may differ in theirs: one user were two units, each with a share of its own.

    Raises:
        BadData: the column is of another type, or some cell names nobody.
    """
    column = _decoded(column)
    kind = column.type
    if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        # The fields of a record may come from the rows themselves.
        found = "lists or records" if pa.types.is_nested(kind) else kind
        raise BadData(
            f"{field}: column {name!r} holds users as {found}, which files may spell differently; "
            f"cast it to text or to integers, alike in all files"
        )
    strings = column.cast(TEXT)
    if strings.null_count or pc.any(pc.equal(strings, "")).as_py():
        raise BadData(
            f"{field}: column {name!r} names no user in some row; every row needs one, since the "
            f"user is the privacy unit"
        )
    return strings


def _decoded(column: pa.Array) -> pa.Array:
    """Categories as the values that they stand for."""
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
