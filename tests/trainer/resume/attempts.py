"""Attempts of one run that end as a kill or a fault has them end, and what they left."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.runs import Trainer

from dpmoe_trainer.dp.noise import add_noise

KEY = b"k" * 32


def model_sums(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "report.json"
    }


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


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    return fail
