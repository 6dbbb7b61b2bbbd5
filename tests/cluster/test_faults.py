"""Jobs that meet faults: the real trainer on two pods, in the embedded cluster.

Whatever is killed, hangs or is damaged, a job goes on and pays for its plan once, or it ends with a
message that says what to do and pays for the steps that it drew.
"""

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.cluster.faults import CLAIM, VICTIMS, RunningJob, kill, victims
from tests.cluster.world import OWNER, TEAM, World, block, fill_volumes, job, namespaces

from dpmoe_operator.local.stack import Stack

STEPS, EVERY = 12, 3
KILLS, KILLS_A_JOB = 20, 4


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A running stack with one block that opens a claim for checkpoints."""
    directory = tmp_path_factory.mktemp("stack")
    fill_volumes(directory / "volumes")
    (directory / "volumes" / OWNER / CLAIM).mkdir()
    claim = namespaces()[-1]
    claim["metadata"]["name"] = CLAIM
    access = {"namespace": TEAM, "models": ["models"], "outputs": [{"claimName": "results"}]}
    opened = [access | {"checkpoints": {"claimName": CLAIM}}]
    with Stack(directory) as stack:
        world = World(stack)
        world.apply(*namespaces(), claim)
        world.apply(block(access=opened, budget={"epsilon": "200", "delta": "1e-5"}))
        yield world


def start(world: World, name: str, **parallelism: Any) -> RunningJob:
    """Apply a job of two pods whose steps take long enough to be hit."""
    manifest = job(
        name,
        parallelism={"workers": 2, "expertParallel": 2, "timeoutSeconds": 60} | parallelism,
        checkpoint={"everySteps": EVERY},
        retries=20,
        resources={"cpu": "500m"},
    )
    manifest["spec"]["training"] |= {"logicalBatch": 100, "physicalBatch": 2, "steps": STEPS}
    world.apply(manifest)
    return RunningJob(world, name)


@pytest.fixture(scope="module")
def price(cluster: World) -> Any:
    """What the ledger charged for a run that nobody disturbed."""
    quiet = start(cluster, "quiet")
    assert quiet.end()["state"] == "Completed"
    [record] = quiet.settled()
    assert record["steps"] == STEPS
    return record["charges"]


@pytest.mark.slow
def test_kills_at_random_steps_cost_nothing_but_time(cluster: World, price: Any) -> None:
    seed = random.SystemRandom().randrange(2**32)
    choice = random.Random(seed)
    print(f"seed {seed}")
    story: list[str] = []
    while len(story) < KILLS:
        running = start(cluster, f"killed-{len(story)}")
        killed = disturb(running, min(KILLS_A_JOB, KILLS - len(story)), choice)
        status = running.end()
        story += [f"{running.name}: {each}" for each in killed]
        print(*story[-len(killed) :], sep="\n")
        assert status["state"] == "Completed", (seed, story, status)
        [record] = running.settled()
        assert (record["outcome"], record["steps"]) == ("Completed", STEPS), (seed, record)
        assert record["charges"] == price, (seed, story)


def disturb(running: RunningJob, kills: int, choice: random.Random) -> list[str]:
    """Kill so often, at random steps in order; what was hit."""
    killed: list[str] = []
    attempt = 1
    for step in sorted(choice.choices(range(1, STEPS - 2), k=kills)):
        running.wait_for_step(attempt, step)
        time.sleep(choice.uniform(0, 0.3))
        victim = choice.choice(VICTIMS)
        if running.is_over() or not kill(victims(running, victim)):
            return killed
        killed.append(f"{victim} at step {running.drawn(attempt)} of attempt {attempt}")
        attempt += victim != "operator"
    return killed
