"""Privacy units: what a step's sample is drawn from, and whose contribution is bounded.

A unit is one row, or all rows of one user in one block. The units of a job are the union of the
units of its blocks. A user with rows in two blocks is two units, one in each: every block promises
about its own table, and were the two merged into one contribution of norm C, a change of that
user's rows in one block alone could turn it around and move the sum by 2C.

The number of units found is never compared with the number that the owner declared, nor reported:
it is a statistic of private rows that nobody has paid for. The declared number fixed the sampling
rate and the divisor of the noised sum. Were it wrong, the model would learn worse, but the privacy
would be what it was: the sampling rate is the plan's, whatever the number of units is.
"""

from dpmoe_trainer.contract import BlockPlan
from dpmoe_trainer.data.tables import Table, read_table
from dpmoe_trainer.errors import BadPlan

Unit = tuple[int, ...]
"""A unit's rows, as indices into all rows of the job; never empty."""


def load_units(blocks: tuple[BlockPlan, ...], labels: int | None) -> tuple[Table, list[Unit]]:
    """Reads the tables of all blocks into one, with its rows grouped into privacy units.

    Args:
        blocks: the job's blocks; absolute paths must already lie under the run's root.
        labels: number of classes; None where the text itself is learnt.

    Raises:
        BadPlan: a block's unit is the user, and no column names it.
        BadData: a table is not what its plan says.
    """
    columns = [_user_column(block, index) for index, block in enumerate(blocks)]
    texts: list[str] = []
    classes: list[int] = []
    units: list[Unit] = []
    for index, (block, column) in enumerate(zip(blocks, columns, strict=True)):
        table = read_table(block.data, f"blocks[{index}].data", labels, column)
        units += group_rows(table, first=len(texts))
        texts += table.texts
        classes += table.labels or []
    return Table(texts, classes if labels is not None else None), units


def group_rows(table: Table, first: int) -> list[Unit]:
    """One block's units, its rows numbered from `first` on."""
    if table.users is None:
        return [(first + row,) for row in range(len(table.texts))]
    rows_of: dict[str, list[int]] = {}
    for row, user in enumerate(table.users):
        rows_of.setdefault(user, []).append(first + row)
    return [tuple(rows) for rows in rows_of.values()]


def _user_column(block: BlockPlan, index: int) -> str | None:
    if block.unit.kind == "example":
        return None
    if not block.unit.column:
        raise BadPlan(
            f"blocks[{index}].unit.column: missing; name the column that tells whose row it is, "
            f"since unit.kind is {block.unit.kind!r}"
        )
    return block.unit.column
