"""Checkpoints that are damaged, lost, full or another run's, and tables that changed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.resume.attempts import KEY, Killed, die_at, killed, model_sums, raising
from tests.trainer.runs import PlanMaker, Trainer, plan_of

from dpmoe_trainer.contract import ExitCode, Outcome


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
