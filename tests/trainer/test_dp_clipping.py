"""Clipped gradient sums of whole models, against plain autograd of one sample at a time."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForSequenceClassification,
)

from dpmoe_trainer.dp import check_model, clipped_sum
from dpmoe_trainer.models import (
    DPMoEBertConfig,
    DPMoEBertForSequenceClassification,
    select_trainable,
)

VOCABULARY, LABELS, PAD = 40, 3, 0

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
DECODER = SHAPE | {"num_key_value_heads": 2, "num_experts_per_tok": 2, "num_labels": LABELS}
FINE = DECODER | {"num_experts": 4, "moe_intermediate_size": 12}


def bert():
    config = DPMoEBertConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_layers=[1], num_labels=LABELS
    )
    return DPMoEBertForSequenceClassification(config)


FAMILIES = {
    "dpmoe-bert": bert,
    "mixtral-classifier": lambda: MixtralForSequenceClassification(
        MixtralConfig(**DECODER, num_local_experts=4)
    ),
    "mixtral-lm": lambda: MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4)),
    "olmoe-lm": lambda: OlmoeForCausalLM(OlmoeConfig(**DECODER, num_experts=4)),
    "qwen2-lm": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**FINE, shared_expert_intermediate_size=12)
    ),
    "qwen3-classifier": lambda: Qwen3MoeForSequenceClassification(
        Qwen3MoeConfig(**FINE, head_dim=4)
    ),
    "gpt-oss-lm": lambda: GptOssForCausalLM(
        GptOssConfig(**DECODER, head_dim=4, num_local_experts=4)
    ),
}


def build(family):
    torch.manual_seed(1)
    model = FAMILIES[family]().double()
    model.set_experts_implementation("eager")  # What it runs without the engine, in float64.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Weights large enough that routing and gradients differ from token to token.
            parameter.mul_(5) if parameter.dim() > 1 else parameter.add_(
                0.1 * torch.randn_like(parameter)
            )
            # One vector a head in attention's softmax: no rule, and frozen in what follows.
            parameter.requires_grad_("sinks" not in name)
    return model


def make_batch(model, samples, length, seed=0):
    """Random tokens, the padding token among them, of random lengths of at least two."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (samples, length), generator=generator)
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.15, PAD)
    real = torch.randint(2, length + 1, (samples, 1), generator=generator)
    mask = (torch.arange(length) < real).long()
    ids = ids.masked_fill(mask == 0, PAD)
    if model.loss_type == "ForCausalLM":
        labels = ids.masked_fill(mask == 0, -100)
    else:
        labels = torch.randint(LABELS, (samples,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def rows(batch, index):
    return {key: value[index] for key, value in batch.items()}


def join(*batches):
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def one_at_a_time(model, batch, clipping_norm):
    """The definition: each sample's own loss, its gradient clipped, all added up."""
    model = copy.deepcopy(model).eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    norms = []
    for index in range(len(batch["labels"])):
        loss = model(**rows(batch, slice(index, index + 1))).loss
        gradients = torch.autograd.grad(
            loss, list(trained.values()), allow_unused=True, materialize_grads=True
        )
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients))
        norms.append(norm)
        for name, gradient in zip(trained, gradients, strict=True):
            total[name] += gradient * min(1.0, clipping_norm / norm)
    return total, torch.tensor(norms, dtype=torch.float64)


def size(gradients):
    return math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients.values()))


def difference(one, other):
    assert one.keys() == other.keys()
    return size({name: one[name] - other[name] for name in one})


def median_norm(model, batch):
    """A clipping norm that clips half of the samples."""
    return float(clipped_sum(model, batch, math.inf)[1].median())


# Five tokens keep every norm in its ghost form; thirty have gradients formed at these widths.
@pytest.mark.parametrize("length", [5, 30])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_sum_is_that_of_samples_clipped_one_at_a_time(family, length):
    model = build(family)
    batch = make_batch(model, 6, length)
    clipping_norm = median_norm(model, batch)

    sums, norms = clipped_sum(model, batch, clipping_norm)

    expected, expected_norms = one_at_a_time(model, batch, clipping_norm)
    assert (expected_norms > clipping_norm).any()
    assert (expected_norms < clipping_norm).any()
    assert difference(sums, expected) < 1e-9 * size(expected)
    assert torch.allclose(norms, expected_norms, rtol=1e-9, atol=0)
    for name, gradient in expected.items():
        assert difference({name: sums[name]}, {name: gradient}) <= 1e-9 * size(expected), name


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


@pytest.mark.parametrize("family", FAMILIES)
def test_one_sample_moves_the_sum_by_at_most_the_clipping_norm(family):
    model = build(family)
    batch = make_batch(model, 6, 8)
    clipping_norm = 0.3 * median_norm(model, batch)
    whole, norms = clipped_sum(model, batch, clipping_norm)
    for index in range(6):
        others = [other for other in range(6) if other != index]
        without, _ = clipped_sum(model, rows(batch, others), clipping_norm)
        moved = difference(whole, without)
        assert moved <= clipping_norm * (1 + 1e-9)
        assert moved == pytest.approx(min(clipping_norm, float(norms[index])), rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_mates_do_not_change_a_contribution(family):
    model = build(family)
    sample = make_batch(model, 1, 8, seed=5)
    clipping_norm = 0.5 * float(clipped_sum(model, sample, math.inf)[1])
    alone, _ = clipped_sum(model, sample, clipping_norm)
    # Copies of one of its own tokens all crowd into the experts that this token goes to.
    crowd = join(*[sample] * 7)
    crowd["input_ids"][:, :] = sample["input_ids"][0, 0]
    crowd["attention_mask"][:, :] = 1
    for mates in (make_batch(model, 7, 8, seed=6), crowd):
        together, _ = clipped_sum(model, join(sample, mates), clipping_norm)
        apart, _ = clipped_sum(model, mates, clipping_norm)
        contribution = {name: together[name] - apart[name] for name in together}
        assert difference(contribution, alone) < 1e-10 * size(together)


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
    assert difference(sums, padded_sums) < 1e-9 * size(sums)
    assert torch.allclose(norms, padded_norms, rtol=1e-9, atol=0)


def test_an_expert_that_no_token_reached_has_a_zero_sum():
    model = build("dpmoe-bert")
    with torch.no_grad():
        # All scores are zero, and every tie is broken the same way.
        model.layers[1].router.weight.zero_()
    batch = make_batch(model, 4, 6)
    counts = []
    handle = model.layers[1].router.register_forward_hook(
        lambda module, inputs, output: counts.append(output[0].flatten().bincount(minlength=4))
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
    check_model(build(family), tolerance=1e-9)


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
