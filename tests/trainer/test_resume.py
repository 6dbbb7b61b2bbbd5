"""Runs that are killed, stopped or damaged, and go on: what they release, count and say."""

import hashlib
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
from tests.trainer.runs import PlanMaker, Trainer, plan_of

import dpmoe_trainer.train
from dpmoe_trainer.contract import ExitCode, Outcome
from dpmoe_trainer.dp.keys import NoiseKey
from dpmoe_trainer.dp.noise import add_noise
from dpmoe_trainer.errors import (
    BadCheckpoint,
    BadData,
    BadModel,
    BadPlan,
    ChangedData,
    UncoveredMechanism,
)
from dpmoe_trainer.journal import open_journal
from dpmoe_trainer.prepare import repeat_exactly

KEY = b"k" * 32


def model_sums(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "report.json"
    }


@pytest.fixture
def plan(make_plan: PlanMaker, tmp_path: Path) -> dict[str, Any]:
    """Six steps, a checkpoint every second one."""
    return make_plan(
        privacy__steps=6,
        privacy__epsilon=100.0,
        training__optimizer={"name": "adamw", "learningRate": 0.01, "warmupSteps": 2},
        checkpoint={"path": str(tmp_path / "volume"), "everySteps": 2},
    )


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    return tmp_path / "volume"


@pytest.fixture
def fixed_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpmoe_trainer.secret.secrets.token_bytes", lambda count: KEY[:count])
    monkeypatch.setenv("DPMOE_POD_UID", "pod-0")


@pytest.fixture
def undisturbed(
    trainer: Trainer, plan: dict[str, Any], fixed_key: None, volume: Path
) -> dict[str, str]:
    """The files of the model of a run that nobody disturbs."""
    assert trainer.run(plan).code == ExitCode.COMPLETED
    sums = model_sums(trainer.output)
    shutil.rmtree(trainer.output)
    shutil.rmtree(volume)
    return sums


class Killed(BaseException):
    """Ends a run as a kill would: nothing after it runs, no report is written."""


def die_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException | None = None) -> None:
    def dying(*arguments: Any, **more: Any) -> Any:
        if arguments[-1] == step:
            raise error or Killed
        return add_noise(*arguments, **more)

    monkeypatch.setattr("dpmoe_trainer.train.add_noise", dying)


def killed(
    trainer: Trainer, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        die_at(patch, step)
        with pytest.raises(Killed):
            trainer.run(plan)


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


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    return fail


def last_rank_file(volume: Path, steps: int) -> Path:
    return volume / f"step-{steps:09d}" / "rank-00000.safetensors"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": lambda path: flip(path),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "gone": lambda path: path.unlink(),
    "no manifest": lambda path: (path.parent / "manifest.json").unlink(),
    "half a manifest": lambda path: os.truncate(path.parent / "manifest.json", 20),
    "another list": lambda path: flip(path.with_suffix(".json")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage: str,
    trainer: Trainer,
    plan: dict[str, Any],
    undisturbed: dict[str, str],
    volume: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed(trainer, plan, monkeypatch, 5)
    DAMAGES[damage](last_rank_file(volume, 4))
    run = trainer.run(plan)
    assert run.code == ExitCode.COMPLETED, run.stderr
    assert run.report is not None
    assert "step-000000004" in run.report.message
    assert "went on from step 2" in run.report.message
    assert run.report.mechanism.steps == 6
    assert model_sums(trainer.output) == undisturbed


def test_no_whole_checkpoint_is_a_refusal_that_names_the_files(
    trainer: Trainer, plan: dict[str, Any], volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(trainer, plan, monkeypatch, 5)
    for steps in (2, 4):
        flip(last_rank_file(volume, steps))
    run = trainer.run(plan)
    assert (run.code, run.report and run.report.outcome) == (
        ExitCode.BAD_CHECKPOINT,
        Outcome.REFUSED,
    )
    assert run.report is not None
    assert run.report.mechanism.steps == 6, "the sixth was drawn when it was killed"
    assert "rank-00000.safetensors has another SHA-256" in run.report.message
    assert "apply the job anew" in run.report.message


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_a_model_that_may_be_seen_is_not_made_again_from_steps_drawn_anew(
    damage: str,
    trainer: Trainer,
    plan: dict[str, Any],
    volume: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("dpmoe_trainer.journal.Journal.complete", raising(Killed()))
        with pytest.raises(Killed):
            trainer.run(plan)
    seen = model_sums(trainer.output)
    last = last_rank_file(volume, 6)
    if damage == "gone":
        shutil.rmtree(last.parent)
    else:
        flip(last)
    run = trainer.run(plan)
    assert run.code == ExitCode.BAD_CHECKPOINT
    assert run.report is not None
    assert run.report.mechanism.steps == 6
    assert "no checkpoint of step 6, after which the run began to save" in run.report.message
    assert model_sums(trainer.output) == seen


def change(path: Path, **row: Any) -> None:
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([json.dumps(json.loads(first) | row) + "\n", *rest]))


@pytest.mark.parametrize("row", [{"label": 1}, {"text": "another"}, {"user": "another"}])
def test_steps_are_not_drawn_again_from_other_rows(
    row: dict[str, Any],
    trainer: Trainer,
    plan: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    private = tmp_path / "private.jsonl"
    rows = [json.loads(line) | {"user": f"u{n}"} for n, line in enumerate(private.open())]
    private.write_text("".join(json.dumps(each) + "\n" for each in rows))
    plan["blocks"][0]["unit"] = {"kind": "user", "column": "user"}
    change(private, label=0, user="u1")
    before = private.read_text()
    killed(trainer, plan, monkeypatch, 3)
    change(private, **row)
    run = trainer.run(plan)
    assert run.code == ExitCode.BAD_DATA
    assert run.report is not None
    assert run.report.outcome is Outcome.REFUSED
    assert run.report.mechanism.steps == 4
    assert "the 4 steps of this run were drawn from" in run.report.message
    private.write_text(before)
    assert trainer.run(plan).code == ExitCode.COMPLETED


def test_tables_may_change_until_a_step_is_drawn(
    trainer: Trainer, plan: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("dpmoe_trainer.resume.Run.draw", raising(Killed()))
        with pytest.raises(Killed):
            trainer.run(plan)
    change(tmp_path / "private.jsonl", text="another")
    assert trainer.run(plan).code == ExitCode.COMPLETED


def test_a_lost_key_charges_all(
    trainer: Trainer, plan: dict[str, Any], volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(trainer, plan, monkeypatch, 1)
    (volume / "key").unlink()
    run = trainer.run(plan)
    assert run.code == ExitCode.JOURNAL_LOST
    assert run.report is not None
    assert run.report.mechanism.steps == 6
    assert f"{volume / 'key'} is missing" in run.report.message


def test_a_lost_journal_is_refused_before_anything_is_loaded(
    trainer: Trainer, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPMOE_FAILURES", "2")
    monkeypatch.setattr("dpmoe_trainer.train.train", None)
    run = trainer.run(plan)
    assert run.code == ExitCode.JOURNAL_LOST
    assert run.report is not None
    assert run.report.mechanism.steps == 6, "what is unknown counts in full"
    assert "2 pods of this run failed before" in run.report.message


FAULTS = {
    "the device is full": ("prepare.read", RuntimeError("CUDA out of memory")),
    "the hub is away": ("pretrained.resolve", ConnectionError("unreachable")),
    "the output is away": ("output.tempfile.TemporaryFile", OSError(5, "Input/output error")),
    "the output is full": ("output.FolderTarget.check_room", BadPlan("full")),
    "a table is away": ("data.sources._open", OSError(116, "Stale file handle")),
    "a checkpoint is away": ("checkpoint._sum", OSError(5, "Input/output error")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_may_pass_does_not_refuse_a_run_that_drew(
    fault: str,
    trainer: Trainer,
    plan: dict[str, Any],
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed(trainer, plan, monkeypatch, 3)
    place, error = FAULTS[fault]
    with monkeypatch.context() as patch:
        patch.setattr(f"dpmoe_trainer.{place}", raising(error))
        run = trainer.run(plan)
    assert run.code == ExitCode.CRASHED, run.stderr
    assert run.report is not None
    assert (run.report.outcome, run.report.mechanism.steps) == (Outcome.FAILED, 4)
    assert trainer.run(plan).code == ExitCode.COMPLETED
    assert model_sums(trainer.output) == undisturbed


@pytest.mark.parametrize(("failures", "code"), [("0", ExitCode.BAD_MODEL), ("1", ExitCode.CRASHED)])
def test_a_fault_before_the_first_step_refuses_only_who_was_alone(
    failures: str,
    code: ExitCode,
    trainer: Trainer,
    plan: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("dpmoe_trainer.train.train", raising(Killed()))
        with pytest.raises(Killed):
            trainer.run(plan)
    monkeypatch.setenv("DPMOE_FAILURES", failures)
    monkeypatch.setattr("dpmoe_trainer.prepare.read", raising(RuntimeError()))
    run = trainer.run(plan)
    assert run.code == code
    assert run.report is not None
    assert run.report.mechanism.steps == 0


@pytest.mark.parametrize("told_by", ["journal", "environment", None])
def test_ranks_without_a_journal_know_that_the_run_had_begun(
    told_by: str | None,
    trainer: Trainer,
    plan: dict[str, Any],
    volume: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What one rank ends with ends the Job: so none may refuse what may pass."""
    plan["parallel"] = {"processes": 2}
    if told_by == "journal":
        open_journal(volume, plan_of(plan).run_digest(), "pod", 0).draw(1)
    monkeypatch.setenv("DPMOE_RESUMED", "true" if told_by == "environment" else "")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for error in (BadPlan("p"), BadModel("m"), BadData("d")):
        monkeypatch.setattr("dpmoe_trainer.train.train", raising(error))
        assert trainer.run(plan).code == (ExitCode.CRASHED if told_by else error.code)
    for final in (ChangedData("c"), UncoveredMechanism("u"), BadCheckpoint("b")):
        monkeypatch.setattr("dpmoe_trainer.train.train", raising(final))
        assert trainer.run(plan).code == final.code


def test_a_plan_that_cannot_be_read_does_not_refuse_a_run_that_had_begun(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trainer.run("{").code == ExitCode.BAD_PLAN
    monkeypatch.setenv("DPMOE_FAILURES", "1")
    assert trainer.run("{").code == ExitCode.CRASHED


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()])
def test_a_journal_that_cannot_be_read_charges_all_until_it_can(
    error: Exception, trainer: Trainer, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(trainer, plan, monkeypatch, 3)
    for place in ("os.listdir", "read_history"):
        with monkeypatch.context() as patch:
            patch.setattr(f"dpmoe_trainer.journal.{place}", raising(error))
            run = trainer.run(plan)
        assert run.code == ExitCode.CRASHED
        assert run.report is not None
        assert (run.report.outcome, run.report.mechanism.steps) == (Outcome.FAILED, 6)
    assert trainer.run(plan).code == ExitCode.COMPLETED


@pytest.mark.parametrize(
    ("part", "change"), [("job", {"uid": "u-2"}), ("training", {"precision": "bfloat16"})]
)
def test_another_runs_folder_is_refused_with_both_names(
    trainer: Trainer,
    plan: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    change: dict[str, Any],
) -> None:
    killed(trainer, plan, monkeypatch, 1)
    other = json.loads(json.dumps(plan))
    other[part] |= change
    run = trainer.run(other)
    assert run.code == ExitCode.BAD_CHECKPOINT
    assert run.report is not None
    assert run.report.mechanism.steps == 0
    for word in ("checkpoint.path", plan_of(plan).run_digest(), plan_of(other).run_digest()):
        assert word in run.report.message


def test_a_full_volume_before_the_first_step_is_a_refusal(
    trainer: Trainer, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 4096})
    monkeypatch.setattr("dpmoe_trainer.checkpoint.shutil.disk_usage", lambda _: usage)
    monkeypatch.setattr("dpmoe_trainer.output.FolderTarget.check_room", lambda *_: None)
    run = trainer.run(plan)
    assert run.code == ExitCode.BAD_PLAN
    assert run.report is not None
    assert run.report.mechanism.steps == 0
    assert "4,096 bytes free" in run.report.message
    assert "need" in run.report.message


def test_a_volume_that_fills_up_fails_the_run_which_goes_on_where_there_is_room(
    trainer: Trainer,
    plan: dict[str, Any],
    undisturbed: dict[str, str],
    volume: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dpmoe_trainer import checkpoint

    save = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        if "000004" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        run = trainer.run(plan)
    assert run.code == ExitCode.CRASHED
    assert run.report is not None
    assert run.report.outcome is Outcome.FAILED
    assert run.report.mechanism.steps == 4
    for word in (str(volume), "No space left", "it needs", "are free there"):
        assert word in run.report.message
    run = trainer.run(plan)
    assert run.code == ExitCode.COMPLETED
    assert model_sums(trainer.output) == undisturbed


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


def test_without_a_checkpoint_nothing_is_kept(
    trainer: Trainer, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPMOE_FAILURES", "3")
    run = trainer.run(make_plan())
    assert run.code == ExitCode.COMPLETED
    assert run.report is not None
    assert run.report.attempts == ()


def test_an_unwritable_volume_is_a_refusal(
    trainer: Trainer, plan: dict[str, Any], volume: Path
) -> None:
    volume.write_text("a file")
    run = trainer.run(plan)
    assert run.code == ExitCode.BAD_PLAN
    assert "checkpoint.path" in run.stderr
    assert "cannot be written" in run.stderr


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
    for death in (0, 5, 12, 20, 28, 38):
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
    assert run.report.attempts[:6] == tuple(f"pod-{n}" for n in (0, 5, 12, 20, 28, 38))
    assert len(run.report.attempts) == 7
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


def test_the_key_is_for_its_user_alone_and_never_told(
    trainer: Trainer, plan: dict[str, Any], volume: Path, fixed_key: None, monkeypatch: Any
) -> None:
    die_at(monkeypatch, 5, RuntimeError("x"))
    run = trainer.run(plan)
    assert run.report is not None
    assert (volume / "key").stat().st_mode & 0o777 == 0o600
    assert (volume / "key").read_bytes() == KEY
    told = run.stderr + run.stdout + run.report.to_json()
    told += "".join(path.read_text() for path in volume.glob("*.journal"))
    assert KEY.decode() not in told
    assert KEY.hex() not in told
