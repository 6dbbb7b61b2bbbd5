"""What a user sees when a command cannot do its work: one line with the remedy, no traceback."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def dpmoe(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dpmoe_operator.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **env},
    )


def assert_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 1, result
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("dpmoe: ")
    assert all(word in last for word in words), last
    assert "Traceback" not in result.stderr


@pytest.fixture
def dead_server(tmp_path: Path) -> Path:
    """A kubeconfig of a server that is not there."""
    path = tmp_path / "kubeconfig"
    path.write_text(
        """
apiVersion: v1
kind: Config
clusters: [{name: dead, cluster: {server: "http://127.0.0.1:9"}}]
users: [{name: nobody, user: {token: secret-token}}]
contexts: [{name: dead, context: {cluster: dead, user: nobody}}]
current-context: dead
"""
    )
    return path


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


@pytest.mark.parametrize("command", [("operator", "--no-anchor"), ("ledger", "verify")])
def test_dead_api_server(command: tuple[str, ...], dead_server: Path) -> None:
    result = dpmoe(*command, "--kubeconfig", str(dead_server))
    assert_one_line(result, "http://127.0.0.1:9", "Check that it runs")
    assert "secret-token" not in result.stdout + result.stderr


def test_missing_kubeconfig(tmp_path: Path) -> None:
    result = dpmoe("operator", "--no-anchor", "--kubeconfig", str(tmp_path / "none"))
    assert_one_line(result, "none", "--kubeconfig")


def test_unknown_policy(dead_server: Path) -> None:
    result = dpmoe("operator", "--no-anchor", "--policy", "best", "--kubeconfig", str(dead_server))
    assert_one_line(result, "best", "dpf", "fcfs")


def test_demo_port_in_use(taken_port: int, tmp_path: Path) -> None:
    result = dpmoe("demo", "--port", str(taken_port), "--directory", str(tmp_path / "run"))
    assert_one_line(result, f"--port {taken_port}", "--port 0")


def test_demo_in_a_folder_that_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    assert_one_line(dpmoe("demo", "--directory", str(tmp_path)), "--directory", str(tmp_path))


def test_demo_without_network(tmp_path: Path) -> None:
    result = dpmoe(
        *("demo", "--directory", str(tmp_path / "run"), "--downloads", str(tmp_path / "empty")),
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_CONFIG_FILE=os.devnull,
        PIP_RETRIES="0",
    )
    assert_one_line(result, "vaderSentiment==0.5", "cannot be downloaded", str(tmp_path / "empty"))


def test_envtest_demo_without_binaries(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    result = dpmoe("demo", "--api", "envtest", "--directory", run, KUBEBUILDER_ASSETS="")
    assert_one_line(result, "KUBEBUILDER_ASSETS", "--api embedded")


def test_ledger_file_that_is_no_ledger(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    file.write_text("{}\nnot json\n")
    assert_one_line(dpmoe("ledger", "verify", "--file", str(file)), f"{file}:2", "export it again")
    file.write_text('{"metadata": {"name": "entry-000000000001"}, "spec": {}}\n')
    assert_one_line(dpmoe("ledger", "verify", "--file", str(file)), "entry-000000000000", "missing")


def test_stale_crds_are_found(tmp_path: Path) -> None:
    assert dpmoe("crds", "--output", str(tmp_path)).returncode == 0
    assert dpmoe("crds", "--check", str(tmp_path)).returncode == 0
    (tmp_path / "privateblocks.yaml").write_text("other")
    assert_one_line(dpmoe("crds", "--check", str(tmp_path)), "privateblocks.yaml", "make crds")


@pytest.mark.parametrize("choice", [(), ("--no-anchor", "--anchor", "here")])
def test_the_choice_of_an_anchor_is_explicit(dead_server: Path, choice: tuple[str, ...]) -> None:
    result = dpmoe("operator", "--kubeconfig", str(dead_server), *choice)
    assert_one_line(result, "--anchor", "--no-anchor")
