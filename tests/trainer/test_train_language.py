"""Runs that learn a text's next tokens: no labels are read, and every token is the row's own."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import WORDS, save_mixtral
from tests.trainer.families import build
from tests.trainer.runs import PlanMaker, Trainer
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from dpmoe_trainer.contract import ExitCode
from dpmoe_trainer.data.rows import Rows
from dpmoe_trainer.evaluate import evaluate


@pytest.fixture(scope="session")
def tiny_language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    save_mixtral(folder, WORDS, MixtralForCausalLM)
    return folder


@pytest.fixture
def language_plan(make_plan: PlanMaker, tiny_language: Path) -> PlanMaker:
    """Plans for a language model, on the same tables."""

    def make(**changes: Any) -> dict[str, Any]:
        plan = make_plan(model={"path": str(tiny_language)}, **changes)
        for data in (plan["blocks"][0]["data"], plan["evaluation"]["data"]):
            del data["labelColumn"]
        return plan

    return make


@pytest.mark.parametrize("unit", [{"kind": "example"}, {"kind": "user", "column": "user"}])
def test_a_language_model_is_trained_and_scored(
    trainer: Trainer, language_plan: PlanMaker, tiny_language: Path, unit: dict[str, str]
) -> None:
    plan = language_plan(blocks__0__unit=unit, training__optimizer__learningRate=2.0)
    run = trainer.run(plan)
    assert run.code == ExitCode.COMPLETED, run.stderr
    assert run.report is not None
    scores = run.report.evaluation
    assert scores is not None
    assert scores.perplexity is not None
    assert scores.examples == 9
    start, kept = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (tiny_language, trainer.output)
    )
    assert kept.keys() == start.keys()
    assert all(not torch.equal(kept[name], start[name]) for name in kept)


def test_adapters_of_a_language_model(trainer: Trainer, language_plan: PlanMaker) -> None:
    plan = language_plan()
    plan["model"]["lora"] = {"rank": 2, "alpha": 4.0}
    assert trainer.run(plan).code == ExitCode.COMPLETED
    assert isinstance(AutoModelForCausalLM.from_pretrained(trainer.output), MixtralForCausalLM)


@pytest.mark.parametrize("place", ["blocks", "evaluation", "labels"])
def test_labels_are_named_for_all_or_for_none(
    trainer: Trainer, language_plan: PlanMaker, place: str
) -> None:
    plan = language_plan()
    if place == "labels":
        plan["model"]["labels"] = 2
    else:
        table = plan["blocks"][0]["data"] if place == "blocks" else plan["evaluation"]["data"]
        table["labelColumn"] = "label"
    run = trainer.run(plan)
    assert run.code == ExitCode.BAD_PLAN
    assert "labelColumn must be set in every table where model.labels is" in run.stderr


def test_tokens_are_labels_and_padding_is_none(tiny_language: Path) -> None:
    tokens = [torch.tensor(row).numpy() for row in ([5, 6, 7], [8])]
    batch = Rows(tokens, None, padding=0, device=torch.device("cpu")).batch([1, 0])
    assert batch["input_ids"].tolist() == [[8, 0, 0], [5, 6, 7]]
    assert batch["labels"].tolist() == [[8, -100, -100], [5, 6, 7]]


def test_scores_are_those_of_the_models_own_loss(tiny_language: Path) -> None:
    model = MixtralForCausalLM.from_pretrained(tiny_language).eval()
    tokens = [torch.tensor(row).numpy() for row in ([5, 6, 7, 8], [8, 9], [4])]
    rows = Rows(tokens, None, padding=0, device=torch.device("cpu"))
    scores = evaluate(model, rows, physical_batch=2)
    with torch.no_grad():
        loss = model(**rows.batch([0, 1, 2])).loss
    assert scores.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert scores.majority_share == 1 / 4
    alone = Rows(tokens[2:], None, padding=0, device=torch.device("cpu"))
    assert evaluate(model, alone, physical_batch=2).perplexity == 1.0


def test_a_decoders_scores_are_those_of_its_own_loss() -> None:
    model = build("switch", torch.float32).eval()
    tokens = [torch.tensor(row).numpy() for row in ([5, 6, 7, 8], [8, 9], [4])]
    rows = Rows(tokens, None, padding=0, device=torch.device("cpu"))
    batch = rows.batch([0, 1, 2])
    with torch.no_grad():
        loss = model(**batch).loss
    assert evaluate(model, rows, physical_batch=3).perplexity == pytest.approx(
        math.exp(loss), rel=1e-5
    )
