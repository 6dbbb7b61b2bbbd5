"""Jobs that meet faults: the real trainer on two pods, in the embedded cluster.

Whatever is killed, hangs or is damaged, a job goes on and pays for its plan once, or it ends with a
message that says what to do and pays for the steps that it drew.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.faults import CLAIM, VICTIMS, RunningJob, flip, kill, victims
from tests.cluster.world import OWNER, TEAM, World, block, fill_volumes, job, namespaces

from dpmoe_operator.launch.launching import JOB_NAME
from dpmoe_operator.local.stack import Stack

STEPS, EVERY = 12, 3
KILLS, BLOWS_A_JOB = 20, 4


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A running stack with one block that opens a claim for checkpoints."""
    directory = tmp_path_factory.mktemp("stack")
    fill_volumes(directory / "volumes")
    saved = directory / "volumes" / OWNER / CLAIM
    saved.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "checkpoints", str(saved)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    claim = namespaces()[-1]
    claim["metadata"]["name"] = CLAIM
    access = {"namespace": TEAM, "models": ["models"], "outputs": [{"claimName": "results"}]}
    opened = [access | {"checkpoints": {"claimName": CLAIM}}]
    try:
        with Stack(directory) as stack:
            world = World(stack)
            world.apply(*namespaces(), claim)
            world.apply(block(access=opened, budget={"epsilon": "200", "delta": "1e-5"}))
            yield world
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(saved)], check=True)


def start(world: World, name: str, *, suspend: bool = False, **parallelism: Any) -> RunningJob:
    """Apply a job of two pods whose steps take long enough to be hit."""
    manifest = job(
        name,
        parallelism={"workers": 2, "expertParallel": 2, "timeoutSeconds": 60} | parallelism,
        checkpoint={"everySteps": EVERY},
        retries=20,
        suspend=suspend,
        resources={"cpu": "500m"},
    )
    manifest["spec"]["training"] |= {"logicalBatch": 50, "physicalBatch": 2, "steps": STEPS}
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
    """Two victims at a time, of which one may be who would have seen the other's end."""
    seed = random.SystemRandom().randrange(2**32)
    choice = random.Random(seed)
    print(f"seed {seed}")
    killed: list[str] = []
    while len(killed) < KILLS:
        running = start(cluster, f"killed-{len(killed)}")
        blows = min(BLOWS_A_JOB, (KILLS - len(killed) + 1) // 2)
        told = disturb(running, blows, choice)
        killed += told
        status = running.end()
        print(*told, sep="\n")
        assert status["state"] == "Completed", (seed, killed, status)
        assert paid(running) == ("Completed", STEPS, price), (seed, killed)


def disturb(running: RunningJob, blows: int, choice: random.Random) -> list[str]:
    """Kill two victims so often, at random steps in order; what was hit."""
    killed: list[str] = []
    attempt = 1
    for step in sorted(choice.choices(range(1, STEPS - 2), k=blows)):
        attempt = running.wait_for_step(step, attempt)
        time.sleep(choice.uniform(0, 0.3))
        if running.is_over():
            break
        chosen = choice.sample(VICTIMS, 2)
        pids = {victim: victims(running, victim) for victim in chosen}
        hit = [victim for victim in chosen if kill(pids[victim])]
        at = f"{running.name}, step {running.drawn(attempt)} of attempt {attempt}"
        killed += [f"{at}: {victim}" for victim in hit]
        attempt += any(victim != "operator" for victim in hit)
    return killed


@pytest.mark.slow
def test_hanging_rank_and_damaged_checkpoint_are_survived(cluster: World, price: Any) -> None:
    running = start(cluster, "hangs", timeoutSeconds=10)
    running.wait_for_step(4)
    patch = ("patch", "dpj", "hangs", "-n", TEAM, "--type=merge", "-p")
    more = '{"spec": {"parallelism": {"workers": 4, "expertParallel": 4}}}'
    # A real API server refuses this edit (test_crds.py). Where one gets through, the run that was
    # granted goes on with its own ranks.
    cluster.stack.kubectl(*patch, more)
    assert kill(running.processes(ranks=True, index=1), signal.SIGSTOP)
    last = running.wait_for_step(7, attempt=2)
    assert cluster.job("hangs")["status"]["restarts"] >= 1
    kill(running.processes(ranks=True))
    # Before the pods are replaced, a second later.
    older, newest = running.checkpoints()
    flip(newest / "rank-00001.safetensors", random.Random(0))
    status = running.end()
    assert status["state"] == "Completed", status
    assert paid(running) == ("Completed", STEPS, price)
    workload = cluster.get("jobs", running.workload, OWNER)
    assert workload["spec"]["completions"] == 2
    later = [running.steps(n) for n in range(last + 1, len(running.attempts()) + 1)]
    first = next(steps[0] for steps in later if steps)
    assert first == int(older.name.removeprefix("step-")) + 1, "the damaged one was not used"


@pytest.mark.slow
def test_no_whole_checkpoint_is_a_clear_end_and_charged_by_the_journal(cluster: World) -> None:
    running = start(cluster, "damaged")
    running.wait_for_step(7)
    kill(running.processes(ranks=True))
    drawn = max(running.drawn(n + 1) for n in range(len(running.attempts())))
    for path in running.checkpoints():
        flip(path / "rank-00000.safetensors", random.Random(0))
    status = running.end()
    assert (status["state"], status["reason"]) == ("Failed", "Refused"), status
    assert "no checkpoint is whole" in status["message"]
    assert "rank-00000.safetensors" in status["message"]
    assert paid(running)[:2] == ("Refused", drawn)
    assert status["stepsDone"] == drawn


def test_folder_of_another_run_is_refused_and_costs_nothing(cluster: World, price: Any) -> None:
    other = next(
        iter((cluster.stack.volumes / OWNER / CLAIM / TEAM).glob("*/attempt-0001.journal"))
    )
    running = start(cluster, "elsewhere", suspend=True)
    running.folder.mkdir()
    shutil.copy(other, running.folder)
    patch = ("patch", "dpj", "elsewhere", "-n", TEAM, "--type=merge", "-p")
    cluster.stack.kubectl(*patch, '{"spec": {"suspend": false}}')
    status = running.end()
    assert (status["state"], status["reason"]) == ("Failed", "Refused"), status
    assert "is the folder of run" in status["message"]
    assert paid(running)[:2] == ("Refused", 0)
    assert status["epsilonSpent"] == "0"


@pytest.mark.slow
def test_full_volume_is_waited_out(cluster: World, price: Any) -> None:
    if not os.path.ismount(cluster.stack.volumes / OWNER / CLAIM):
        reason = "needs a small volume, which only root may mount"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    running = start(cluster, "cramped")
    running.wait_for_step(4)
    filler = running.folder.parent / "filler"
    fill(filler)
    label = f"{JOB_NAME}=cramped"

    def failures() -> int:
        pods = cluster.stack.kubectl("get", "pods", "-n", OWNER, "-l", label, "-o", "json")
        return pods.count("make room")

    # The first of them meets it with a checkpoint, the second with the first line of its journal.
    cluster.until(lambda: failures() >= 2, "two attempts say that the volume is full")
    filler.unlink()
    status = running.end()
    assert status["state"] == "Completed", status
    assert paid(running) == ("Completed", STEPS, price)


def fill(path: Path) -> None:
    """Write until the volume has no byte left."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def paid(running: RunningJob) -> tuple[str, int, Any]:
    """How a job's one settlement calls its end, the steps it charges, and what it charges."""
    [record] = running.settled()
    return record["outcome"], record["steps"], record["charges"]
