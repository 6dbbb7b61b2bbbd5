"""Runs that are killed or stopped, and go on: what they release, count and say."""

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from tests.trainer.processes import free_port
from tests.trainer.resume.attempts import Killed, killed, model_sums, raising
from tests.trainer.runs import Trainer

import dpmoe_trainer.train
from dpmoe_trainer.contract import ExitCode, Outcome
from dpmoe_trainer.dp.keys import NoiseKey
from dpmoe_trainer.prepare import repeat_exactly


def test_a_run_that_goes_on_can_be_asked_for_its_progress_while_it_imports(
    trainer: Trainer,
    plan: dict[str, Any],
    fixed_key: None,
    volume: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The operator asks at any time, in a second thread of the trainer."""
    killed(trainer, plan, monkeypatch, 3)
    port, over = free_port(), threading.Event()
    shown: list[int] = []

    def ask() -> None:
        while not over.wait(0.01):
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/progress") as answer:
                shown.append(json.loads(answer.read())["step"])

    monkeypatch.setenv("DPMOE_PROGRESS_PORT", str(port))
    monkeypatch.setenv("DPMOE_POD_UID", "pod-1")
    asking = threading.Thread(target=ask)
    asking.start()
    run = trainer.spawn(plan)
    over.set()
    asking.join()
    assert run.code == ExitCode.COMPLETED, run.stderr
    assert shown[0] == 4, "what was drawn before is known at once"


@pytest.mark.parametrize("deaths", [[0], [1], [3], [5], [5, 5, 5], [1, 0, 4, 2]])
def test_a_killed_run_ends_with_the_same_model_and_count(
    deaths: list[int],
    trainer: Trainer,
    plan: dict[str, Any],
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drew: list[int] = []
    draw = dpmoe_trainer.train.poisson_draw

    def noted(units: int, rate: float, key: NoiseKey, step: int) -> Any:
        drew.append(step)
        return draw(units, rate, key, step)

    monkeypatch.setattr("dpmoe_trainer.train.poisson_draw", noted)
    pods = []
    for death in deaths:
        pods.append(f"pod-{len(pods)}")
        monkeypatch.setenv("DPMOE_POD_UID", pods[-1])
        if drew and death < max(drew) // 2 * 2:
            continue  # it is past that step
        killed(trainer, plan, monkeypatch, death)
        assert drew[-1] == death
    monkeypatch.setenv("DPMOE_POD_UID", "last")
    monkeypatch.setenv("DPMOE_FAILURES", str(len(deaths)))
    run = trainer.run(plan)
    assert run.code == ExitCode.COMPLETED, run.stderr
    assert run.report is not None
    assert run.report.mechanism.steps == 6
    assert set(run.report.attempts) <= {*pods, "last"}
    assert run.report.attempts[-1] == "last"
    assert run.report.attempts[0] == "pod-0"
    assert model_sums(trainer.output) == undisturbed


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Torch's settings are as they were, afterwards."""
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@pytest.mark.parametrize(("device", "asked"), [("cuda", True), ("cpu", False)])
def test_a_gpu_is_asked_for_sums_that_a_restart_can_repeat(
    device: str, asked: bool, forgetful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    repeat_exactly(torch.device(device))
    assert torch.are_deterministic_algorithms_enabled() is asked
    assert torch.is_deterministic_algorithms_warn_only_enabled() is asked
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if asked else None)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_only_a_run_that_may_go_on_asks_for_that(
    checkpoint: bool, trainer: Trainer, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr("dpmoe_trainer.train.repeat_exactly", asked.append)
    if not checkpoint:
        del plan["checkpoint"]
    assert trainer.run(plan).code == ExitCode.COMPLETED
    assert len(asked) == checkpoint


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"name": "sgd", "learningRate": 0.1, "momentum": 0.9}, None),
        ({"name": "adambc", "learningRate": 0.01}, "bias"),
        ({"name": "adamw", "learningRate": 0.01}, "loss"),
    ],
)
def test_every_optimiser_and_balancing_goes_on(
    changes: dict[str, Any],
    name: str | None,
    trainer: Trainer,
    plan: dict[str, Any],
    fixed_key: None,
    volume: Path,
    tiny_bert: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan["training"]["optimizer"] = changes
    if name is not None:
        plan["model"] |= {
            "path": str(tiny_bert),
            "upcycle": {"experts": 4, "topK": 2, "layers": [0, 1]},
        }
        plan["training"]["balancing"] = {
            "method": "released-load",
            "strength": 0.1,
            "through": name,
            "loadShare": 0.1,
        }
    first = trainer.run(plan)
    assert first.code == ExitCode.COMPLETED, first.stderr
    sums = model_sums(trainer.output)
    shutil.rmtree(trainer.output)
    shutil.rmtree(volume)
    killed(trainer, plan, monkeypatch, 3)
    assert trainer.run(plan).code == ExitCode.COMPLETED
    assert model_sums(trainer.output) == sums


def test_a_completed_run_leaves_neither_key_nor_checkpoint_and_completes_again(
    trainer: Trainer, plan: dict[str, Any], volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trainer.run(plan)
    assert first.report is not None
    assert {path.suffix for path in volume.iterdir()} == {".journal"}

    monkeypatch.setattr("dpmoe_trainer.train.train", None)
    monkeypatch.setenv("DPMOE_FAILURES", "1")
    again = trainer.run(plan)
    assert again.code == ExitCode.COMPLETED
    assert again.report is not None
    assert len(again.report.attempts) == 2
    assert again.report == first.report.model_copy(
        update={"attempts": again.report.attempts, "message": again.report.message}
    )

    (trainer.output / "config.json").unlink()
    gone = trainer.run(plan)
    assert gone.code == ExitCode.BAD_CHECKPOINT
    assert "holds none" in gone.stderr


def test_a_kill_between_the_models_last_file_and_the_journal_saves_again(
    trainer: Trainer,
    plan: dict[str, Any],
    undisturbed: dict[str, str],
    volume: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("dpmoe_trainer.journal.Journal.complete", raising(Killed()))
        with pytest.raises(Killed):
            trainer.run(plan)
    assert (trainer.output / "config.json").exists()
    (trainer.output / ".partial-left").mkdir()
    (trainer.output / "model.safetensors").write_bytes(b"torn")
    run = trainer.run(plan)
    assert run.code == ExitCode.COMPLETED, run.stderr
    assert model_sums(trainer.output) == undisturbed
    assert run.report is not None
    assert run.report.evaluation is not None


def test_a_kill_while_the_key_is_destroyed_is_made_good(
    trainer: Trainer, plan: dict[str, Any], volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("dpmoe_trainer.resume.destroy_key", raising(Killed()))
        with pytest.raises(Killed):
            trainer.run(plan)
    assert (volume / "key").exists()
    assert trainer.run(plan).code == ExitCode.COMPLETED
    assert {path.suffix for path in volume.iterdir()} == {".journal"}


def test_a_newer_attempt_stops_the_older_before_it_draws(
    trainer: Trainer, plan: dict[str, Any], volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older one, on a node that was thought lost, comes back in the middle of step 3."""
    drew: list[int] = []
    draw = dpmoe_trainer.train.poisson_draw

    def overtaken(units: int, rate: float, key: NoiseKey, step: int) -> Any:
        drew.append(step)
        if step == 3:
            (volume / "attempt-0002.journal").write_text("")
        return draw(units, rate, key, step)

    monkeypatch.setattr("dpmoe_trainer.train.poisson_draw", overtaken)
    run = trainer.run(plan)
    assert run.code == ExitCode.PEER_LOST
    assert run.report is not None
    assert run.report.outcome is Outcome.FAILED
    assert drew == [0, 1, 2, 3]
    assert run.report.mechanism.steps == 4
    assert not list(volume.glob("step-000000004*")), "nor does it write a checkpoint"


def slow(plan: dict[str, Any], steps: int) -> dict[str, Any]:
    plan["privacy"] |= {"steps": steps, "epsilon": 1e9}
    return plan


def journalled(volume: Path) -> int:
    lines = [line for path in volume.glob("*.journal") for line in path.read_text().split("\n")]
    return max((json.loads(line)["drawn"] for line in lines if line.startswith('{"dr')), default=0)


def wait_for(process: subprocess.Popen[bytes], what: Callable[[], bool]) -> None:
    for _ in range(12000):
        if process.poll() is not None or what():
            return
        time.sleep(0.005)
    raise AssertionError("it never came")


@pytest.mark.slow
def test_sigkill_at_any_time_changes_neither_model_nor_count(
    trainer: Trainer, plan: dict[str, Any], volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes, real kills: early in the imports, in steps, in checkpoints, while saving."""
    steps = 40
    plan = slow(plan, steps)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DPMOE_POD_UID": "pod"}
    volume.mkdir()
    chance = random.Random(7)
    key = b""
    deaths = (0, 12, 27, 38)
    for death in deaths:
        process = subprocess.Popen(
            trainer.command(plan),
            env=environment | {"DPMOE_POD_UID": f"pod-{death}"},
            stderr=subprocess.DEVNULL,
        )
        wait_for(process, lambda: any(volume.iterdir()) and journalled(volume) >= death)  # noqa: B023
        time.sleep(chance.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        key = (volume / "key").read_bytes() if (volume / "key").exists() else b""
    assert process.returncode == -signal.SIGKILL
    run = trainer.spawn(plan)
    assert run.code == ExitCode.COMPLETED, run.stderr
    assert run.report is not None
    assert run.report.mechanism.steps == steps
    assert run.report.attempts[:-1] == tuple(f"pod-{n}" for n in deaths)
    assert not (volume / "key").exists()

    sums = model_sums(trainer.output)
    shutil.rmtree(trainer.output)
    shutil.rmtree(volume)
    volume.mkdir()
    (trainer.folder / "key").write_bytes(key)
    monkeypatch.setattr("dpmoe_trainer.secret.secrets.token_bytes", lambda count: key[:count])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert trainer.run(plan).code == ExitCode.COMPLETED
    assert model_sums(trainer.output) == sums


@pytest.mark.slow
def test_sigterm_keeps_the_step_and_the_next_process_goes_on(
    trainer: Trainer, plan: dict[str, Any], volume: Path
) -> None:
    plan = slow(plan, 200)
    plan["checkpoint"]["everySteps"] = 1000
    process = subprocess.Popen(
        trainer.command(plan),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    wait_for(process, lambda: journalled(volume) >= 3)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == ExitCode.STOPPED, stderr
    report = trainer.report()
    assert report is not None
    assert report.outcome is Outcome.STOPPED
    assert report.mechanism.steps == journalled(volume) < 200
    assert "can go on" in report.message
    (kept,) = volume.glob("step-*")
    assert int(kept.name.removeprefix("step-")) == report.mechanism.steps
    run = trainer.spawn(plan)
    assert run.code == ExitCode.COMPLETED
    assert journalled(volume) == 200
