"""DP-SGD's step: what a sample of units sums to, and what the optimiser makes of it."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForSequenceClassification

from dpmoe_trainer.contract import OptimizerPlan
from dpmoe_trainer.data.rows import Rows
from dpmoe_trainer.dp.clipping import Automatic, Clipping, Flat, PerGroup
from dpmoe_trainer.dp.routes import LoadQuery
from dpmoe_trainer.evaluate import evaluate
from dpmoe_trainer.methods.dp_sgd import Updater, learning_rate_factor, sum_clipped

LENGTHS = [3, 5, 2, 4, 4, 1, 6]


@pytest.fixture
def model() -> MixtralForSequenceClassification:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=0,
        num_labels=3,
    )
    return MixtralForSequenceClassification(config).eval()


@pytest.fixture
def rows() -> Rows:
    generator = np.random.default_rng(0)
    tokens = [generator.integers(1, 20, length).astype(np.int32) for length in LENGTHS]
    return Rows(tokens, [0, 1, 2, 0, 1, 2, 0], padding=0, device=torch.device("cpu"))


def unit_gradient(
    model: MixtralForSequenceClassification, rows: Rows, unit: Sequence[int]
) -> list[torch.Tensor]:
    """The gradient of the mean loss of the unit's rows, row by row."""
    losses = [model(**rows.batch([row])).loss for row in unit]
    return list(torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters())))


@pytest.mark.parametrize("physical_batch", [1, 3, 64])
@pytest.mark.parametrize("clipping_norm", [0.3, 100.0])
def test_users_and_rows_are_clipped_as_what_they_are(
    model: MixtralForSequenceClassification,
    rows: Rows,
    physical_batch: int,
    clipping_norm: float,
) -> None:
    units = [(0, 3, 4, 6), (1,), (2, 5)]
    expected = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for unit in units:
        gradients = unit_gradient(model, rows, unit)
        norm = math.sqrt(sum(float(gradient.double().pow(2).sum()) for gradient in gradients))
        for total, gradient in zip(expected, gradients, strict=True):
            total += gradient * min(1.0, clipping_norm / norm)
    summed = sum_clipped(model, rows, units, clipping_norm, physical_batch)
    for (name, _), total in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(summed[name], total, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("clipping", [Flat(), PerGroup(), Automatic(1e-6)], ids=repr)
def test_no_unit_moves_the_sum_by_more_than_the_clipping_norm(
    model: MixtralForSequenceClassification, rows: Rows, clipping: Clipping
) -> None:
    units = [(0, 3, 4, 6), (1,), (2, 5)]
    whole = sum_clipped(model, rows, units, 0.01, 2, clipping=clipping)
    for left_out in range(3):
        others = [unit for index, unit in enumerate(units) if index != left_out]
        without = sum_clipped(model, rows, others, 0.01, 2, clipping=clipping)
        moved = sum(float((whole[name] - without[name]).double().pow(2).sum()) for name in whole)
        assert math.sqrt(moved) == pytest.approx(0.01, rel=1e-4)


def test_a_users_load_is_the_mean_of_its_rows(
    model: MixtralForSequenceClassification, rows: Rows
) -> None:
    loads = LoadQuery.of(model, 0.5)
    user = sum_clipped(model, rows, [(0, 3, 4)], 0.3, 2, loads=loads)
    each = [sum_clipped(model, rows, [(row,)], 0.3, 2, loads=loads) for row in (0, 3, 4)]
    for name in loads.experts:
        mean = torch.stack([one[name] for one in each]).mean(0)
        torch.testing.assert_close(user[name], mean)
    nothing = sum_clipped(model, rows, [], 0.3, 2, loads=loads)
    assert nothing.keys() == user.keys()
    assert all(not part.any() for part in nothing.values())


def test_no_units_sum_to_zero(model: MixtralForSequenceClassification, rows: Rows) -> None:
    model.score.requires_grad_(False)
    summed = sum_clipped(model, rows, [], 1.0, 4)
    assert summed.keys() == {name for name, _ in model.named_parameters() if "score" not in name}
    assert all(not gradient.any() for gradient in summed.values())


def test_the_divisor_is_the_public_expected_batch(model: MixtralForSequenceClassification) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plan = OptimizerPlan(name="sgd", learning_rate=0.5)
    updater = Updater(model, plan, steps=2, expected_batch=8.0)
    for _ in range(2):
        updater.update({name: torch.full_like(value, 4.0) for name, value in before.items()})
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] - 0.25 - 0.125)


def test_adamw_moves_frozen_parameters_by_nothing(model: MixtralForSequenceClassification) -> None:
    model.requires_grad_(False)
    model.score.requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plan = OptimizerPlan(name="adamw", learning_rate=0.1, weight_decay=0.5)
    updater = Updater(model, plan, steps=10, expected_batch=1.0)
    updater.update({"score.weight": torch.ones_like(before["score.weight"])})
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name != "score.weight")
    expected = before["score.weight"] * (1 - 0.1 * 0.5) - 0.1  # Adam's first step is its sign
    torch.testing.assert_close(model.score.weight, expected)


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    assert [learning_rate_factor(step, 0, 4) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert [learning_rate_factor(step, 2, 4) for step in range(5)] == [1 / 3, 2 / 3, 1, 0.5, 0]
    assert learning_rate_factor(3, 8, 4) == pytest.approx(4 / 9)


def test_scores_are_those_of_the_whole_model(
    model: MixtralForSequenceClassification, rows: Rows
) -> None:
    with torch.no_grad():
        hits = [
            int(model(**(batch := rows.batch([row]))).logits.argmax()) == int(batch["labels"])
            for row in range(len(rows))
        ]
    scores = evaluate(model, rows, physical_batch=3)
    assert scores.examples == 7
    assert scores.accuracy == pytest.approx(sum(hits) / 7)
    assert scores.majority_share == pytest.approx(3 / 7)
