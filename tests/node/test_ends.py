"""Every end of a job, in real containers: what is charged, as docs/design/settlement.md says."""

import json

import pytest
from tests.node.world import MISSING_IMAGE, OWNER, ROWS, Object, World, job

from dpmoe_operator.privacy.units import format_epsilon


def is_training(status: Object) -> bool:
    """Some steps were taken: the operator has asked the trainer in its pod."""
    return bool(status.get("stepsDone", 0) > 0)


def assert_charged_in_full(granted: Object, settled: Object) -> None:
    assert settled["steps"] == granted["steps"]
    assert settled["charges"] == granted["charges"]


def assert_charged_for_steps(granted: Object, settled: Object) -> None:
    """RDP adds up over steps, so each order pays its share, rounded up to 10⁻⁹."""
    part, whole = settled["steps"], granted["steps"]
    for paid, held in zip(settled["charges"], granted["charges"], strict=True):
        assert paid["account"] == held["account"]
        for amount, reserved in zip(paid["amounts"], held["amounts"], strict=True):
            assert reserved > 0
            assert abs(amount - reserved * part / whole) <= 1


def pods(world: World, name: str) -> list[str]:
    return [pod["metadata"]["name"] for pod in world.pods(name)]


def test_finished_job_is_charged_its_plan(world: World) -> None:
    world.apply(job("finishes", steps=4))
    granted, settled = world.until_settled("finishes")
    assert settled["outcome"] == "Completed", settled
    assert_charged_in_full(granted, settled)
    status = world.until_status("finishes", lambda s: s.get("completionTime"), "is over")
    assert (status["state"], status["progress"]) == ("Completed", "100%")
    assert status["epsilonSpent"] == "2"
    # The model is where the status says, and was made from the block's table.
    folder = status["output"].removeprefix("/dpmoe/outputs/results/")
    assert (world.results / folder / "model.txt").read_text() == f"{ROWS} rows"


def test_container_killed_for_memory_is_charged_in_full(world: World) -> None:
    world.apply(job("grows", model="grows"))
    granted, settled = world.until_settled("grows")
    assert settled["outcome"] == "ReportMissing"
    assert_charged_in_full(granted, settled)
    status = world.until_status("grows", lambda s: s.get("completionTime"), "is over")
    assert (status["state"], status["reason"]) == ("Failed", "ReportMissing")
    assert status["message"] == "rank 0 ended with exit code 137 (OOMKilled) and wrote no report"


def test_pod_deleted_by_hand_pays_for_the_steps_it_took(world: World) -> None:
    world.apply(job("deleted-pod"))
    seen = world.until_status("deleted-pod", is_training, "has taken a step")
    [pod] = pods(world, "deleted-pod")
    world.delete_pod(pod)
    granted, settled = world.until_settled("deleted-pod")
    assert settled["outcome"] == "Stopped", settled
    assert seen["stepsDone"] <= settled["steps"] < granted["steps"]
    assert_charged_for_steps(granted, settled)
    status = world.until_status("deleted-pod", lambda s: s.get("completionTime"), "is over")
    assert (status["state"], status["reason"]) == ("Failed", "Stopped")
    assert status["stepsDone"] == settled["steps"]
    assert set(pods(world, "deleted-pod")) <= {pod}, "no second pod draws a second noise"


def test_pod_killed_before_it_could_report_is_charged_in_full(world: World) -> None:
    """Deleted by force in the middle of a step, so that SIGKILL comes first."""
    world.apply(job("forced", model="lingers"))
    world.until_status("forced", is_training, "has taken a step")
    [pod] = pods(world, "forced")
    world.delete_pod(pod, "--grace-period=0", "--force")
    granted, settled = world.until_settled("forced")
    assert settled["outcome"] == "ReportMissing"
    assert_charged_in_full(granted, settled)
    assert set(pods(world, "forced")) <= {pod}


def test_deleted_job_pays_for_the_steps_it_took(world: World) -> None:
    world.apply(job("deleted"))
    seen = world.until_status("deleted", is_training, "has taken a step")
    world.delete_job("deleted")
    granted, settled = world.until_settled("deleted")
    assert settled["outcome"] == "Stopped", settled
    assert seen["stepsDone"] <= settled["steps"] < granted["steps"]
    assert_charged_for_steps(granted, settled)
    world.until(lambda: not launched(world, "deleted"), "what was launched is gone")


@pytest.mark.parametrize(
    ("name", "spec", "why"),
    [
        ("no-image", {"image": MISSING_IMAGE}, "ImagePull"),
        ("no-node", {"placement": {"nodeSelector": {"disk": "none-such"}}}, "Unschedulable"),
    ],
)
def test_pod_that_never_starts_costs_nothing(
    world: World, name: str, spec: Object, why: str
) -> None:
    world.apply(job(name, **spec))
    status = world.until_status(name, lambda s: why in s.get("message", ""), f"waits: {why}")
    assert (status["state"], status["reason"]) == ("Reserved", "PodWaiting")
    world.delete_job(name)
    granted, settled = world.until_settled(name)
    assert settled["outcome"] == "NeverStarted", settled
    assert settled["steps"] == 0
    assert len(settled["charges"]) == len(granted["charges"])
    assert all(amount == 0 for charge in settled["charges"] for amount in charge["amounts"])
    world.until(lambda: not launched(world, name), "what was launched is gone")


def launched(world: World, name: str) -> str:
    """What there is of a job in the owner's namespace."""
    label = f"dpmoe.dev/job-name={name}"
    kinds = "jobs,pods,configmaps,services,networkpolicies"
    return world.node.kubectl("get", kinds, "-n", OWNER, "-l", label, "-o", "name")


def test_job_on_a_lost_node_is_charged_in_full(world: World) -> None:
    """A node that does not answer may train on: its pod is over when somebody says so, by force."""
    world.apply(job("lost"))
    world.until_status("lost", is_training, "has taken a step")
    [pod] = world.pods("lost")
    name, address = pod["metadata"]["name"], pod["status"]["podIP"]
    world.node.signal("kubelet", "STOP")
    try:
        world.delete_pod(name)
        before = step(world, address)
        world.until(lambda: step(world, address) > before + 30, "the lost container goes on")
        assert world.record("settled", "lost") is None
        world.delete_pod(name, "--grace-period=0", "--force")
        granted, settled = world.until_settled("lost")
        after = step(world, address)
        world.until(lambda: step(world, address) > after, "it outlives its settlement")
    finally:
        world.node.signal("kubelet", "CONT")
    assert settled["outcome"] == "ReportMissing"
    assert_charged_in_full(granted, settled)


def step(world: World, address: str) -> int:
    """The step that a trainer is at, by its own word."""
    return int(json.loads(world.node.exec("curl", "-s", f"http://{address}:8475/progress"))["step"])


def test_block_shows_the_sum_of_all_charges(world: World) -> None:
    """Whatever the tests before this one were charged, and nothing is reserved any more."""
    settled = world.records("settled")
    assert len(settled) == len(world.records("granted"))
    charges = [charge["amounts"] for record in settled for charge in record["charges"]]
    total = [format_epsilon(sum(amounts)) for amounts in zip(*charges, strict=True)]

    def shown() -> bool:
        orders = world.block_status()["orders"]
        consumed = [order["consumed"] for order in orders]
        return consumed == total and {order["reserved"] for order in orders} == {"0"}

    world.until(shown, f"the block shows that {total} are consumed")
