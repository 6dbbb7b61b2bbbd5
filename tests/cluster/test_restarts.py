"""Jobs with checkpoints on both API servers: restarted, paused, stopped.

Operator and runner are the real programs, the trainer is a stand-in. On the real server Kubernetes'
own Job controller counts the failures, replaces the pods and suspends the Job.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.conftest import assets
from tests.cluster.world import OWNER, TEAM, World, block, fill_volumes, job, namespaces

from dpmoe_operator.launch.launching import JOB_NAME
from dpmoe_operator.local.stack import TRAINER_IMAGE, Stack

TRAINER = Path(__file__).with_name("saving_trainer.py")
CLAIM = "saved"
STEPS, HELD = 8, 3


@pytest.fixture(scope="module")
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """A running stack with one block that opens a claim for checkpoints."""
    if request.param == "envtest":
        os.environ["KUBEBUILDER_ASSETS"] = str(assets())
    directory = tmp_path_factory.mktemp(f"stack-{request.param}")
    fill_volumes(directory / "volumes")
    (directory / "volumes" / OWNER / CLAIM).mkdir()
    claim = namespaces()[-1]
    claim["metadata"]["name"] = CLAIM
    access = {"namespace": TEAM, "models": ["models"], "outputs": [{"claimName": "results"}]}
    opened = [access | {"checkpoints": {"claimName": CLAIM}}]
    images = {TRAINER_IMAGE: [sys.executable, str(TRAINER)]}
    with Stack(directory, api=request.param, images=images) as stack:
        world = World(stack)
        world.apply(*namespaces(), claim)
        world.apply(block(access=opened))
        yield world


def order(world: World, name: str, content: str = "") -> None:
    """Tell the trainer something, by a file on its claim."""
    (world.stack.volumes / OWNER / CLAIM / TEAM).mkdir(exist_ok=True)
    folder = world.stack.volumes / OWNER / CLAIM
    (folder / f"{name}.new").write_text(content)
    (folder / f"{name}.new").rename(folder / name)


def recant(world: World, name: str) -> None:
    (world.stack.volumes / OWNER / CLAIM / name).unlink()


def journal_of(world: World, name: str) -> Any:
    """The journal of a job; empty before there is one."""
    uid = world.job(name)["metadata"]["uid"]
    path = world.stack.volumes / OWNER / CLAIM / TEAM / uid / "journal.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {"steps": 0, "attempts": []}


def workload_of(world: World, name: str) -> Any:
    label = f"{JOB_NAME}={name}"
    found = json.loads(world.stack.kubectl("get", "jobs", "-n", OWNER, "-l", label, "-o", "json"))
    [workload] = found["items"]
    return workload


def start(world: World, name: str, **spec: Any) -> None:
    """A job that trains, and waits after a few steps."""
    order(world, "hold")
    manifest = job(name, **spec)
    manifest["spec"]["training"]["steps"] = STEPS
    world.apply(manifest)
    world.until(lambda: journal_of(world, name)["steps"] == HELD, f"{name} takes steps")


def settled(world: World, name: str) -> Any:
    found = [s for s in world.records("settled") if s["job"]["name"] == name]
    return found[0] if found else None


def test_crashed_pod_is_replaced_and_the_job_completes(world: World) -> None:
    start(world, "crashes")
    order(world, "crash", "0")

    def restarted() -> bool:
        return world.job("crashes")["status"].get("restarts") == 1

    world.until(restarted, "the pod is replaced")
    world.until(lambda: "restarted 1 time" in world.job("crashes")["status"]["message"], "says so")
    recant(world, "hold")
    status = world.until_state("crashes", "Completed", "Failed")
    assert status["state"] == "Completed", status
    assert status["restarts"] == 1
    assert workload_of(world, "crashes")["status"]["failed"] == 1


def test_job_of_two_pods_survives_the_crash_of_one_and_ends_with_rank_0(world: World) -> None:
    start(world, "pair", parallelism={"workers": 2, "expertParallel": 2})
    order(world, "crash", "1")
    world.until(lambda: workload_of(world, "pair")["status"].get("failed") == 1, "one crashed")
    recant(world, "hold")
    status = world.until_state("pair", "Completed", "Failed")
    assert status["state"] == "Completed", status
    reasons = {c["type"]: c["reason"] for c in workload_of(world, "pair")["status"]["conditions"]}
    assert reasons["Complete"] == "SuccessPolicy"


def test_paused_job_goes_on_where_it_was(world: World) -> None:
    start(world, "pauses")
    world.until_state("pauses", "Running")
    patch = ("patch", "dpj", "pauses", "-n", TEAM, "--type=merge", "-p")
    world.stack.kubectl(*patch, '{"spec": {"suspend": true}}')
    status = world.until_state("pauses", "Suspended")
    assert status["reason"] == "Suspended"
    world.until(lambda: not workload_of(world, "pauses")["status"].get("terminating"), "it ended")
    assert settled(world, "pauses") is None
    recant(world, "hold")
    world.stack.kubectl(*patch, '{"spec": {"suspend": false}}')
    status = world.until_state("pauses", "Completed", "Failed")
    assert status["state"] == "Completed", status
    assert status["restarts"] == 1


def test_restarted_job_pays_for_all_of_its_steps_once(world: World) -> None:
    start(world, "stops")
    order(world, "crash", "0")
    world.until(lambda: len(journal_of(world, "stops")["attempts"]) == 2, "the pod is replaced")
    world.stack.kubectl("delete", "dpj", "stops", "-n", TEAM)
    world.until(lambda: settled(world, "stops"), "stops is settled")
    record = settled(world, "stops")
    assert (record["outcome"], record["steps"]) == ("Stopped", HELD), record


def test_emptied_claim_costs_the_plan(world: World) -> None:
    start(world, "emptied")
    uid = world.job("emptied")["metadata"]["uid"]
    world.until_state("emptied", "Running")
    (world.stack.volumes / OWNER / CLAIM / TEAM / uid / "journal.json").unlink()
    order(world, "crash", "0")
    status = world.until_state("emptied", "Failed", "Completed")
    assert status["reason"] == "JournalLost", status
    assert status["stepsDone"] == STEPS


def test_forgotten_counts_are_remembered_by_the_operator(world: World) -> None:
    """After a suspension Kubernetes counts from zero: the trainer must still miss its journal."""
    start(world, "forgets")
    uid = world.job("forgets")["metadata"]["uid"]
    world.until_state("forgets", "Running")
    name = workload_of(world, "forgets")["metadata"]["name"]
    mark = ("get", "configmap", f"{name}-started", "-n", OWNER, "--ignore-not-found", "-o", "name")
    world.until(lambda: world.stack.kubectl(*mark), "the start is marked")
    patch = ("patch", "dpj", "forgets", "-n", TEAM, "--type=merge", "-p")
    world.stack.kubectl(*patch, '{"spec": {"suspend": true}}')
    world.until_state("forgets", "Suspended")
    (world.stack.volumes / OWNER / CLAIM / TEAM / uid / "journal.json").unlink(missing_ok=True)
    world.stack.kubectl(*patch, '{"spec": {"suspend": false}}')
    status = world.until_state("forgets", "Failed", "Completed")
    assert status["reason"] == "JournalLost", status
