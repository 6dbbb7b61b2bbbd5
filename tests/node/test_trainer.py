"""The trainer's own image at work in real containers: several pods, and a kill in the middle."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from os import chown
from pathlib import Path

import pytest
from safetensors import safe_open
from tests.node.cluster import Node
from tests.node.conftest import started
from tests.node.image import USER, WHOLE_IMAGE, build_whole_image
from tests.node.trainer_image import lacking, trainer_image
from tests.node.world import ROWS, TEAM, Object, World, block, job
from tests.tiny import WORDS, save_mixtral, sentences, write_rows

MEMORY = 1024
"""MiB of a pod."""


class TrainerWorld(World):
    """A world in which the operator's own image is the whole trainer, and jobs are restarted."""

    image = WHOLE_IMAGE
    claims = (*World.claims, "checkpoints")

    def fill(self) -> None:
        write_rows(self.folder / "notes" / "train.jsonl", sentences(ROWS))
        for name, mode in {"tiny": 0o644, "private": 0o600}.items():
            model = self.folder / "models" / name
            save_mixtral(model, WORDS)
            (model / "model.safetensors").chmod(mode)
        for claim in ("results", "checkpoints"):
            (self.folder / claim).chmod(0o700)
            chown(self.folder / claim, USER, USER)

    def block(self) -> Object:
        opened = block()
        opened["spec"]["access"][0]["checkpoints"] = {"claimName": "checkpoints"}
        return opened

    def attempts(self, name: str) -> list[list[int]]:
        """The steps that each attempt of a run drew, by its journal."""
        uid = self.job(name)["metadata"]["uid"]
        journals = sorted((self.folder / "checkpoints" / TEAM / uid).glob("*.journal"))
        lines = [[json.loads(line) for line in each.read_text().splitlines()] for each in journals]
        return [[line["drawn"] for line in each if "drawn" in line] for each in lines]


HERE, DOCKERFILE = "packages of this machine", "Dockerfile"
"""What the image is made of; by the Dockerfile it takes minutes."""

BY_DOCKERFILE = pytest.mark.trainer_image


@pytest.fixture(scope="module")
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TrainerWorld]:
    """A node of its own: the operator there starts the trainer's image, of this or that origin."""
    from_here = request.param == HERE
    with ExitStack() as stack:
        node = stack.enter_context(started([] if from_here else lacking()))
        world = TrainerWorld(node, tmp_path_factory.mktemp("world"))
        world.build()
        world.start_operator(stack)
        with tempfile.TemporaryDirectory() as folder:
            image = nullcontext(build_whole_image(Path(folder))) if from_here else trainer_image()
            with image as archive:
                node.load(archive)
        yield world


def training(name: str, *, workers: int, steps: int, model: str = "tiny") -> Object:
    """A job on the tiny mixture, its four experts spread over all pods."""
    manifest = job(
        name,
        model=model,
        steps=steps,
        parallelism={"workers": workers, "expertParallel": workers, "timeoutSeconds": 60},
        checkpoint={"everySteps": 10},
        resources={"cpu": "800m", "memory": f"{MEMORY}Mi", "sharedMemory": "2Gi"},
    )
    manifest["spec"]["training"]["maxTokens"] = 16
    return manifest


def until_over(world: TrainerWorld, name: str) -> Object:
    return world.until_status(name, lambda s: s.get("completionTime"), "is over", seconds=300)


def assert_completed_and_charged_once(world: TrainerWorld, name: str) -> Object:
    status = until_over(world, name)
    granted, settled = world.until_settled(name)
    assert (status["state"], settled["outcome"]) == ("Completed", "Completed"), status
    assert settled["steps"] == granted["steps"]
    assert settled["charges"] == granted["charges"]
    assert sum(charge["amounts"][-1] for charge in granted["charges"]) > 0
    folder = world.results / status["output"].removeprefix("/dpmoe/outputs/results/")
    with safe_open(folder / "model.safetensors", "pt") as model:
        experts = [key for key in model.keys() if "experts" in key]  # noqa: SIM118
        assert experts, "the whole mixture is there"
    return status


def fill_memory(node: Node, pod: Object) -> None:
    """Take a container's memory away by a file in it: its own processes are then the largest."""
    place = pod["metadata"]["namespace"], pod["metadata"]["name"]
    program = (
        "file = open('/dev/shm/full', 'wb', buffering=0)\n"
        f"for _ in range({2 * MEMORY}): file.write(bytes(1 << 20))"
    )
    # It may be killed itself, or end with the container.
    script = 'kubectl exec -n "$0" "$1" -- python -c "$2" || true'
    node.exec("sh", "-c", script, *place, program, timeout=120)


@pytest.mark.parametrize(
    "world", [HERE, pytest.param(DOCKERFILE, marks=BY_DOCKERFILE)], indirect=True
)
def test_two_pods_share_the_experts_and_leave_one_model(world: TrainerWorld) -> None:
    world.apply(training("pair", workers=2, steps=20))
    status = assert_completed_and_charged_once(world, "pair")
    assert status.get("restarts", 0) == 0
    assert len(world.pods("pair")) == 2
    assert world.attempts("pair") == [list(range(1, 21))]


@pytest.mark.parametrize(
    ("world", "workers", "victim"),
    [
        (HERE, 2, 0),
        pytest.param(DOCKERFILE, 2, 0, marks=BY_DOCKERFILE),
        pytest.param(DOCKERFILE, 1, 0, marks=BY_DOCKERFILE),
        pytest.param(DOCKERFILE, 2, 1, marks=BY_DOCKERFILE),
    ],
    indirect=["world"],
)
def test_pod_killed_for_memory_goes_on_and_is_charged_once(
    world: TrainerWorld, workers: int, victim: int
) -> None:
    name, steps = f"killed-{victim}-of-{workers}", 200 // workers
    world.apply(training(name, workers=workers, steps=steps))
    world.until(lambda: past_a_checkpoint(world, name), f"{name} is past a checkpoint", 180)
    [pod] = [pod for pod in world.pods(name) if index_of(pod) == victim]
    fill_memory(world.node, pod)
    status = assert_completed_and_charged_once(world, name)

    killed = [end for each in world.pods(name) if index_of(each) == victim for end in ends_of(each)]
    killed = [end for end in killed if end["reason"] == "OOMKilled"]
    # Only cgroup v2 kills a container's processes together; a rank alone is reported by its parent.
    [code] = [end["exitCode"] for end in killed]
    assert code == 137 or (workers > 1 and code == 1)
    assert status["restarts"] >= 1
    first, *_, last = world.attempts(name)
    assert 1 < last[0] <= first[-1] + 1, "it went on from a checkpoint"
    assert last[-1] == steps


@pytest.mark.parametrize("world", [pytest.param(DOCKERFILE, marks=BY_DOCKERFILE)], indirect=True)
def test_model_that_the_trainers_user_may_not_read_costs_nothing(world: TrainerWorld) -> None:
    world.apply(training("unread", workers=1, steps=20, model="private"))
    status = until_over(world, "unread")
    assert (status["state"], status["reason"]) == ("Failed", "Refused"), status
    assert "cannot be read (Permission denied): let user 65532 read it" in status["message"]
    assert status["epsilonSpent"] == "0"


def past_a_checkpoint(world: TrainerWorld, name: str) -> bool:
    assert "completionTime" not in (status := world.status(name)), status
    attempts = world.attempts(name)
    return bool(attempts and attempts[0] and attempts[0][-1] > 10)


def index_of(pod: Object) -> int:
    """Which of its job's pods this is."""
    return int(pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"])


def ends_of(pod: Object) -> list[Object]:
    """How its containers ended, if they did."""
    states = [status["state"] for status in pod["status"].get("containerStatuses", [])]
    return [state["terminated"] for state in states if "terminated" in state]
