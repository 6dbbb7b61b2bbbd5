"""The trainer's command on several ranks: whole runs, by torchrun and as pods start them."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.trainer.processes import free_port
from tests.trainer.resume.attempts import model_sums
from tests.trainer.runs import PlanMaker, Trainer

from dpmoe_trainer.contract import ExitCode, Outcome, TrainingReport

WITH_A_KNOWN_KEY = """
import sys
import dpmoe_trainer.secret as secret
secret.secrets.token_bytes = lambda count: b"k" * count
from dpmoe_trainer.__main__ import leave, main
leave(main(sys.argv[1:]))
"""

KILLED_WHILE_READING = """
import os, signal
import dpmoe_trainer.train
dpmoe_trainer.train.load_units = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


ADAPTERS = {"model__trainable": [], "model__lora": {"rank": 2, "alpha": 4.0}}
"""Trains adapters on attention and experts, in place of all parameters."""


def plan_for(
    make_plan: PlanMaker,
    volume: Path,
    workers: int,
    experts: int,
    dense: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Six steps, a checkpoint every second one."""
    parallel = {"workers": workers, "expertParallel": experts, "shardDense": dense}
    return make_plan(
        privacy__steps=6,
        privacy__epsilon=100.0,
        training__optimizer={"name": "adamw", "learningRate": 0.01, "warmupSteps": 2},
        checkpoint={"path": str(volume), "everySteps": 2},
        parallel=parallel | {"timeoutSeconds": 60},
        **more,
    )


@dataclass
class World:
    """The ranks of one run, a process each, as the pods of an Indexed Job start them anew."""

    folder: Path
    plan: dict[str, Any]
    port: int = field(default_factory=free_port)
    attempt: int = 0
    ranks: list[subprocess.Popen[str]] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    """Where each rank works, if not where the tests do."""
    pod: int = 1
    """Ranks of a pod."""
    script: str = WITH_A_KNOWN_KEY

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        file = self.folder / "plan.json"
        file.write_text(json.dumps(self.plan))
        world = self.plan["parallel"]["workers"]
        command = [sys.executable, "-c", self.script]
        command += ["--plan", str(file), "--output", str(self.output)]
        self.ranks = [
            subprocess.Popen(
                command,
                cwd=self.folders[rank] if self.folders else None,
                env=os.environ
                | {
                    "OMP_NUM_THREADS": "1",
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank % self.pod),
                    "WORLD_SIZE": str(world),
                    "LOCAL_WORLD_SIZE": str(self.pod),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(self.port),
                    "DPMOE_POD_UID": f"pod-{rank}-{self.attempt}",
                    "DPMOE_FAILURES": str(self.attempt),
                },
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        self.attempt += 1

    def wait(self) -> list[int]:
        """The exit codes, once all have ended."""
        self.words = [process.communicate(timeout=180)[1] for process in self.ranks]
        return [process.returncode for process in self.ranks]

    def report(self) -> TrainingReport:
        return TrainingReport.model_validate_json((self.output / "report.json").read_bytes())

    def drawn(self, volume: Path) -> int:
        """Steps that the journal tells of."""
        lines = [line for path in volume.glob("*.journal") for line in path.read_text().split("\n")]
        records = [json.loads(line) for line in lines[:-1] if line.endswith("}")]
        return max((record.get("drawn", 0) for record in records), default=0)

    def wait_for_step(self, volume: Path, step: int) -> None:
        while self.drawn(volume) < step:
            assert all(process.poll() is None for process in self.ranks), self.wait()
            time.sleep(0.01)


@pytest.fixture
def undisturbed(make_plan: PlanMaker, tmp_path: Path) -> dict[str, str]:
    """The files of the model of two ranks that nobody disturbs."""
    world = World(tmp_path / "quiet", plan_for(make_plan, tmp_path / "quiet-volume", 2, 2))
    world.start()
    assert world.wait() == [0, 0], world.words
    return model_sums(world.output)


@pytest.mark.parametrize("victims", [[0], [1], [0, 1]], ids=["rank 0", "rank 1", "all ranks"])
def test_killed_ranks_go_on_to_the_same_model_and_the_same_cost(
    victims: list[int], make_plan: PlanMaker, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    volume = tmp_path / "volume"
    world = World(tmp_path / "killed", plan_for(make_plan, volume, 2, 2))
    world.start()
    world.wait_for_step(volume, random.randint(1, 5))
    for victim in victims:
        world.ranks[victim].send_signal(signal.SIGKILL)
    codes = world.wait()
    for rank, code in enumerate(codes):
        expected = -signal.SIGKILL if rank in victims else ExitCode.PEER_LOST
        assert code == expected, world.words[rank]
    world.start()
    assert world.wait() == [0, 0], world.words
    report = world.report()
    assert report.outcome is Outcome.COMPLETED
    assert report.mechanism.steps == 6
    assert report.attempts == ("pod-0-0", "pod-0-1")
    assert model_sums(world.output) == undisturbed


@pytest.mark.parametrize("trained", [{}, ADAPTERS], ids=["all", "adapters"])
def test_a_checkpoint_of_four_ranks_goes_on_with_two_and_with_one(
    make_plan: PlanMaker, tmp_path: Path, trained: dict[str, Any]
) -> None:
    volume = tmp_path / "volume"
    world = World(tmp_path / "run", plan_for(make_plan, volume, 4, 4, **trained))
    world.start()
    world.wait_for_step(volume, 3)
    world.ranks[3].send_signal(signal.SIGKILL)
    assert world.wait()[3] == -signal.SIGKILL
    for workers, experts, dense in ((2, 2, True), (1, 1, False)):
        world.plan = plan_for(make_plan, volume, workers, experts, dense, **trained)
        world.start()
        if workers == 2:
            world.wait_for_step(volume, 5)
            world.ranks[0].send_signal(signal.SIGKILL)
            world.wait()
    assert world.wait() == [0], world.words
    assert world.report().mechanism.steps == 6
    # The same plan to the letter: what a model has afresh, as adapters, starts from its digest.
    shutil.rmtree(volume)
    quiet = World(tmp_path / "quiet", plan_for(make_plan, volume, 1, 1, **trained))
    quiet.start()
    assert quiet.wait() == [0]
    one, other = (load_file(w.output / "model.safetensors") for w in (world, quiet))
    # Sums in another order differ in their last bits, and AdamW's first steps enlarge these.
    for name, value in one.items():
        assert float((value - other[name]).abs().max()) < 2e-3, name


def test_ranks_compute_in_half_precision(make_plan: PlanMaker, tmp_path: Path) -> None:
    plan = plan_for(make_plan, tmp_path / "volume", 2, 2, dense=True)
    plan["training"]["precision"] = "bfloat16"
    world = World(tmp_path / "run", plan)
    world.start()
    assert world.wait() == [0, 0], world.words
    assert world.report().evaluation is not None
    saved = load_file(world.output / "model.safetensors")
    assert {str(each.dtype) for each in saved.values()} == {"torch.float32"}


def give_tables(world: World) -> list[list[str]]:
    """Has each rank look for its tables in a folder of its own; returns the lines of both."""
    tables = [world.plan["blocks"][0]["data"], world.plan["evaluation"]["data"]]
    lines = [Path(data["path"]).read_text().splitlines() for data in tables]
    for name, data in zip(("private", "public"), tables, strict=True):
        data["path"] = f"/proc/self/cwd/{name}.jsonl"
    world.folders = [world.folder / str(rank) for rank in range(world.plan["parallel"]["workers"])]
    for folder in world.folders:
        folder.mkdir(parents=True)
    return lines


@pytest.mark.parametrize("pod", [1, 2])
def test_pods_that_read_different_tables_take_no_step(
    pod: int, make_plan: PlanMaker, tmp_path: Path
) -> None:
    plan = plan_for(make_plan, tmp_path / "volume", 2 * pod, 2)
    world = World(tmp_path / "run", plan, pod=pod)
    private, public = give_tables(world)
    for rank, folder in enumerate(world.folders):
        # The second pod has its rows in another order: it would draw others by the same numbers.
        lines = sorted(private, reverse=rank >= pod)
        (folder / "private.jsonl").write_text("\n".join(lines))
        (folder / "public.jsonl").write_text("\n".join(public))
    world.start()
    assert world.wait() == [ExitCode.BAD_DATA] * 2 * pod, world.words
    report = world.report()
    assert "different rows" in report.message
    assert report.mechanism.steps == 0


def test_a_pods_first_rank_reads_for_all(
    make_plan: PlanMaker, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    world = World(tmp_path / "run", plan_for(make_plan, tmp_path / "volume", 2, 2), pod=2)
    private, public = give_tables(world)
    (world.folders[0] / "private.jsonl").write_text("\n".join(private))
    (world.folders[0] / "public.jsonl").write_text("\n".join(public))
    world.start()
    assert world.wait() == [0, 0], world.words
    assert model_sums(world.output) == undisturbed
    evaluation = world.report().evaluation
    assert evaluation is not None
    assert evaluation.examples == len(public)


@pytest.mark.parametrize("faulty", [0, 1])
def test_what_one_pod_cannot_read_all_refuse(
    faulty: int, make_plan: PlanMaker, tmp_path: Path
) -> None:
    world = World(tmp_path / "run", plan_for(make_plan, tmp_path / "volume", 4, 2), pod=2)
    private, _ = give_tables(world)
    good = 1 - faulty
    (world.folders[2 * good] / "private.jsonl").write_text("\n".join(private))
    world.start()
    assert world.wait() == [ExitCode.BAD_DATA] * 4, world.words
    report = world.report()
    for words in (report.message, *world.words[1:]):
        assert "blocks[0].data.path: '/proc/self/cwd/private.jsonl' does not exist" in words
    assert report.mechanism.steps == 0


def test_a_rank_that_is_killed_while_it_reads_ends_the_others(
    make_plan: PlanMaker, tmp_path: Path
) -> None:
    world = World(tmp_path / "run", plan_for(make_plan, tmp_path / "volume", 3, 1), pod=3)
    world.script = KILLED_WHILE_READING + WITH_A_KNOWN_KEY
    started = time.monotonic()
    world.start()
    assert world.wait() == [-signal.SIGKILL, *[ExitCode.PEER_LOST] * 2], world.words
    assert time.monotonic() - started < world.plan["parallel"]["timeoutSeconds"]


def test_torchrun_needs_nothing_but_the_plan(
    make_plan: PlanMaker, trainer: Trainer, tmp_path: Path
) -> None:
    plan = make_plan(parallel={"processes": 2, "expertParallel": 2, "timeoutSeconds": 60})
    file = trainer.write(plan)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "dpmoe_trainer"]
    command += ["--plan", str(file), "--output", str(trainer.output)]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    report = trainer.report()
    assert report is not None
    assert report.outcome is Outcome.COMPLETED
    assert (trainer.output / "model.safetensors").exists()


def test_one_command_starts_all_ranks_of_a_machine(make_plan: PlanMaker, trainer: Trainer) -> None:
    run = trainer.spawn(
        make_plan(parallel={"processes": 2, "expertParallel": 2, "timeoutSeconds": 60})
    )
    assert run.code == ExitCode.COMPLETED, run.stderr
    assert run.report is not None
    assert run.report.evaluation is not None


def test_experts_that_ranks_cannot_share_are_refused_by_name(
    make_plan: PlanMaker, trainer: Trainer
) -> None:
    run = trainer.spawn(
        make_plan(parallel={"processes": 3, "expertParallel": 3, "timeoutSeconds": 60})
    )
    assert run.code == ExitCode.BAD_MODEL, run.stderr
    assert run.report is not None
    assert "expertParallel" in run.report.message
    assert run.report.mechanism.steps == 0
