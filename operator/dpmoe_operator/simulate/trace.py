"""Traces in the format of the Alibaba-DP workload: one task a row of a CSV file.

Tholoniat et al., "Alibaba-DP" (github.com/columbia/alibaba-dp-workload, Apache-2.0), on the cluster
trace of Weng et al., NSDI 2022. The columns that are read:

    n_blocks, profit, block_selection_policy (LatestBlocksFirst or RandomBlocks),
    alphas, rdp_epsilons (lists, in Python's notation), relative_submit_time (since the task before)

and, where they are, epsilon (of the task before its curve, for size-proportional weights). The
trace is squeezed into a horizon: of H days, task i arrives at H · Σ_{j≤i} r_j / Σ_j r_j. Blocks
exist at the start, and one more opens a day. A task asks for its blocks when it arrives, and is
left out if there aren't so many.
"""

import ast
import csv
import gzip
import io
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dpmoe_operator.privacy.capacity import Conversion, capacity
from dpmoe_operator.scheduling.round import Floats, Ints
from dpmoe_operator.simulate.amounts import spend_units
from dpmoe_operator.simulate.workload import Workload, make_workload

Weights = Literal["count", "profit", "size"]

_COLUMNS = (
    "n_blocks",
    "profit",
    "block_selection_policy",
    "alphas",
    "rdp_epsilons",
    "relative_submit_time",
)
_SIZE_UNIT = 1000
"""A size-proportional profit counts thousandths of ε, as the published generator's `ksize`."""


@dataclass(frozen=True)
class TraceOptions:
    """How a trace becomes a workload.

    Attributes:
        horizon: Days over which all tasks arrive, and in which one block a day opens.
        initial_blocks: Blocks that are there at the start.
        epsilon: ε of every block.
        delta: δ of every block.
        conversion: How (ε, δ) becomes capacities; published results use `classic`.
        weights: `count` for 1 each, `profit` for the trace's column, `size` for a weight in
            proportion to ε times the number of blocks.
        seed: Of random blocks.
        tasks: Only so many tasks, the first ones; None for all.
    """

    horizon: int = 30
    initial_blocks: int = 100
    epsilon: str = "10"
    delta: str = "1e-7"
    conversion: Conversion = "classic"
    weights: Weights = "count"
    seed: int = 0
    tasks: int | None = None


@dataclass(frozen=True)
class _Row:
    """One task of a trace."""

    orders: tuple[float, ...]
    curve: tuple[float, ...]
    blocks: int
    latest: bool
    gap: float
    profit: float
    epsilon: float


def read_trace(path: Path, options: TraceOptions) -> Workload:
    """The workload of a trace; `.gz` files are unpacked on the way.

    Raises:
        ValueError: The file or a row is not as the format says. Names the row and the column.
        OSError: The file can't be read.
    """
    rows = list(_rows(path, options))
    if not rows:
        raise ValueError(f"{path}: no task in it; name a file with at least one row")
    orders = rows[0].orders
    for number, row in enumerate(rows, start=2):
        if row.orders != orders:
            raise ValueError(f"{path}:{number}: alphas: must be those of the first row, {orders}")
    gaps = np.array([row.gap for row in rows])
    total = gaps.sum()
    arrival = options.horizon * np.cumsum(gaps) / total if total > 0 else np.zeros(len(rows))
    opened = np.append(np.zeros(options.initial_blocks), np.arange(float(options.horizon)))
    there = np.searchsorted(opened, arrival, side="right")
    counts = np.array([row.blocks for row in rows])
    served = np.flatnonzero(counts <= there)
    if len(served) == 0:
        raise ValueError(
            f"{path}: n_blocks: every task asks for more blocks than exist when it arrives; raise"
            f" the initial blocks above {options.initial_blocks}"
        )
    rng = np.random.default_rng(options.seed)
    kept = [rows[task] for task in served.tolist()]
    room = capacity(options.epsilon, options.delta, orders, options.conversion)
    return make_workload(
        f"{path.name.split('.')[0]}, {options.horizon} days, weight by {options.weights}",
        orders=np.array(orders),
        capacity=np.tile(np.array(room, dtype=np.int64), (len(opened), 1)),
        opened=opened,
        demand=spend_units(np.array([row.curve for row in kept])),
        asked=[
            _chosen(rng, row, blocks)
            for row, blocks in zip(kept, there[served].tolist(), strict=True)
        ],
        arrival=arrival[served],
        weight=_weights(kept, options.weights),
    )


def _chosen(rng: np.random.Generator, row: _Row, there: int) -> Ints:
    if row.latest:
        return np.arange(there - row.blocks, there)
    return np.sort(rng.choice(there, row.blocks, replace=False)).astype(np.int64)


def _weights(rows: list[_Row], weights: Weights) -> Floats:
    match weights:
        case "count":
            return np.ones(len(rows))
        case "profit":
            return np.array([row.profit for row in rows])
        case "size":
            sizes = [max(1, int(_SIZE_UNIT * row.epsilon)) * row.blocks for row in rows]
            return np.array(sizes, dtype=np.float64)


def _rows(path: Path, options: TraceOptions) -> Iterator[_Row]:
    needed = (*_COLUMNS, "epsilon") if options.weights == "size" else _COLUMNS
    with _opened(path) as file:
        reader = csv.DictReader(file)
        missing = [name for name in needed if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{path}: no column {', '.join(missing)}; name a file in the format of Alibaba-DP"
            )
        for index, fields in enumerate(reader):
            if index == options.tasks:
                return
            yield _row(fields, f"{path}:{reader.line_num}")


def _opened(path: Path) -> io.TextIOBase:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path), newline="")
    return path.open(newline="")


def _row(fields: Mapping[str, str], where: str) -> _Row:
    def read(column: str, parse: Callable[[str], float]) -> float:
        try:
            return parse(fields[column])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {column}: {fields[column]!r}: {error}") from None

    orders = _list(fields["alphas"], f"{where}: alphas")
    curve = _list(fields["rdp_epsilons"], f"{where}: rdp_epsilons")
    if len(orders) != len(curve):
        raise ValueError(f"{where}: rdp_epsilons: {len(curve)} amounts for {len(orders)} alphas")
    if not curve or min(curve) < 0:
        raise ValueError(f"{where}: rdp_epsilons: {curve}: amounts must be at least 0")
    selection = fields["block_selection_policy"]
    if selection not in ("LatestBlocksFirst", "RandomBlocks"):
        raise ValueError(
            f"{where}: block_selection_policy: {selection!r}: must be LatestBlocksFirst or"
            " RandomBlocks"
        )
    return _Row(
        orders=orders,
        curve=curve,
        blocks=int(read("n_blocks", _positive_count)),
        latest=selection == "LatestBlocksFirst",
        gap=read("relative_submit_time", _duration),
        profit=read("profit", _positive),
        epsilon=read("epsilon", _duration) if "epsilon" in fields else 0.0,
    )


def _list(text: str, where: str) -> tuple[float, ...]:
    try:
        numbers = ast.literal_eval(text)
        return tuple(float(number) for number in numbers)
    except (SyntaxError, TypeError, ValueError) as error:
        shown = text if len(text or "") < 60 else f"{text[:57]}..."
        raise ValueError(f"{where}: {shown!r}: must be a list of numbers") from error


def _positive_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("must be a whole number, at least 1")
    return int(text)


def _duration(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise ValueError("must be finite and at least 0")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError("must be finite and above 0")
    return number
