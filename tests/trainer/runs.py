"""Helpers of the trainer's tests: a tiny private table, plans for it, and the trainer's command."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dpmoe_trainer.__main__ import main
from dpmoe_trainer.contract import TrainingPlan, TrainingReport

PlanMaker = Callable[..., dict[str, Any]]
"""Makes plans; keywords replace fields, with `__` between the levels."""


@dataclass
class Run:
    """How a run of the trainer ended."""

    code: int
    report: TrainingReport | None
    stderr: str
    stdout: str


@dataclass
class Trainer:
    """Runs the trainer's command on a plan, with the model and report in `output`."""

    folder: Path
    capfd: pytest.CaptureFixture[str]

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def write(self, plan: dict[str, Any] | str) -> Path:
        path = self.folder / "plan.json"
        path.write_text(plan if isinstance(plan, str) else json.dumps(plan))
        return path

    def run(self, plan: dict[str, Any] | str) -> Run:
        """In this process."""
        code = main(["--plan", str(self.write(plan)), "--output", str(self.output)])
        captured = self.capfd.readouterr()
        return Run(code, self.report(), captured.err, captured.out)

    def command(self, plan: dict[str, Any]) -> list[str]:
        options = ["--plan", str(self.write(plan)), "--output", str(self.output)]
        return [sys.executable, "-m", "dpmoe_trainer", *options]

    def spawn(self, plan: dict[str, Any]) -> Run:
        """In a process of its own, as a user would."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            self.command(plan), capture_output=True, text=True, env=environment, timeout=120
        )
        return Run(done.returncode, self.report(), done.stderr, done.stdout)

    def report(self) -> TrainingReport | None:
        path = self.output / "report.json"
        return TrainingReport.model_validate_json(path.read_bytes()) if path.exists() else None


def plan_of(content: dict[str, Any]) -> TrainingPlan:
    return TrainingPlan.model_validate_json(json.dumps(content))
