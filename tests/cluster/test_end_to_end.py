"""The main job with real processes: apply, grant, train, settle, on both API servers.

Operator, runner and trainers are the real programs; the models are tiny. Everything that a test
claims is read back through kubectl, the ledger and the files that the trainer wrote.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.cluster.conftest import ROOT, assets
from tests.cluster.world import OTHER_TEAM, OWNER, World, block, fill_volumes, job, namespaces
from transformers import AutoModelForSequenceClassification

from dpmoe_operator.local.stack import Stack


@pytest.fixture(scope="module")
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """A running stack on the API server that the parameter names, with one block."""
    if request.param == "envtest":
        os.environ["KUBEBUILDER_ASSETS"] = str(assets())
    directory = tmp_path_factory.mktemp(f"stack-{request.param}")
    fill_volumes(directory / "volumes")
    with Stack(directory, api=request.param) as stack:
        world = World(stack)
        world.apply(*namespaces())
        world.apply(block())
        yield world


def test_job_trains_and_is_settled_for_its_plan(world: World) -> None:
    world.apply(job("trains"))
    status = world.until_state("trains", "Completed", "Failed")
    assert status["state"] == "Completed", status
    assert status["epsilonSpent"] == "3"
    assert status["progress"] == "100%"
    assert 0 <= float(status["evaluation"]["accuracy"]) <= 1
    [settled] = [s for s in world.records("settled") if s["job"]["name"] == "trains"]
    [granted] = [g for g in world.records("granted") if g["job"]["name"] == "trains"]
    assert settled["charges"] == granted["charges"]

    folder = world.stack.volumes / OWNER / "results" / "team-a" / "trains"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.num_local_experts == 4


def test_elastic_job_is_granted_at_one_point_and_pays_for_that(world: World) -> None:
    """The example's points, on a block that is there and one that is not: the best on one block."""
    manifest = yaml.safe_load((ROOT / "examples" / "extra" / "elastic-job.yaml").read_text())
    asked = {name: manifest["spec"][name] for name in ("elastic", "privacy")}
    both = {"namespace": OWNER, "names": ["notes", "not-there-yet"]}
    world.apply(job("elastic", **asked, blocks=both))
    status = world.until_state("elastic", "Completed", "Failed")
    assert status["state"] == "Completed", status
    assert (status["epsilon"], status["utility"], status["blocks"]) == ("9", "0.7", ["notes"])
    assert status["epsilonSpent"] == "9"
    [granted] = [g for g in world.records("granted") if g["job"]["name"] == "elastic"]
    assert (granted["utility"], len(granted["charges"])) == ("0.7", 1)
    wide = world.stack.kubectl("get", "dpj", "elastic", "-n", "team-a", "-o", "wide")
    header, row = wide.splitlines()
    assert "UTILITY" in header
    assert "0.7" in row.split()


def test_refused_model_costs_nothing(world: World) -> None:
    world.apply(job("pickled", model={"claim": {"claimName": "models", "path": "pickled"}}))
    status = world.until_state("pickled", "Completed", "Failed")
    assert (status["state"], status["reason"]) == ("Failed", "Refused")
    assert status["epsilonSpent"] == "0"
    assert "safetensors" in status["message"]
    [settled] = [s for s in world.records("settled") if s["job"]["name"] == "pickled"]
    assert all(amount == 0 for c in settled["charges"] for amount in c["amounts"])


def test_job_without_access_is_rejected_with_the_remedy(world: World) -> None:
    world.apply(job("stranger", namespace=OTHER_TEAM))

    def message() -> str | None:
        status = world.job("stranger", OTHER_TEAM).get("status") or {}
        return status.get("message") if status.get("state") == "Rejected" else None

    assert "spec.access" in world.until(message, "the stranger is rejected")
    assert not [g for g in world.records("granted") if g["job"]["name"] == "stranger"]


def test_pod_that_never_starts_is_refunded_when_its_job_is_deleted(world: World) -> None:
    image = "registry.example/other:1"
    access = {
        "namespace": "team-a",
        "models": ["models"],
        "outputs": [{"claimName": "results"}],
        "images": [image],
    }
    world.apply(block(access=[access]))
    world.apply(job("no-image", image=image))
    world.until(
        lambda: (
            "ErrImagePull" in str(world.job("no-image").get("status"))
            or "ImagePullBackOff" in str(world.job("no-image").get("status"))
        ),
        "the pod waits for its image",
    )
    world.stack.kubectl("delete", "dpmoejob", "no-image", "-n", "team-a", "--timeout=20s")
    [settled] = world.until(
        lambda: [s for s in world.records("settled") if s["job"]["name"] == "no-image"],
        "the job is settled",
    )
    assert settled["outcome"] == "NeverStarted"
    assert all(amount == 0 for c in settled["charges"] for amount in c["amounts"])
    world.until(
        lambda: "no-image" not in world.stack.kubectl("get", "jobs,pods,cm", "-n", OWNER),
        "what was launched is gone",
    )


def test_deleted_running_job_pays_for_the_steps_it_took(world: World) -> None:
    training = job("deleted")["spec"]["training"] | {"steps": 5000}
    world.apply(job("deleted", training=training))
    world.until(
        lambda: (world.job("deleted").get("status") or {}).get("stepsDone", 0) > 0,
        "the job has taken a step",
    )
    world.stack.kubectl("delete", "dpmoejob", "deleted", "-n", "team-a", "--timeout=20s")
    [settled] = world.until(
        lambda: [s for s in world.records("settled") if s["job"]["name"] == "deleted"],
        "the job is settled",
    )
    assert settled["outcome"] == "Stopped", settled
    assert 0 < settled["steps"] < 5000


def test_killed_operator_goes_on_where_it_was(world: World) -> None:
    """SIGKILL once budget is granted: the next operator finishes, and grants nothing twice."""
    world.apply(job("survivor"))
    world.until(
        lambda: [g for g in world.records("granted") if g["job"]["name"] == "survivor"],
        "the job is granted",
    )
    assert world.stack.operator is not None
    assert world.stack.operator.pid is not None
    os.kill(world.stack.operator.pid, signal.SIGKILL)
    status = world.until_state("survivor", "Completed", "Failed")
    assert status["state"] == "Completed", status
    for kind in ("granted", "launched", "settled"):
        assert len([r for r in world.records(kind) if r["job"]["name"] == "survivor"]) == 1


def test_ledger_verifies(world: World, tmp_path: Path) -> None:
    """Online and offline, by the command; and no longer once one character is changed."""

    def dpmoe(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dpmoe_operator.cli.main", "ledger", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    access = ("--kubeconfig", str(world.stack.kubeconfig))
    assert dpmoe("verify", *access).returncode == 0
    file = tmp_path / "ledger.jsonl"
    assert dpmoe("export", "--output", str(file), *access).returncode == 0
    assert dpmoe("verify", "--file", str(file)).returncode == 0
    file.write_text(file.read_text().replace('"epsilon": "20"', '"epsilon": "21"', 1))
    broken = dpmoe("verify", "--file", str(file))
    assert broken.returncode == 1
    assert "entry-000000000000" in broken.stderr


def test_status_of_a_quiet_cluster_stays_as_it_is(world: World) -> None:
    """No write without a change: resource versions stand still over several rounds."""

    def versions() -> list[str]:
        path = "jsonpath={.items[*].metadata.resourceVersion}"
        return [world.stack.kubectl("get", kind, "-A", "-o", path) for kind in ("pb", "dpj")]

    before = versions()
    process = subprocess.run(["sleep", "7"], check=True)
    assert process.returncode == 0
    assert versions() == before
