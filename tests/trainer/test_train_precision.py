"""Whole runs in bfloat16: what is computed in it, and what is not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.runs import PlanMaker, Trainer
from torch import Tensor

from dpmoe_trainer import prepare
from dpmoe_trainer import train as loop
from dpmoe_trainer.contract import ExitCode
from dpmoe_trainer.dp import NotPerSample
from dpmoe_trainer.dp.rules import experts
from dpmoe_trainer.methods.dp_sgd import Updater
from dpmoe_trainer.models import DPMoEBertForSequenceClassification


class Watch:
    """Notes in which precision the parts of a run computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.in_half: dict[str, set[bool]] = {}
        self.products: set[torch.dtype] = set()
        self.kept: set[torch.dtype] = set()
        for owner, name in (
            (DPMoEBertForSequenceClassification, "lower"),
            (prepare, "check_model"),
            (loop, "sum_clipped"),
            (loop, "add_noise"),
            (loop, "evaluate"),
            (Updater, "update"),
        ):
            monkeypatch.setattr(owner, name, self._noting(name, getattr(owner, name)))
        multiply = experts._products

        def products(x_SI: Tensor, *rest: Any) -> Tensor:
            self.products.add(x_SI.dtype)
            return multiply(x_SI, *rest)

        monkeypatch.setattr(experts, "_products", products)

    def _noting(self, name: str, function: Any) -> Any:
        def noting(*arguments: Any, **options: Any) -> Any:
            self.in_half.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))
            found = function(*arguments, **options)
            if name in ("sum_clipped", "add_noise"):
                self.kept |= {each.dtype for each in found.values()}
            if name == "update":
                self.kept |= {each.dtype for each in arguments[0].state().values()}
            return found

        return noting


@pytest.mark.parametrize("precision", [None, "float32", "bfloat16"])
def test_passes_are_in_the_plans_precision_and_nothing_else_is(
    trainer: Trainer,
    make_plan: PlanMaker,
    tiny_bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str | None,
) -> None:
    watch = Watch(monkeypatch)
    plan = make_plan(
        model__path=str(tiny_bert),
        model__upcycle={"experts": 4, "topK": 2, "layers": [0, 1]},
        model__trainable=["layers.1.*", "classifier.*"],
        training__optimizer={"name": "adamw", "learningRate": 0.01},
        training__precision=precision,
    )
    run = trainer.run(plan)
    assert run.code == ExitCode.COMPLETED, run.stderr
    half = precision == "bfloat16"
    passes = {name: {half} for name in ("lower", "sum_clipped", "evaluate")}
    rest = {name: {False} for name in ("check_model", "add_noise", "update")}
    assert watch.in_half == passes | rest
    assert torch.float32 in watch.products, "of the check"
    assert (torch.bfloat16 in watch.products) == half
    assert watch.kept <= {torch.float32, torch.int64}
    saved = load_file(trainer.output / "model.safetensors")
    assert {each.dtype for each in saved.values()} == {torch.float32}


def test_users_and_released_loads_in_half_precision(trainer: Trainer, make_plan: PlanMaker) -> None:
    plan = make_plan(
        training__precision="bfloat16",
        training__balancing={
            "method": "released-load",
            "strength": 0.1,
            "through": "loss",
            "loadShare": 0.1,
        },
        blocks__0__unit={"kind": "user", "column": "user"},
    )
    run = trainer.run(plan)
    assert run.code == ExitCode.COMPLETED, run.stderr


def test_a_model_that_breaks_its_bound_in_half_precision_is_refused_before_data_is_read(
    trainer: Trainer, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **options: Any) -> None:
        assert torch.is_autocast_enabled("cpu")
        raise NotPerSample("a gradient of more than the clipping norm")

    monkeypatch.setattr(prepare, "check_bound", refuse)
    run = trainer.run(
        make_plan(training__precision="bfloat16", blocks__0__data__path="/no/such/table")
    )
    assert run.code == ExitCode.BAD_MODEL
    assert "model: a gradient of more than the clipping norm" in run.stderr
