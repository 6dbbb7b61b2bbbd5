"""Offline problems in a file: exact amounts, checked grants, and errors that say what is wrong."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpmoe_operator.scheduling.filling import check_grants
from dpmoe_operator.scheduling.policies import policy
from dpmoe_operator.simulate.instance import read_instance, solve

ARRAYS: dict[str, Any] = {
    "demand": np.array([[0.1, 0.4], [0.3, 0.2], [0.1, 9.0]]),
    "indptr": np.array([0, 2, 3, 4]),
    "indices": np.array([0, 1, 0, 1]),
    "capacity": np.array([[0.3, 0.6], [0.2, -1.0]]),
    "orders": np.array([2.0, 8.0]),
}


def save(path: Path, **changes: Any) -> Path:
    arrays = {**ARRAYS, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_amounts_round_against_the_tasks(tmp_path: Path) -> None:
    round = read_instance(save(tmp_path / "i.npz"))
    assert round.demand[0].tolist() == [100_000_001, 400_000_001]
    assert round.capacity.tolist() == [[299_999_999, 599_999_999], [200_000_000, -1_000_000_000]]
    assert round.weight.tolist() == [1, 1, 1]
    # 0.3 of 0.3 doesn't fit: as floats, one is a little more and the other a little less.
    assert solve(round, policy("fcfs"))["granted"] == [0]


def test_what_is_granted_fits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = save(
        tmp_path / "i.npz",
        demand=rng.uniform(0, 0.5, (40, 2)),
        indptr=np.arange(0, 81, 2),
        indices=np.tile([0, 1], 40),
        capacity=np.array([[2.0, 3.0], [1.0, 4.0]]),
        weight=rng.uniform(1, 5, 40),
    )
    round = read_instance(path)
    for name in ("dpf", "dual"):
        result = solve(round, policy(name))
        check_grants(round, result["granted"])
        assert result["count"] == len(result["granted"]) > 0
        assert result["weight"] == pytest.approx(round.weight[result["granted"]].sum())
    assert result["weight"] <= result["upper_bound"] < round.weight.sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indptr": None}, "holds no indptr"),
        ({"demand": np.zeros(3)}, r"demand: shape \[3\] must be \[tasks, orders\]"),
        ({"capacity": np.zeros((2, 3))}, r"capacity: shape \[2, 3\] must have 2 columns"),
        ({"demand": -np.ones((3, 2))}, "demand: -1.0 must be at least 0"),
        ({"capacity": np.full((2, 2), np.nan)}, "capacity: holds NaN"),
        ({"orders": np.array([8.0, 2.0])}, "orders: must increase"),
        ({"orders": np.array(["2", "8"])}, "orders: dtype <U1 must be a number's"),
        ({"indices": np.array([0, 1, 0, 5])}, r"indices: block rows must lie in \[0, 2\)"),
        ({"indices": np.array([0, 0.5, 0, 1])}, "indices: must hold whole numbers"),
        ({"indices": np.array([0, 0, 0, 1])}, "indices: a task asks for a block twice"),
        ({"indptr": np.array([0, 2, 3, 5])}, "indptr: must rise from 0"),
        ({"weight": np.array([1.0, 0.0, 1.0])}, "weight: must be above 0"),
        ({"weight": np.array([1.0])}, "weight: .* must be"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = save(tmp_path / "i.npz", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        read_instance(path)
    assert str(caught.value).startswith(str(path))


def test_files_that_hold_no_arrays(tmp_path: Path) -> None:
    text = tmp_path / "text.npz"
    text.write_text("hello")
    array = tmp_path / "array.npy"
    np.save(array, np.zeros(3))
    objects = tmp_path / "objects.npz"
    np.savez(objects, demand=np.array([{}], dtype=object))
    for path in (text, array, objects):
        with pytest.raises(ValueError, match="must be an archive of plain arrays"):
            read_instance(path)
    with pytest.raises(OSError, match="none"):
        read_instance(tmp_path / "none.npz")
