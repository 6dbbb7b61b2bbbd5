"""Privacy units: what a step's sample is drawn from, and whose contribution is bounded.

A unit is one row, or all rows of one user in one block. The units of a job are the union of the
units of its blocks. A user with rows in two blocks is two units, one in each: every block promises
about its own table, and were the two merged into one contribution of norm C, a change of that
user's rows in one block alone could turn it around and move the sum by 2C. Each of the two is drawn
with the job's sampling rate q, as each block's demand was computed.

The number of units found is never compared with the number that the owner declared, nor reported:
it is a statistic of private rows that nobody has paid for. The declared number fixed the sampling
rate and the divisor of the noised sum. Were it wrong, the model would learn worse, but the privacy
would be what it was: the sampling rate is the plan's, whatever the number of units is.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from dpmoe_trainer.contract import BlockPlan
from dpmoe_trainer.data.scratch import Content
from dpmoe_trainer.data.tables import Table, read_table
from dpmoe_trainer.errors import BadPlan

Unit = tuple[int, ...]
"""A unit's rows, as indices into all rows of the job; never empty."""

Indices = npt.NDArray[np.int64]


class Units(Sequence[Unit]):
    """All units of a job, as numbers in two arrays: there may be hundreds of millions.

    Args:
        rows: all rows, each unit's next to each other.
        starts: [units + 1] where in `rows` each unit starts, and where the last one ends.
    """

    def __init__(self, rows: Indices, starts: Indices) -> None:
        self._rows = rows
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Unit: ...
    @overload
    def __getitem__(self, index: slice) -> list[Unit]: ...
    def __getitem__(self, index: int | slice) -> Unit | list[Unit]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return tuple(self._rows[self._starts[index] : self._starts[index + 1]].tolist())

    def digest(self) -> str:
        """SHA-256 of which rows each unit has; as private as that is."""
        return hashlib.sha256(np.concatenate([self._rows, self._starts]).data).hexdigest()


def load_units(
    blocks: tuple[BlockPlan, ...],
    labels: int | None,
    vocabulary: int | None = None,
    beat: Callable[[], None] = lambda: None,
) -> tuple[Table, Units]:
    """Reads the tables of all blocks into one, with its rows grouped into privacy units.

    Args:
        blocks: the job's blocks; absolute paths must already lie under the run's root.
        labels: number of classes; None where the text itself is learnt.
        vocabulary: token ids are below this; needed where a block names a tokens column.
        beat: called every few rows.

    Raises:
        BadPlan: a block's unit is the user, and no column names it.
        BadData: a table is not what its plan says.
    """
    columns = [_user_column(block, index) for index, block in enumerate(blocks)]
    tables = [
        read_table(
            block.data, f"blocks[{index}].data", labels, column, vocabulary=vocabulary, beat=beat
        )
        for index, (block, column) in enumerate(zip(blocks, columns, strict=True))
    ]
    content = Content([column for table in tables for column in table.content.columns])
    classes = [table.labels for table in tables if table.labels is not None]
    return Table(content, np.concatenate(classes) if classes else None), group_rows(tables)


def digests(table: Table, units: Units, beat: Callable[[], None] = lambda: None) -> list[str]:
    """SHA-256 of all that steps are drawn from; reads every row, and is as private as they are."""
    content = [column.digest(beat) for column in table.content.columns]
    classes = [] if table.labels is None else [hashlib.sha256(table.labels.data).hexdigest()]
    return [*content, *classes, units.digest()]


def group_rows(tables: Sequence[Table]) -> Units:
    """The units of all blocks: each block's own, in order of their first rows."""
    rows: list[Indices] = []
    sizes: list[Indices] = []
    first = 0
    for table in tables:
        if table.users is None:
            order, counts = np.arange(len(table)), np.ones(len(table), dtype=np.int64)
        else:
            order, counts = np.argsort(table.users, kind="stable"), np.bincount(table.users)
        rows.append(order + first)
        sizes.append(counts)
        first += len(table)
    return Units(np.concatenate(rows), np.cumsum(np.concatenate([[0], *sizes])))


def _user_column(block: BlockPlan, index: int) -> str | None:
    if block.unit.kind == "example":
        return None
    if not block.unit.column:
        raise BadPlan(
            f"blocks[{index}].unit.column: missing; name the column that tells whose row it is, "
            f"since unit.kind is {block.unit.kind!r}"
        )
    return block.unit.column
