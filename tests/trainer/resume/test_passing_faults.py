"""Faults that may pass: a run that drew steps is not refused for them."""

from pathlib import Path
from typing import Any

import pytest
from tests.trainer.resume.attempts import Killed, killed, model_sums, raising
from tests.trainer.runs import Trainer, plan_of

from dpmoe_trainer.contract import ExitCode, Outcome
from dpmoe_trainer.errors import (
    BadCheckpoint,
    BadData,
    BadModel,
    BadPlan,
    ChangedData,
    UncoveredMechanism,
)
from dpmoe_trainer.journal import open_journal

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
