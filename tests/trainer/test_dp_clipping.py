"""Clipped gradient sums of whole models, against plain autograd of one sample at a time."""

import copy
import math

import pytest
import torch
from tests.trainer.families import (
    DECODER,
    FAMILIES,
    LABELS,
    TOLERANCE,
    build,
    crowd_of,
    in_double,
    make_batch,
    rows,
)
from tests.trainer.oracle import (
    check_bound,
    check_exact,
    check_isolation,
    difference,
    median_norm,
    one_at_a_time,
    size,
)
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from dpmoe_trainer.dp import check_model, clipped_sum
from dpmoe_trainer.models import DPMoEBertForSequenceClassification, select_trainable


# Five tokens keep every norm in its ghost form; thirty have gradients formed at these widths.
@pytest.mark.parametrize("length", [5, 30])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_sum_is_that_of_samples_clipped_one_at_a_time(family, length):
    model = build(family)
    batch = make_batch(model, 6, length)
    check_exact(model, batch, median_norm(model, batch), TOLERANCE[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_in_single_precision_it_is_so_to_rounding(family):
    model = build(family, torch.float32)
    batch = make_batch(model, 5, 7)
    check_exact(model, batch, median_norm(model, batch), 1e-5, reference=in_double(model))


@pytest.mark.parametrize("family", ["dpmoe-bert", "mixtral-lm", "switch"])
def test_as_many_samples_as_tokens_are_not_taken_for_each_other(family):
    model = build(family)
    batch = make_batch(model, 6, 6)
    check_exact(model, batch, median_norm(model, batch), TOLERANCE[family])


@pytest.mark.parametrize(
    "patterns",
    [
        ["classifier.*"],
        ["*.router.weight"],
        ["*.experts.down_proj"],
        ["*.experts.up_proj_bias"],
        ["*.experts.*_bias", "*.query.bias"],
        ["embeddings.word_embeddings.*"],
        ["embeddings.position_embeddings.*", "embeddings.token_type_embeddings.*"],
        ["*.LayerNorm.weight"],
        ["*.LayerNorm.bias"],
    ],
)
def test_any_part_may_be_trained_alone(patterns):
    model = build("dpmoe-bert")
    trained = select_trainable(model, patterns)
    batch = make_batch(model, 5, 6)
    clipping_norm = median_norm(model, batch)

    sums, _ = clipped_sum(model, batch, clipping_norm)

    expected, _ = one_at_a_time(model, batch, clipping_norm)
    assert list(sums) == trained
    assert difference(sums, expected) < 1e-9 * size(expected)


@pytest.mark.parametrize(
    "patterns",
    [
        ["shared.weight"],
        ["*.relative_attention_bias.weight"],
        ["*.expert_1.wi.weight", "*.expert_2.wo.weight"],
        ["*.router.classifier.weight"],
        ["decoder.*.layer_norm.weight"],
    ],
)
def test_any_part_of_a_switch_transformer_may_be_trained_alone(patterns):
    model = build("switch")
    select_trainable(model, patterns)
    batch = make_batch(model, 5, 7)
    check_exact(model, batch, median_norm(model, batch), 1e-10)


def test_attention_sinks_may_be_trained_alone():
    model = build("gpt-oss-lm")
    select_trainable(model, ["*.sinks"])
    batch = make_batch(model, 5, 7)
    check_exact(model, batch, median_norm(model, batch), 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_sample_moves_the_sum_by_at_most_the_clipping_norm(family):
    model = build(family)
    batch = make_batch(model, 4, 8)
    check_bound(model, batch, 0.3 * median_norm(model, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_mates_do_not_change_a_contribution(family):
    model = build(family)
    sample = make_batch(model, 1, 8, seed=5)
    clipping_norm = 0.5 * float(clipped_sum(model, sample, math.inf)[1])
    mates = [make_batch(model, 7, 8, seed=6), crowd_of(sample, 7)]
    check_isolation(model, sample, mates, clipping_norm, max(1e-10, TOLERANCE[family]))


@pytest.mark.parametrize("family", ["mixtral-tied", "switch"])
def test_a_hundred_batches_do_not_change_a_contribution(family):
    model = build(family)
    sample = make_batch(model, 1, 4, seed=5)
    clipping_norm = 0.5 * float(clipped_sum(model, sample, math.inf)[1])
    mates = [make_batch(model, 1 + seed % 3, 4, seed) for seed in range(100)]
    mates[::10] = [crowd_of(sample, 1 + seed % 5) for seed in range(10)]
    check_isolation(model, sample, mates, clipping_norm, 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family):
    model = build(family)
    short = make_batch(model, 4, 6)
    long = {
        key: nn.functional.pad(value, (0, 5), value=-100 if key == "labels" else 0)
        if value.dim() == 2
        else value
        for key, value in short.items()
    }
    clipping_norm = median_norm(model, short)
    sums, norms = clipped_sum(model, short, clipping_norm)
    padded_sums, padded_norms = clipped_sum(model, long, clipping_norm)
    tolerance = max(1e-9, TOLERANCE[family])
    assert difference(sums, padded_sums) < tolerance * size(sums)
    assert torch.allclose(norms, padded_norms, rtol=tolerance, atol=0)


class Twice(nn.Module):
    """A weight, a bias and a scale that are each used twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(LABELS, LABELS)
        self.norm = nn.LayerNorm(LABELS)

    def forward(self, logits):
        return self.norm(self.layer(self.norm(self.layer(logits))))


class TwiceForSequenceClassification(DPMoEBertForSequenceClassification):
    def forward(self, labels=None, **inputs):
        output = super().forward(**inputs)
        output.logits = self.head(output.logits)
        output.loss = None if labels is None else nn.functional.cross_entropy(output.logits, labels)
        return output


def test_a_parameter_that_is_used_twice_has_its_cross_term():
    model = build("dpmoe-bert")
    model.__class__ = TwiceForSequenceClassification
    model.head = Twice().double()
    model.head.layer.weight.data.mul_(3)
    batch = make_batch(model, 5, 6)
    check_exact(model, batch, median_norm(model, batch), 1e-10)


def test_an_expert_that_no_token_reached_has_a_zero_sum():
    model = build("dpmoe-bert")
    with torch.no_grad():
        # All scores are zero, and every tie is broken the same way.
        model.layers[1].router.weight.zero_()
    batch = make_batch(model, 4, 6)
    counts = []
    handle = model.layers[1].router.register_forward_hook(
        lambda module, inputs, output: counts.append(output[2].flatten().bincount(minlength=4))
    )
    sums, _ = clipped_sum(model, batch, 1.0)
    handle.remove()
    unhit = counts[0] == 0
    assert unhit.any()
    for name in ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias"):
        total = sums[f"layers.1.experts.{name}"]
        assert total.shape[0] == 4
        assert not total[unhit].any()
        assert total[~unhit].any()


def test_the_frozen_lower_part_may_be_computed_once():
    model = build("dpmoe-bert")
    select_trainable(model, ["layers.1.*", "classifier.*"])
    batch = make_batch(model, 5, 7)
    cached = {
        "hidden_states": model.lower(batch["input_ids"], batch["attention_mask"]),
        "attention_mask": batch["attention_mask"],
        "labels": batch["labels"],
    }
    whole, whole_norms = clipped_sum(model, batch, 1.0)
    upper, upper_norms = clipped_sum(model, cached, 1.0)
    assert difference(whole, upper) < 1e-12 * size(whole)
    assert torch.allclose(whole_norms, upper_norms, rtol=1e-12, atol=0)


def test_a_sample_that_is_not_finite_contributes_exactly_zero():
    model = build("dpmoe-bert")
    select_trainable(model, ["layers.1.*", "classifier.*"])
    batch = make_batch(model, 5, 7)
    del batch["input_ids"]
    batch["hidden_states"] = torch.randn(5, 7, 16, dtype=torch.float64)
    others = [0, 2, 4]
    expected, expected_norms = clipped_sum(model, rows(batch, others), 1.0)
    batch["hidden_states"][1, 0, 3] = math.nan
    batch["hidden_states"][3, 0, 0] = 1e308

    sums, norms = clipped_sum(model, batch, 1.0)

    assert all(torch.equal(sums[name], expected[name]) for name in expected)
    assert torch.equal(norms[others], expected_norms)
    assert norms[[1, 3]].isinf().all()


def test_a_batch_of_samples_that_are_not_finite_gives_zeros():
    model = build("dpmoe-bert")
    select_trainable(model, ["classifier.*"])
    batch = {
        "hidden_states": torch.full((2, 3, 16), math.nan, dtype=torch.float64),
        "attention_mask": torch.ones(2, 3, dtype=torch.long),
        "labels": torch.zeros(2, dtype=torch.long),
    }
    sums, norms = clipped_sum(model, batch, 1.0)
    assert not any(total.any() for total in sums.values())
    assert norms.isinf().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_batch_gives_zeros(family):
    model = build(family)
    sums, norms = clipped_sum(model, make_batch(model, 0, 6), 1.0)
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert {name: total.shape for name, total in sums.items()} == trained
    assert not any(total.any() for total in sums.values())
    assert norms.shape == (0,)


def test_a_sample_without_counted_tokens_contributes_nothing():
    model = build("mixtral-lm")
    batch = make_batch(model, 3, 6)
    batch["labels"][1] = -100
    sums, norms = clipped_sum(model, batch, 1.0)
    without, _ = clipped_sum(model, rows(batch, [0, 2]), 1.0)
    assert norms[1] == 0
    assert difference(sums, without) < 1e-12 * size(sums)


@pytest.mark.parametrize("family", ["dpmoe-bert", "mixtral-lm"])
def test_the_model_is_left_as_it_was(family, tmp_path):
    model = build(family).train()
    model.get_input_embeddings().eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    model.get_input_embeddings().weight.grad = torch.ones_like(model.get_input_embeddings().weight)

    sums, _ = clipped_sum(model, make_batch(model, 3, 5), 1.0)

    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert [module.training for module in model.modules()] == modes
    assert model.config._experts_implementation == "eager"
    assert model.get_input_embeddings().weight.grad.eq(1).all()
    others = [p for p in model.parameters() if p is not model.get_input_embeddings().weight]
    assert all(p.grad is None for p in others)
    assert all(not p._backward_hooks for p in model.parameters())
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(not total.requires_grad for total in sums.values())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_proves_itself_on_every_family(family):
    check_model(build(family), tolerance=max(1e-9, TOLERANCE[family]))


def test_half_precision_models_have_float32_sums():
    model = build("mixtral-classifier").to(torch.bfloat16)
    batch = make_batch(model, 3, 5)
    sums, norms = clipped_sum(model, batch, 1.0)
    exact, exact_norms = one_at_a_time(model.float(), batch, 1.0)
    assert all(total.dtype == torch.float32 for total in sums.values())
    assert torch.allclose(norms, exact_norms, rtol=0.3, atol=0)
    assert size(sums) == pytest.approx(size(exact), rel=0.3)


@pytest.mark.parametrize("clipping_norm", [0.0, -1.0, math.nan])
def test_a_clipping_norm_that_bounds_nothing_is_refused(clipping_norm):
    model = build("dpmoe-bert")
    with pytest.raises(ValueError, match="clipping_norm"):
        clipped_sum(model, make_batch(model, 2, 4), clipping_norm)


def test_a_switch_transformer_may_write_a_single_token():
    # The pairs of its positions, [1, 1], then look like one position of every sample.
    model = build("switch")
    batch = make_batch(model, 4, 6)
    batch["labels"] = batch["labels"][:, :1]
    check_exact(model, batch, median_norm(model, batch), 1e-10)


def test_a_single_token_has_a_position():
    model = build("dpmoe-bert")
    batch = {
        key: value[:, :1] if value.dim() == 2 else value
        for key, value in make_batch(model, 4, 6).items()
    }
    check_exact(model, batch, median_norm(model, batch), 1e-10)


@pytest.mark.parametrize("frozen_below", [False, True])
def test_a_layer_whose_output_the_model_changes_in_place_is_clipped_all_the_same(frozen_below):
    # With a bias a linear layer's output is a view, whose hooks are lost when it is changed.
    settings = DECODER | {"num_experts": 4, "clip_qkv": 0.5, "attention_bias": True}
    torch.manual_seed(1)
    model = OlmoeForCausalLM(OlmoeConfig(**settings)).double()
    model.set_experts_implementation("eager")
    if frozen_below:
        select_trainable(model, ["*.0.self_attn.v_proj.*", "*.1.self_attn.k_proj.*"])
    batch = make_batch(model, 5, 6)
    check_exact(model, batch, median_norm(model, batch), 1e-10)


def test_a_classifier_that_knows_no_padding_gets_one_sample_at_a_time():
    # It takes a row's last token, and refuses more rows than one.
    model = build("mixtral-classifier")
    batch = make_batch(model, 5, 6)
    model.config.pad_token_id = None
    check_exact(model, batch, median_norm(model, batch), 1e-10)


def test_classes_may_stand_in_a_column():
    model = build("qwen3-classifier")
    batch = make_batch(model, 5, 6)
    batch["labels"] = batch["labels"][:, None]
    check_exact(model, batch, median_norm(model, batch), 1e-10)
