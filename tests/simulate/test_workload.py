"""Workloads are sorted by arrival as a whole, and refuse what makes no sense."""

from dataclasses import replace

import numpy as np
import pytest

from dpmoe_operator.simulate.workload import Workload, make_workload


@pytest.fixture
def workload() -> Workload:
    return make_workload(
        "unsorted",
        orders=np.array([2.0]),
        capacity=np.array([[10], [20], [5]]),
        opened=np.array([0.0, 3.0, 0.0]),
        is_cap=np.array([False, False, True]),
        demand=np.array([[1], [2], [3], [4]]),
        asked=[np.array([1]), np.array([0, 2]), np.array([0]), np.array([0, 1])],
        arrival=np.array([5.0, 1.0, 2.0, 5.0]),
        weight=np.array([1.0, 2.0, 3.0, 4.0]),
        priority=np.array([0, 1, 2, 3]),
        timeout=np.array([10.0, 20.0, 30.0, 40.0]),
    )


def test_tasks_keep_all_that_is_theirs(workload: Workload) -> None:
    assert workload.arrival.tolist() == [1, 2, 5, 5]
    assert workload.demand[:, 0].tolist() == [2, 3, 1, 4]
    assert workload.weight.tolist() == [2, 3, 1, 4]
    assert workload.priority.tolist() == [1, 2, 0, 3]
    assert workload.timeout.tolist() == [20, 30, 10, 40]
    asked = [rows.tolist() for rows in np.split(workload.indices, workload.indptr[1:-1])]
    assert asked == [[0, 2], [0], [1], [0, 1]]


def test_caps_are_no_blocks(workload: Workload) -> None:
    assert (workload.tasks, workload.blocks, len(workload.capacity)) == (4, 2, 3)


def test_the_whole_is_the_offline_problem(workload: Workload) -> None:
    assert workload.whole.available.tolist() == workload.capacity.tolist()
    assert workload.whole.priority.tolist() == workload.priority.tolist()


def test_nobody_asks_for_a_block_that_is_not_there_yet(workload: Workload) -> None:
    with pytest.raises(ValueError, match=r"arrives at 1 asks for a block that opens at 1\.5"):
        replace(workload, opened=np.array([1.5, 3.0, 0.0]))


def test_other_nonsense(workload: Workload) -> None:
    with pytest.raises(ValueError, match="sorted by arrival"):
        replace(workload, arrival=np.array([2.0, 1.0, 5.0, 5.0]), opened=np.zeros(3))
    with pytest.raises(ValueError, match="timeout: must be above 0"):
        replace(workload, timeout=np.zeros(4))
    with pytest.raises(ValueError, match="weight: must be above 0"):
        replace(workload, weight=np.zeros(4))
