"""Traces in the format of Alibaba-DP: what becomes of a row, and what is said of a bad one."""

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest

from dpmoe_operator.privacy.capacity import capacity
from dpmoe_operator.simulate.trace import TraceOptions, read_trace

ROW = {
    "epsilon": "0.0125",
    "delta": "0.001",
    "n_blocks": "2",
    "profit": "1",
    "block_selection_policy": "LatestBlocksFirst",
    "task_name": "laplace",
    "alphas": "[3, 8]",
    "rdp_epsilons": "[0.1, 0.5]",
    "relative_submit_time": "1.0",
    "submit_time": "0",
    "workload": "",
    "normalized_rdp_epsilons": "[1, 1]",
}


def write(path: Path, *changes: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROW.keys())
        writer.writeheader()
        writer.writerows({**ROW, **change} for change in changes)
    return path


def test_a_trace_is_squeezed_into_its_horizon(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.csv",
        {"relative_submit_time": "1"},
        {
            "relative_submit_time": "5",
            "profit": "3",
            "rdp_epsilons": "[0.25, inf]".replace("inf", "1e6"),
        },
        {"relative_submit_time": "2", "n_blocks": "4", "epsilon": "2"},
    )
    workload = read_trace(path, TraceOptions(horizon=4, initial_blocks=3))
    assert workload.arrival.tolist() == [0.5, 3.0, 4.0]
    assert workload.opened.tolist() == [0, 0, 0, 0, 1, 2, 3]
    asked = np.split(workload.indices, workload.indptr[1:-1])
    assert [rows.tolist() for rows in asked] == [[2, 3], [5, 6], [3, 4, 5, 6]]
    assert workload.demand.tolist() == [
        [100_000_001, 500_000_000],
        [250_000_000, 1_000_000 * 10**9],
        [100_000_001, 500_000_000],
    ]
    assert tuple(workload.capacity[0]) == capacity("10", "1e-7", ["3", "8"], "classic")


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("count", [1, 1]), ("profit", [1, 7]), ("size", [12 * 2, 1000 * 3])],
)
def test_weights(tmp_path: Path, weights: str, expected: list[float]) -> None:
    path = write(tmp_path / "t.csv", {}, {"profit": "7", "epsilon": "1.0", "n_blocks": "3"})
    options = TraceOptions(weights=weights)  # type: ignore[arg-type]
    assert read_trace(path, options).weight.tolist() == expected


def test_tasks_that_ask_for_more_blocks_than_there_are_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", {"n_blocks": "9"}, {"n_blocks": "3"})
    workload = read_trace(path, TraceOptions(horizon=4, initial_blocks=3))
    assert workload.tasks == 1
    with pytest.raises(ValueError, match=r"n_blocks.*raise the initial blocks above 3"):
        read_trace(
            write(tmp_path / "u.csv", {"n_blocks": "9"}), TraceOptions(horizon=4, initial_blocks=3)
        )


def test_random_blocks_depend_on_the_seed_only(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", *[{"block_selection_policy": "RandomBlocks"}] * 20)
    one, same, other = (read_trace(path, TraceOptions(seed=seed)) for seed in (1, 1, 2))
    assert one.indices.tolist() == same.indices.tolist() != other.indices.tolist()
    assert {len(set(rows)) for rows in np.split(one.indices, one.indptr[1:-1])} == {2}


def test_gzip_and_limits(tmp_path: Path) -> None:
    plain = write(tmp_path / "t.csv", *[{}] * 5)
    packed = tmp_path / "t.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_trace(packed, TraceOptions()).tasks == 5
    assert read_trace(packed, TraceOptions(tasks=3)).tasks == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_blocks": "0"}, "t.csv:3: n_blocks: '0': must be a whole number"),
        ({"n_blocks": "1.5"}, "n_blocks: '1.5'"),
        ({"profit": "0"}, "profit: '0': must be finite and above 0"),
        ({"profit": "much"}, "profit: 'much'"),
        ({"relative_submit_time": "-1"}, "relative_submit_time: '-1'"),
        ({"block_selection_policy": "Zeta_2"}, "block_selection_policy: 'Zeta_2': must be Latest"),
        ({"alphas": "[3, 8"}, "alphas: .*must be a list of numbers"),
        ({"alphas": "__import__('os').getcwd()"}, "alphas: .*must be a list of numbers"),
        ({"rdp_epsilons": "[0.1]"}, "rdp_epsilons: 1 amounts for 2 alphas"),
        ({"rdp_epsilons": "[0.1, -1]"}, "rdp_epsilons: .*at least 0"),
        ({"alphas": "[3, 9]"}, "t.csv:3: alphas: must be those of the first row"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_trace(write(tmp_path / "t.csv", {}, change), TraceOptions())


def test_a_file_that_is_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("n_blocks,profit\n1,1\n")
    with pytest.raises(ValueError, match="no column block_selection_policy, alphas"):
        read_trace(path, TraceOptions())
    with pytest.raises(ValueError, match="no task in it"):
        read_trace(write(path), TraceOptions())
