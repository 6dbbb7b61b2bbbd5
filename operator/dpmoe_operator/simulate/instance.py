"""One offline scheduling problem in a file, for other programs to compare themselves with.

A NumPy archive (`.npz`) holds, with T tasks, B blocks, A orders and nnz (task, block) pairs:

    demand      [T, A]   what a task asks of each of its blocks, in ε
    indptr      [T+1]    compressed sparse rows: task t asks for indices[indptr[t]:indptr[t+1]]
    indices     [nnz]    block numbers
    capacity    [B, A]   what each block has, in ε
    orders      [A]      Rényi orders, increasing, above 1
    weight      [T]      optional, > 0; 1 if absent
    group       [T]      optional, not decreasing: tasks of one number are the points of one elastic
                         job, of which at most one is granted

Numbers become integers in 10⁻⁹ ε against the tasks: demands round up and capacities down, so what
is granted fits in real arithmetic as well. An integer array is taken as ε, too.
"""

import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpmoe_operator.scheduling.policies import Policy
from dpmoe_operator.scheduling.round import Floats, Ints, Round
from dpmoe_operator.simulate.amounts import capacity_units, spend_units

_SHAPES = {
    "demand": "[tasks, orders]",
    "indptr": "[tasks + 1]",
    "indices": "[pairs]",
    "capacity": "[blocks, orders]",
    "orders": "[orders]",
    "weight": "[tasks]",
    "group": "[tasks]",
}


def read_instance(path: Path) -> Round:
    """The problem that a file holds, its whole capacity unlocked.

    Raises:
        ValueError: The file is no archive, or an array is missing or not as above.
        OSError: The file can't be read.
    """
    arrays = _load(path)
    demand = _matrix(path, arrays, "demand")
    capacity = _matrix(path, arrays, "capacity")
    tasks, orders = demand.shape
    if capacity.shape[1] != orders:
        raise ValueError(
            f"{path}: capacity: shape {list(capacity.shape)} must have {orders} columns, one an"
            " order, as demand has"
        )
    if (demand < 0).any():
        raise ValueError(f"{path}: demand: {demand[demand < 0][0]} must be at least 0")
    if np.isnan(capacity).any():
        raise ValueError(f"{path}: capacity: holds NaN; say 0 where a block has nothing")
    units = capacity_units(capacity)
    nothing = np.zeros_like(units)
    try:
        return Round(
            orders=_vector(path, arrays, "orders").astype(np.float64),
            demand=spend_units(demand),
            indptr=_whole_numbers(path, arrays, "indptr"),
            indices=_whole_numbers(path, arrays, "indices"),
            capacity=units,
            consumed=nothing,
            reserved=nothing,
            unlocked=units,
            arrival=np.zeros(tasks),
            weight=_weight(path, arrays, tasks),
            priority=np.zeros(tasks, dtype=np.int64),
            group=_whole_numbers(path, arrays, "group") if "group" in arrays else None,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def solve(round: Round, policy: Policy) -> dict[str, Any]:
    """Share out the problem: `granted` (task numbers), `count`, `weight`, `upper_bound`, `seconds`.

    `upper_bound` is on the weight of any set of tasks that fits; None if the policy has none.
    """
    policy.warm_up()
    begin = time.perf_counter()
    outcome = policy.grant(round)
    seconds = time.perf_counter() - begin
    return {
        "granted": outcome.granted.tolist(),
        "count": len(outcome.granted),
        "weight": outcome.weight,
        "upper_bound": outcome.bound,
        "seconds": seconds,
    }


def _load(path: Path) -> dict[str, NDArray[Any]]:
    remedy = "must be an archive of plain arrays, as numpy.savez writes it"
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path}: is no archive; {remedy}")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: {error}; {remedy}") from None
    needed = _SHAPES.keys() - {"weight", "group"}
    missing = [f"{name} {_SHAPES[name]}" for name in sorted(needed) if name not in arrays]
    if missing:
        raise ValueError(f"{path}: holds no {', '.join(missing)}; add it with numpy.savez")
    return arrays


def _numbers(path: Path, arrays: dict[str, NDArray[Any]], name: str) -> NDArray[Any]:
    array = arrays[name]
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{path}: {name}: dtype {array.dtype} must be a number's")
    return array


def _matrix(path: Path, arrays: dict[str, NDArray[Any]], name: str) -> Floats:
    array = _numbers(path, arrays, name)
    if array.ndim != 2:
        raise ValueError(f"{path}: {name}: shape {list(array.shape)} must be {_SHAPES[name]}")
    return np.ascontiguousarray(array, dtype=np.float64)


def _vector(path: Path, arrays: dict[str, NDArray[Any]], name: str) -> NDArray[Any]:
    array = _numbers(path, arrays, name)
    if array.ndim != 1:
        raise ValueError(f"{path}: {name}: shape {list(array.shape)} must be {_SHAPES[name]}")
    return array


def _whole_numbers(path: Path, arrays: dict[str, NDArray[Any]], name: str) -> Ints:
    array = _vector(path, arrays, name)
    whole = array.astype(np.int64)
    if not np.array_equal(whole, array):
        raise ValueError(f"{path}: {name}: must hold whole numbers below 2⁶³")
    return whole


def _weight(path: Path, arrays: dict[str, NDArray[Any]], tasks: int) -> Floats:
    if "weight" not in arrays:
        return np.ones(tasks)
    return np.ascontiguousarray(_vector(path, arrays, "weight"), dtype=np.float64)
