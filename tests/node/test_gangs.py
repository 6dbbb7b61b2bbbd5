"""Several pods on a node with fewer GPUs than they need: all start, or none does."""

import pytest
from tests.node.world import Object, World, job

GPUS = 2


@pytest.fixture(scope="module")
def gpus(world: World) -> None:
    """Let the node say that it has GPUs; its kubelet takes them over after some seconds."""
    path = "/status/capacity/nvidia.com~1gpu"
    patch = f'[{{"op": "add", "path": "{path}", "value": "{GPUS}"}}]'
    world.node.kubectl(
        "patch", "node", "node-1", "--subresource=status", "--type=json", "-p", patch
    )
    allocatable = "jsonpath={.status.allocatable.nvidia\\.com/gpu}"
    world.until(
        lambda: world.node.kubectl("get", "node", "node-1", "-o", allocatable) == str(GPUS),
        "the node has GPUs",
    )


def gang(name: str, workers: int) -> Object:
    return job(
        name,
        parallelism={"workers": workers, "gpusPerWorker": 1},
        placement={"startTimeoutSeconds": 15},
    )


def test_gang_that_does_not_fit_starts_nothing_and_costs_nothing(world: World, gpus: None) -> None:
    world.apply(gang("too-many", GPUS + 1))
    world.until(lambda: len(world.pods("too-many")) == GPUS + 1, "its pods are there")
    placed = set()

    def given_up() -> bool:
        placed.update(
            pod["metadata"]["name"] for pod in world.pods("too-many") if pod["spec"].get("nodeName")
        )
        return world.record("settled", "too-many") is not None

    world.until(given_up, "it is given up")
    assert placed == set()
    _, settled = world.until_settled("too-many")
    assert (settled["outcome"], settled["steps"]) == ("NeverStarted", 0)
    assert all(amount == 0 for charge in settled["charges"] for amount in charge["amounts"])


def test_gang_that_fits_is_placed(world: World, gpus: None) -> None:
    world.apply(gang("enough", GPUS))

    def all_placed() -> bool:
        pods = world.pods("enough")
        return len(pods) == GPUS and all(pod["spec"].get("nodeName") for pod in pods)

    world.until(all_placed, "all of its pods have a node")
    world.until(lambda: world.status("enough").get("stepsDone"), "it has taken a step")
    world.delete_job("enough")
    # A container that is told to end while it starts does not hear it.
    world.until(lambda: world.record("settled", "enough"), "it is settled", seconds=120)
