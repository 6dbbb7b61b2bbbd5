"""`dpmoe demo` with its real data, real model and real manifests, at a few steps a job.

The data and the model come from the Python package index, as they do for a user.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from tests.chart.helm import CHART, Helm, kubernetes_binary
from tests.cluster.chart import service_account_kubeconfig
from tests.cluster.conftest import ROOT, assets

from dpmoe_operator.local.demo.run import DemoOptions, run_demo
from dpmoe_operator.local.envtest import Envtest
from dpmoe_operator.local.stack import NAMESPACE, Stack, kubectl_path

STATES = {
    "sentiment-small": ("Completed", "Completed"),
    "sentiment-both": ("Completed", "Completed"),
    "sentiment-greedy": ("Pending", "WaitingForUnlock"),
    "sentiment-denied": ("Rejected", "BlockNotShared"),
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's manifests, with jobs of two small steps."""
    folder = tmp_path_factory.mktemp("examples")
    for path in (ROOT / "examples" / "demo").glob("*.yaml"):
        (folder / path.name).write_text(_short(path.read_text()))
    return folder


def _short(text: str) -> str:
    manifests = list(yaml.safe_load_all(text))
    for manifest in manifests:
        if manifest["kind"] == "DPMoEJob":
            manifest["spec"]["training"] |= {"steps": 2, "logicalBatch": 32}
    return "\n---\n".join(json.dumps(manifest) for manifest in manifests)


@pytest.fixture
def demo(tmp_path: Path, examples: Path) -> Iterator[subprocess.Popen[str]]:
    """The command, running, with its output in a file."""
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "dpmoe_operator.cli.main", "demo"),
                *("--directory", str(tmp_path / "run"), "--examples", str(examples)),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell that runs the tests in the background has Ctrl-C ignored by all below it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        yield process
        if process.poll() is None:
            process.kill()
            process.wait()


def until(holds: Callable[[], Any], what: str, seconds: float = 180) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.2)
    return found


def processes_of(run: Path) -> list[int]:
    """Processes whose command line or environment names the run's folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue
        if str(run).encode() in text and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def test_demo_ends_the_same_when_its_operator_is_killed(
    demo: subprocess.Popen[str], tmp_path: Path
) -> None:
    """And stock kubectl reads it and applies one more job meanwhile."""
    run = tmp_path / "run"

    def kubectl(*arguments: str) -> str:
        command = [kubectl_path(), "--kubeconfig", str(run / "kubeconfig"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return result.stdout

    until(lambda: "Training" in kubectl("get", "dpj", "-A") or demo.poll(), "a job trains")
    [operator] = [p for p in processes_of(run) if _is(p, "dpmoe_operator.cli.main", "operator")]
    os.kill(operator, signal.SIGKILL)
    more = tmp_path / "more.yaml"
    more.write_text(_short((ROOT / "examples" / "extra" / "one-more-job.yaml").read_text()))
    assert "created" in kubectl("apply", "-f", str(more))
    header, *_ = kubectl("get", "pb", "-n", "reviews").splitlines()
    assert header.split()[:6] == ["NAME", "EPSILON", "CONSUMED", "RESERVED", "AVAILABLE", "USED"]

    assert demo.wait(timeout=400) == 0, (tmp_path / "output").read_text()[-3000:]
    summary = json.loads((tmp_path / "output").read_text().splitlines()[-1])
    jobs = {job["name"]: job for job in summary["jobs"]}
    expected = STATES | {"sentiment-more": ("Completed", "Completed")}
    assert {name: (job["state"], job["reason"]) for name, job in jobs.items()} == expected
    assert jobs["sentiment-small"]["dev_accuracy"] is not None
    assert jobs["sentiment-denied"]["dev_accuracy"] is None
    assert all(b["reserved"] == 0 and 0 < b["consumed"] < 10 for b in summary["blocks"])
    assert processes_of(run) == []

    log = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    records = [record for entry in log for record in entry["spec"]["records"]]
    granted = [r["granted"]["job"]["uid"] for r in records if "granted" in r]
    assert len(granted) == len(set(granted)) == 3


def test_ctrl_c_leaves_nothing_behind(demo: subprocess.Popen[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    until(lambda: any(_is(p, "dpmoe_trainer") for p in processes_of(run)), "a trainer runs")
    demo.send_signal(signal.SIGINT)
    assert demo.wait(timeout=60) == 130
    until(lambda: not processes_of(run), "all processes are gone", seconds=10)


def _is(pid: int, *words: str) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return all(word in command for word in words)


class ChartStack(Stack):
    """A stack on a real API server whose operator has the rights of the chart and no more."""

    def install(self) -> None:
        self.kubectl("create", "namespace", "reviews")
        helm = Helm(kubernetes_binary("helm"), self.directory / "helm", self.kubeconfig)
        helm.home.mkdir()
        helm(
            *("install", "dpmoe", str(CHART), "--namespace", NAMESPACE, "--create-namespace"),
            values={"dataNamespaces": ["reviews"]},
        )

    def start_operator(self) -> None:
        path = self.directory / "service-account"
        assert isinstance(self.control_plane, Envtest)
        service_account_kubeconfig(self.control_plane, NAMESPACE, "dpmoe-operator", path)
        self.operator_kubeconfig = path
        super().start_operator()


@pytest.mark.envtest
def test_demo_runs_with_the_rights_of_the_chart_alone(
    request: pytest.FixtureRequest, tmp_path: Path, examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if request.config.getoption("--api") == "embedded":
        pytest.skip("needs a real API server; --api=embedded was asked for")
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(assets()))
    downloads = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpmoe/downloads"
    stack = ChartStack(tmp_path / "run", api="envtest")
    summary = run_demo(stack, DemoOptions(downloads, examples), Console(quiet=True))
    states = {job["name"]: (job["state"], job["reason"]) for job in summary["jobs"]}
    assert states == STATES
