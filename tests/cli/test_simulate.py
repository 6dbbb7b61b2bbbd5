"""`dpmoe simulate` as a user runs it: tables, JSON, files, and one line for what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from dpmoe_operator.cli.main import app

WORKLOAD = """
budget: {epsilon: "10"}
rules: {unlock: "arrivals:20"}
tasks:
  - {arrivals: {every: 1, until: 30}, blocks: {latest: 1}, epsilon: "0.4"}
  - {arrivals: {every: 3, until: 30}, blocks: {latest: 1}, epsilon: "2"}
"""


def dpmoe(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def assert_refused(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("dpmoe: ")
    assert all(word in last for word in words), last


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "workload.yaml"
    path.write_text(WORKLOAD)
    return path


@pytest.fixture
def instance(tmp_path: Path) -> Path:
    path = tmp_path / "instance.npz"
    np.savez(
        path,
        demand=np.array([[0.6], [0.4], [0.5]]),
        indptr=np.arange(4),
        indices=np.zeros(3, dtype=np.int64),
        capacity=np.array([[1.0]]),
        orders=np.array([2.0]),
    )
    return path


def test_a_table_of_policies(workload: Path) -> None:
    offline = ("--unlock", "immediate", "--period", "30")
    result = dpmoe(workload, *offline, "--policy", "dpf", "--policy", "fcfs")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    granted = {row[0]: int(row[1]) for row in rows if row and row[0] in ("dpf", "fcfs")}
    # 25 small tasks fit; FCFS lets large ones take the place of five each.
    assert granted == {"dpf": 25, "fcfs": 13}


def test_json_file_and_plots(workload: Path, tmp_path: Path) -> None:
    out, plots = tmp_path / "out.json", tmp_path / "plots"
    result = dpmoe(workload, "--policy", "dpf", "--json", "--output", out, "--plots", plots)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed == json.loads(out.read_text())
    summary = printed["results"][0]
    assert summary["granted"] == sum(time is not None for time in summary["granted_at"])
    assert summary["weight"] <= summary["upper_bound"] <= 40
    assert {path.name for path in plots.iterdir()} == {
        "granted.png",
        "waits.png",
        "budget-dpf.png",
    }


def test_options_overrule_the_file(workload: Path) -> None:
    arguments = (workload, "--policy", "fcfs", "--json", "--no-bound")
    offline = json.loads(dpmoe(*arguments, "--unlock", "immediate", "--period", "30").stdout)
    assert offline["rules"] == {
        "unlock": "immediate",
        "period": 30.0,
        "until": None,
        "foresight": 0.0,
    }
    assert offline["results"][0]["rounds"] == 1
    assert offline["results"][0]["upper_bound"] is None
    ended = json.loads(dpmoe(*arguments, "--until", "3").stdout)
    assert ended["results"][0]["rounds"] == 4
    each = json.loads(dpmoe(*arguments, "--period", "0").stdout)
    assert each["rules"]["period"] is None


def test_a_trace_with_its_published_rules(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    header = "n_blocks,profit,block_selection_policy,alphas,rdp_epsilons,relative_submit_time\n"
    path.write_text(header + '1,1,LatestBlocksFirst,"[3, 8]","[0.1, 0.2]",1\n' * 40)
    result = dpmoe(path, "--policy", "dual", "--horizon", "20", "--initial-blocks", "5", "--json")
    printed = json.loads(result.stdout)
    assert printed["rules"] == {
        "unlock": "time:30/1000",
        "period": 10.0,
        "until": None,
        "foresight": 0.0,
    }
    assert printed["workload"]["blocks"] == 25
    assert printed["results"][0]["rounds"] == 2


def test_an_instance_prints_json_only(instance: Path) -> None:
    command = [sys.executable, "-m", "dpmoe_operator.cli.main", "simulate"]
    result = subprocess.run(
        [*command, "--instance", instance, "--policy", "dpf", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    printed = json.loads(result.stdout)
    assert printed["granted"] == [1, 2]
    assert printed["count"] == printed["weight"] == 2
    assert printed["upper_bound"] is None
    assert printed["seconds"] >= 0


def test_help_names_the_policies_and_the_rules() -> None:
    result = dpmoe("--help")
    assert result.exit_code == 0, result.output
    assert all(word in result.stdout for word in ("dual", "optimal", "arrivals:N"))


def test_what_cannot_be_done_is_said_in_one_line(
    workload: Path, instance: Path, tmp_path: Path
) -> None:
    assert_refused(dpmoe(), "WORKLOAD", "--instance")
    assert_refused(dpmoe(workload, "--policy", "best"), "best", "dpf", "fcfs")
    assert_refused(dpmoe(workload, "--unlock", "soon"), "soon", "arrivals:N")
    assert_refused(dpmoe(workload, "--period", "-1"), "period", "-1")
    assert_refused(dpmoe(tmp_path / "none.yaml"), "none.yaml")
    assert_refused(dpmoe(tmp_path / "tasks.txt"), "tasks.txt", ".csv", ".yaml")
    assert_refused(dpmoe("--instance", instance), "--policy", "exactly one")
    assert_refused(dpmoe("--instance", instance, workload, "--policy", "dpf"), "not both")
    assert_refused(dpmoe("--instance", tmp_path / "no.npz", "--policy", "dpf"), "no.npz")
