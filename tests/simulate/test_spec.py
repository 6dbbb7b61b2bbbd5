"""Workloads as YAML: what each field means, and what is said of a wrong one."""

from pathlib import Path

import numpy as np
import pytest

from dpmoe_operator.privacy.capacity import capacity
from dpmoe_operator.privacy.mechanisms import demand
from dpmoe_operator.scheduling.policies import policy
from dpmoe_operator.simulate.engine import play
from dpmoe_operator.simulate.rules import Rules, Unlock
from dpmoe_operator.simulate.spec import read_spec

RENYI = """
budget: {epsilon: "10", delta: "1e-7", conversion: classic, orders: ["3", "8"]}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "workload.yaml"
    path.write_text(text)
    return path


def test_groups_of_tasks(tmp_path: Path) -> None:
    text = f"""
name: two teams
seed: 3
{RENYI}
blocks: {{initial: 2, every: 10, until: 35}}
rules: {{unlock: "time:30/10", period: 5, until: 60}}
tasks:
  - {{arrivals: {{every: 10, start: 5, until: 30}}, blocks: {{latest: 2}},
     training: {{noiseMultiplier: "1.1", samplingRate: "0.01", steps: 2000}}}}
  - {{arrivals: {{at: [0, 12]}}, blocks: {{any: 2}}, curve: ["0.5", "1"], weight: 2, priority: 1,
     timeout: 20}}
  - {{arrivals: {{at: [40]}}, blocks: {{all: true}}, laplace: "2"}}
  - {{arrivals: {{at: [1]}}, blocks: {{rows: [1, 0]}}, laplace: "2"}}
"""
    workload, rules = read_spec(write(tmp_path, text))
    assert rules == Rules(Unlock(lifetime=30.0, steps=10), period=5.0, until=60.0)
    assert workload.name == "two teams"
    assert workload.opened.tolist() == [0, 0, 10, 20, 30]
    assert workload.arrival.tolist() == [0, 1, 5, 12, 15, 25, 40]
    assert tuple(workload.capacity[4]) == capacity("10", "1e-7", ["3", "8"], "classic")
    asked = [rows.tolist() for rows in np.split(workload.indices, workload.indptr[1:-1])]
    assert asked[1] == [0, 1]
    assert asked[2] == [0, 1]
    assert asked[4:] == [[1, 2], [2, 3], [0, 1, 2, 3, 4]]
    assert set(asked[3]) < {0, 1, 2}
    assert tuple(workload.demand[2]) == demand(1.1, 0.01, 2000, ["3", "8"])
    assert workload.demand[0].tolist() == [500_000_000, 1_000_000_000]
    assert workload.weight.tolist() == [2, 1, 1, 2, 1, 1, 1]
    assert workload.priority.tolist() == [1, 0, 0, 1, 0, 0, 0]
    assert workload.timeout.tolist() == [20, np.inf, np.inf, 20, np.inf, np.inf, np.inf]


def test_caps_bound_what_a_namespace_gets(tmp_path: Path) -> None:
    text = """
budget: {epsilon: "10"}
blocks: {initial: 2}
caps: {team-a: "3"}
tasks:
  - {namespace: team-a, arrivals: {at: [0, 0, 0, 0, 0]}, blocks: {latest: 1}, epsilon: "1"}
  - {namespace: team-a, arrivals: {at: [0, 0]}, blocks: {rows: [0]}, epsilon: "1"}
  - {namespace: team-b, arrivals: {at: [0, 0, 0, 0, 0]}, blocks: {latest: 1}, epsilon: "1"}
"""
    workload, rules = read_spec(write(tmp_path, text))
    assert workload.blocks == 2
    assert workload.capacity[:, 0].tolist() == [10**10, 10**10, 3 * 10**9, 3 * 10**9]
    granted = play(workload, policy("fcfs"), rules).granted
    assert granted.tolist() == [True] * 3 + [False] * 2 + [True] * 2 + [True] * 5


def test_poisson_arrivals_follow_the_seed(tmp_path: Path) -> None:
    text = """
seed: 1
budget: {epsilon: "10"}
tasks: [{arrivals: {poisson: 0.5, start: 10, until: 510}, blocks: {latest: 1}, epsilon: "1"}]
"""
    path = write(tmp_path, text)
    arrival = read_spec(path)[0].arrival
    assert len(arrival) == pytest.approx(1000, rel=0.1)
    assert arrival.min() >= 10
    assert np.array_equal(arrival, read_spec(path)[0].arrival)
    assert not np.array_equal(arrival, read_spec(path, seed=2)[0].arrival)


@pytest.mark.parametrize(
    ("generator", "tasks"),
    [
        ("kind: privatekube-single, seconds: 50", None),
        ("kind: privatekube-multi, renyi: true, interval: 1, seconds: 50", None),
        ("kind: dpack-blocks, spread: 3, tasks: 50", 50),
        ("kind: dpack-orders, spread: 3, tasks: 50", 50),
        ("kind: dpack-both, tasks: 50", 50),
        ("kind: amazon, tasksPerDay: 5, days: 10", None),
        ("kind: large, tasks: 50, blocks: 5", 50),
    ],
)
def test_generators(tmp_path: Path, generator: str, tasks: int | None) -> None:
    text = f"generator: {{{generator}}}\nrules: {{unlock: 'arrivals:50'}}"
    workload, rules = read_spec(write(tmp_path, text))
    assert rules.unlock.fair_shares == 50
    assert workload.tasks > 0
    assert tasks is None or workload.tasks == tasks


def test_a_trace_is_found_beside_the_workload(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "n_blocks,profit,block_selection_policy,alphas,rdp_epsilons,relative_submit_time\n"
        '1,4,LatestBlocksFirst,"[3, 8]","[0.1, 0.2]",1\n'
    )
    text = "generator: {kind: trace, path: t.csv, horizon: 2, weights: profit}"
    workload, _ = read_spec(write(tmp_path, text))
    assert workload.weight.tolist() == [4]
    with pytest.raises(ValueError, match="no column epsilon"):
        read_spec(write(tmp_path, text.replace("profit", "size")))


TASK = "{arrivals: {at: [0]}, blocks: {latest: 1}, epsilon: '1'}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "must be a mapping"),
        ("a: [", "not YAML"),
        ("seed: 1", "workload: 'nothing': must set exactly one of generator, budget"),
        ("budget: {epsilon: '1'}", "tasks: .*at least one group"),
        ("generator: {kind: zeta}", "generator"),
        ("generator: {kind: large}\ntasks: [" + TASK + "]", "makes its own tasks"),
        ("budget: {epsilon: 1}\ntasks: [" + TASK + "]", "budget.epsilon: 1: Input should be"),
        ("budget: {epsilon: '1', orders: ['3']}\ntasks: [" + TASK + "]", "need a delta"),
        ("budget: {epsilon: '1', delta: '1e-7'}\ntasks: [" + TASK + "]", "training, laplace or"),
        (
            "budget: {epsilon: '1'}\ntasks: [" + TASK.replace("latest: 1", "latest: 2") + "]",
            "only 1 blocks are open at second 0; ask for fewer",
        ),
        (
            "budget: {epsilon: '1'}\ntasks: [" + TASK.replace("at: [0]", "every: 1") + "]",
            "arrivals.until: None: must be later",
        ),
        (
            "budget: {epsilon: '1'}\nrules: {unlock: soon}\ntasks: [" + TASK + "]",
            "unlock: 'soon' is no rule; say immediate",
        ),
        ("budget: {epsilon: '1'}\nblocks: {every: 3}\ntasks: [" + TASK + "]", "every and until"),
        ("budget: {epsilon: '1'}\ncolour: red\ntasks: [" + TASK + "]", "colour: 'red'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_spec(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "unlock"),
    [
        ("immediate", Unlock()),
        ("arrivals:175", Unlock(fair_shares=175)),
        ("time:30", Unlock(lifetime=30.0)),
        ("time:0.5/1000", Unlock(lifetime=0.5, steps=1000)),
    ],
)
def test_unlocking_is_read_as_it_is_written(text: str, unlock: Unlock) -> None:
    assert Unlock.parse(text) == unlock
    assert str(unlock) == text


@pytest.mark.parametrize("text", ["", "arrivals", "arrivals:0", "time:0", "time:3/0", "time:-1"])
def test_unlocking_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="unlock: "):
        Unlock.parse(text)


def test_rules_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        Unlock(fair_shares=3, lifetime=1.0)
    with pytest.raises(ValueError, match="need a lifetime"):
        Unlock(steps=3)
    with pytest.raises(ValueError, match="period: -1"):
        Rules(period=-1)
    with pytest.raises(ValueError, match="until: nan"):
        Rules(until=float("nan"))
