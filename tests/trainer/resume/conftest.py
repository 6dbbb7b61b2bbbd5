"""A plan with checkpoints, its volume, and the model of a run that nobody disturbs."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.resume.attempts import KEY, model_sums
from tests.trainer.runs import PlanMaker, Trainer

from dpmoe_trainer.contract import ExitCode


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
