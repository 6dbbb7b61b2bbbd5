"""Checkpointing, autocast, overflow: the gradient that is clipped is the one that was measured."""

import math

import pytest
import torch
from tests.trainer.families import FAMILIES, TOLERANCE, build, make_batch, rows
from tests.trainer.oracle import difference, median_norm, size

from dpmoe_trainer.dp import clipped_sum
from dpmoe_trainer.dp.rules import experts

CHECKPOINTED = [
    "dpmoe-bert",
    "mixtral-tied",
    "mixtral-lora",
    "deepseek-v3-lm",
    "gpt-oss-lm",
    "switch",
]


def checkpoint(model):
    model.activation_checkpointing_enable()
    return model


def noted_routes(monkeypatch):
    """The experts that each pass through a fused layer sends its tokens to."""
    routes = []
    forward = experts.Segments.of

    def note(expert_NK, *rest):
        routes.append(expert_NK.clone())
        return forward(expert_NK, *rest)

    monkeypatch.setattr(experts.Segments, "of", note)
    return routes


@pytest.mark.parametrize("family", CHECKPOINTED)
def test_checkpointing_changes_nothing(family):
    model = build(family)
    batch = make_batch(model, 5, 7)
    clipping_norm = median_norm(model, batch)
    sums, norms = clipped_sum(model, batch, clipping_norm)
    again, again_norms = clipped_sum(checkpoint(model), batch, clipping_norm)
    tolerance = max(1e-12, TOLERANCE[family])
    assert difference(sums, again) < tolerance * size(sums)
    assert torch.allclose(norms, again_norms, rtol=tolerance, atol=0)


def test_a_checkpointed_layer_is_computed_three_times_and_left_as_it_was(monkeypatch):
    model = checkpoint(build("mixtral-lm")).train()
    layer = model.model.layers[0]
    function = layer._gradient_checkpointing_func
    routes = noted_routes(monkeypatch)
    clipped_sum(model, make_batch(model, 3, 5), 1.0)
    assert len(routes) == 3 * len(model.model.layers)
    assert layer._gradient_checkpointing_func is function
    assert all(module.training for module in model.modules())


def test_ties_are_broken_the_same_way_again(monkeypatch):
    model = checkpoint(build("mixtral-lm"))
    batch = make_batch(model, 3, 5)
    passes = [0]

    def nudge(module, inputs):
        """What another order of summation does on another run: here, the reverse ranking."""
        passes[0] += 1
        order = torch.arange(4, dtype=torch.float64) * (1 if passes[0] == 1 else -1)
        with torch.no_grad():
            module.weight.copy_(1e-9 * order[:, None].expand_as(module.weight))

    gate = model.model.layers[1].mlp.gate
    gate.register_forward_pre_hook(nudge)
    gate.requires_grad_(False)
    routes = noted_routes(monkeypatch)
    sums, norms = clipped_sum(model, rows(batch, slice(0, 1)), math.inf)
    # Forward through both layers, back through both for the norms, and for the sums.
    first, for_norms, for_sums = routes[1], routes[2], routes[5]
    assert passes[0] == 3
    assert first.ne(routes[0]).any()
    assert torch.equal(first, for_norms)
    assert torch.equal(first, for_sums)
    assert size(sums) == pytest.approx(float(norms), rel=1e-9)


def test_random_numbers_are_drawn_again():
    model = checkpoint(build("mixtral-lm"))
    layer = model.model.layers[1].mlp
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + torch.randn(16).double(),))
    batch = make_batch(model, 1, 6)
    state = torch.get_rng_state()
    sums, norms = clipped_sum(model, batch, math.inf)
    assert size(sums) == pytest.approx(float(norms), rel=1e-9)
    torch.set_rng_state(state)
    model.activation_checkpointing_disable()
    assert difference(sums, clipped_sum(model, batch, math.inf)[0]) < 1e-9 * size(sums)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_the_norm_is_that_of_what_is_released(family, checkpointed):
    """A norm from half-precision products would be off by a thousandth, and the bound with it."""
    model = build(family, torch.float32)
    if checkpointed:
        checkpoint(model)
    sample = make_batch(model, 1, 7, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        sums, norms = clipped_sum(model, sample, math.inf)
        clipping_norm = 0.5 * float(norms)
        clipped, _ = clipped_sum(model, sample, clipping_norm)
    assert all(total.dtype == torch.float32 for total in sums.values())
    assert size(sums) == pytest.approx(float(norms), rel=1e-5)
    assert size(clipped) == pytest.approx(clipping_norm, rel=1e-5)


@pytest.mark.parametrize("family", ["mixtral-lm", "gpt-oss-lm", "switch"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_sample_that_overflows_contributes_exactly_zero(family, checkpointed):
    model = build(family)
    if checkpointed:
        checkpoint(model)
    batch = make_batch(model, 5, 9)
    encoder = model.get_encoder() if family == "switch" else model.model
    encoder.embed_tokens.register_forward_hook(
        lambda module, inputs, rows: rows.masked_fill((inputs[0] == 39)[..., None], math.inf)
    )
    batch["input_ids"][batch["input_ids"] == 39] = 38
    if family == "switch":
        batch["labels"][batch["labels"] == 39] = 38  # Its decoder reads them.
    others = rows(batch, [0, 1, 3, 4])
    batch["input_ids"][2, 0] = 39
    expected, expected_norms = clipped_sum(model, others, 1.0)
    sums, norms = clipped_sum(model, batch, 1.0)
    assert norms[2].isinf()
    assert torch.equal(norms[[0, 1, 3, 4]], expected_norms)
    assert all(torch.equal(sums[name], expected[name]) for name in expected)
