"""What is told of a simulation: its numbers, its table, its JSON and its plots."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dpmoe_operator.scheduling.policies import policy
from dpmoe_operator.simulate.engine import Played, play
from dpmoe_operator.simulate.plots import budget_parts, write_plots
from dpmoe_operator.simulate.report import to_object, to_table
from dpmoe_operator.simulate.rules import Rules, Unlock
from dpmoe_operator.simulate.summary import summarise, upper_bound
from dpmoe_operator.simulate.workload import NEVER, Workload, make_workload

ONE = 10**9


@pytest.fixture
def workload() -> Workload:
    """Two blocks of 4 and 8 at one order and less at another; the second opens at 10."""
    blocks = [[0], [0], [0, 1], [1], [1]]
    return make_workload(
        "small",
        orders=np.array([2.0, 8.0]),
        capacity=np.array([[4, 1], [8, 1]]) * ONE,
        opened=np.array([0.0, 10.0]),
        demand=np.array([[1, 3], [2, 3], [2, 3], [1, 3], [7, 3]]) * ONE,
        asked=[np.array(rows) for rows in blocks],
        arrival=np.array([0.0, 1.0, 10.0, 11.0, 12.0]),
        weight=np.array([1.0, 1.0, 5.0, 1.0, 1.0]),
        timeout=np.full(5, NEVER),
    )


def play_first(workload: Workload, rules: Rules) -> Played:
    return play(workload, policy("fcfs"), rules)


def test_numbers(workload: Workload) -> None:
    played = play_first(workload, Rules(Unlock(lifetime=20.0, steps=4), period=10.0, until=40.0))
    # Half of the first block at 10 for task 0, all of it at 20 for task 1; then task 2 won't fit.
    assert played.granted_at.tolist()[:2] == [10, 20]
    assert played.granted.tolist() == [True, True, False, True, True]
    summary = summarise(played, upper_bound=9.0, fair_shares=4)
    assert (summary.tasks, summary.granted, summary.rounds) == (5, 4, 4)
    assert (summary.weight, summary.weight_of_all, summary.upper_bound) == (4.0, 9.0, 9.0)
    waited = [10, 19, 9, 18]
    assert summary.wait_mean == pytest.approx(np.mean(waited))
    assert summary.wait_p95 == pytest.approx(np.quantile(waited, 0.95))
    # A fair share of the first block is (1, ¼) and of the second (2, ¼): order 8 makes all unfair.
    assert (summary.fair, summary.fair_granted) == (0, None)


def test_fair_shares_are_those_of_the_unlocking() -> None:
    basic = make_workload(
        "basic",
        orders=np.array([2.0]),
        capacity=np.array([[8]]) * ONE,
        opened=np.zeros(1),
        demand=np.array([[1], [2], [3], [3]]) * ONE,
        asked=[np.zeros(1, dtype=np.int64)] * 4,
        arrival=np.arange(4.0),
    )
    by_arrivals = play_first(basic, Rules(Unlock(fair_shares=3)))
    assert by_arrivals.granted.tolist() == [True, True, True, False]
    assert (summarise(by_arrivals).fair, summarise(by_arrivals).fair_granted) == (2, 1.0)
    # Without, everyone who asks for the block has an equal share in it: 8/4.
    assert summarise(play_first(basic, Rules())).fair == 2
    assert summarise(by_arrivals, fair_shares=8).fair == 1


def test_nobody_granted(workload: Workload) -> None:
    played = play_first(workload, Rules(Unlock(lifetime=1e9), period=10.0))
    summary = summarise(played)
    assert (summary.granted, summary.wait_mean, summary.wait_p95) == (0, None, None)
    assert "–" in rendered(workload, [played])


def test_the_bound_holds_for_every_policy(workload: Workload) -> None:
    rules = Rules(Unlock(fair_shares=2), period=3.0)
    played = [play(workload, policy(name), rules) for name in ("fcfs", "dpf", "dual")]
    bound = upper_bound(played[0])
    assert all(bound == upper_bound(other) for other in played)
    assert max(summarise(one).weight for one in played) <= bound <= workload.weight.sum()


def rendered(workload: Workload, played: list[Played]) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(to_table(workload, played[0].rules, [summarise(one) for one in played]))
    return console.export_text()


def test_the_table_fits_a_terminal(workload: Workload) -> None:
    text = rendered(workload, [play_first(workload, Rules())])
    assert all(name in text for name in ("policy", "granted", "p95 wait", "rounds", "decided"))
    assert "…" not in text


def test_json_tells_when_each_task_was_granted(workload: Workload) -> None:
    rules = Rules(Unlock(lifetime=20.0, steps=4), period=10.0)
    played = play_first(workload, rules)
    result = json.loads(json.dumps(to_object(workload, rules, [played], [summarise(played)])))
    assert result["workload"] == {"name": "small", "tasks": 5, "blocks": 2, "orders": [2.0, 8.0]}
    assert result["rules"] == {
        "unlock": "time:20/4",
        "period": 10.0,
        "until": None,
        "foresight": 0.0,
    }
    assert result["results"][0]["policy"] == "fcfs"
    assert result["results"][0]["granted_at"] == [10, 20, None, 20, None]


def test_budget_is_told_at_the_order_that_has_most_left(workload: Workload) -> None:
    played = play_first(workload, Rules(Unlock(lifetime=20.0, steps=4), period=10.0))
    spent, unlocked = budget_parts(played)
    assert spent.tolist() == pytest.approx([3 / 4, 1 / 8])
    assert unlocked.tolist() == pytest.approx([1 / 4, 3 / 8])


def test_plots_are_pictures(workload: Workload, tmp_path: Path) -> None:
    played = [play(workload, policy(name), Rules(period=5.0)) for name in ("dpf", "fcfs")]
    nothing = play(workload, policy("area"), Rules(Unlock(lifetime=1e9), period=10.0))
    paths = write_plots([*played, nothing], tmp_path / "plots")
    assert [path.name for path in paths] == [
        "granted.png",
        "waits.png",
        "budget-dpf.png",
        "budget-fcfs.png",
        "budget-area.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
