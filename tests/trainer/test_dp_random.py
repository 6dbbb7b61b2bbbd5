"""Models of every family with settings drawn at random, against single samples.

A family's settings change how its code uses parameters: what is tied, biased, clamped in place,
routed in groups, padded on which side. Written-out cases cover what someone thought of.
"""

import copy
import math
import random

import pytest
import torch
from tests.trainer.families import in_double
from tests.trainer.oracle import difference, one_at_a_time, size
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    GptOssConfig,
    GptOssForCausalLM,
    GptOssForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen2MoeForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeForSequenceClassification,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from dpmoe_trainer.dp import clipped_sum

VOCABULARY, LABELS, PAD = 31, 3, 30
SEEDS = range(5)
FROZEN = ("gate.weight", "router", "attn", "embed", "norm")
"""Parts of names; what a random choice of them leaves is trained."""


def mixtral(draw, common, experts):
    window = draw.choice([None, 3])
    config = MixtralConfig(**common, num_local_experts=experts, sliding_window=window)
    return draw.choice([MixtralForCausalLM, MixtralForSequenceClassification])(config)


def llama(draw, common, experts):
    del experts
    biases = {"attention_bias": draw.random() < 0.5, "mlp_bias": draw.random() < 0.5}
    kind = draw.choice([LlamaForCausalLM, LlamaForSequenceClassification])
    return kind(LlamaConfig(**common, **biases))


def olmoe(draw, common, experts):
    settings = {"attention_bias": draw.random() < 0.5, "clip_qkv": draw.choice([None, 0.3])}
    return OlmoeForCausalLM(OlmoeConfig(**common, **settings, num_experts=experts))


def qwen2(draw, common, experts):
    config = Qwen2MoeConfig(
        **common,
        num_experts=experts,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=10,
        decoder_sparse_step=draw.choice([1, 2]),
        norm_topk_prob=draw.random() < 0.5,
        qkv_bias=draw.random() < 0.5,
    )
    return draw.choice([Qwen2MoeForCausalLM, Qwen2MoeForSequenceClassification])(config)


def qwen3(draw, common, experts):
    config = Qwen3MoeConfig(
        **common,
        num_experts=experts,
        moe_intermediate_size=12,
        head_dim=draw.choice([4, 8]),
        norm_topk_prob=draw.random() < 0.5,
        attention_bias=draw.random() < 0.5,
    )
    return draw.choice([Qwen3MoeForCausalLM, Qwen3MoeForSequenceClassification])(config)


def gpt_oss(draw, common, experts):
    settings = {"sliding_window": draw.choice([3, 128]), "attention_bias": draw.random() < 0.5}
    config = GptOssConfig(**common, **settings, num_local_experts=experts, head_dim=4)
    return draw.choice([GptOssForCausalLM, GptOssForSequenceClassification])(config)


def deepseek(draw, common):
    """Settings that both versions share, with two groups of two experts or one of all."""
    groups = draw.choice([1, 2])
    return common | {
        "num_key_value_heads": common["num_attention_heads"],
        "num_experts_per_tok": draw.choice([1, 2]),
        "q_lora_rank": draw.choice([None, 8]),
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": draw.choice([4, 8]),
        "moe_intermediate_size": 12,
        "n_routed_experts": 4,
        "n_shared_experts": draw.choice([1, 2]),
        "first_k_dense_replace": draw.choice([0, 1]),
        "n_group": groups,
        "topk_group": draw.choice([1, groups]),
        "norm_topk_prob": draw.random() < 0.5,
        "attention_bias": draw.random() < 0.5,
    }


def deepseek_v2(draw, common, experts):
    del experts
    method = draw.choice(["greedy", "group_limited_greedy"])
    config = DeepseekV2Config(**deepseek(draw, common), topk_method=method)
    return draw.choice([DeepseekV2ForCausalLM, DeepseekV2ForSequenceClassification])(config)


def deepseek_v3(draw, common, experts):
    del experts
    config = DeepseekV3Config(**deepseek(draw, common))
    return draw.choice([DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification])(config)


def switch(draw, common, experts):
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        d_ff=12,
        d_kv=4,
        num_heads=4,
        num_layers=common["num_hidden_layers"],
        num_decoder_layers=1,
        num_sparse_encoder_layers=draw.choice([0, 1]),
        num_sparse_decoder_layers=draw.choice([0, 1]),
        num_experts=experts,
        expert_capacity=draw.choice([1, 2, 64]),
        router_bias=draw.random() < 0.5,
        pad_token_id=0,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        tie_word_embeddings=common["tie_word_embeddings"],
    )
    return SwitchTransformersForConditionalGeneration(config)


FAMILIES = [mixtral, llama, olmoe, qwen2, qwen3, gpt_oss, deepseek_v2, deepseek_v3, switch]
IN_FLOAT32 = (deepseek_v2, deepseek_v3)
"""Families whose routers compute in float32 whatever their model."""


def draw_model(draw, family):
    experts = draw.choice([1, 2, 3, 4, 8])
    heads = draw.choice([2, 4])
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": draw.choice([8, 16]),
        "intermediate_size": draw.choice([8, 20]),
        "num_hidden_layers": draw.choice([1, 2]),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([1, heads]),
        "num_experts_per_tok": draw.choice([1, experts]),
        "num_labels": LABELS,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": draw.random() < 0.5,
    }
    if family is llama:
        del common["num_experts_per_tok"]
    model = in_double(family(draw, common, experts))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and family is not switch:
                parameter.mul_(5)
            if parameter.dim() == 1 or not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
    frozen = draw.sample(FROZEN, draw.choice([0, 0, 1, 3]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    return model.train(draw.random() < 0.5)


def draw_batch(draw, model):
    samples, length = draw.choice([(1, 2), (1, 7), (2, 2), (3, 2), (4, 4), (5, 9), (3, 20)])
    ids = torch.randint(PAD, (samples, length))
    mask = torch.ones_like(ids)
    if draw.random() < 0.7:
        # The longest sample has no padding, as from a collator.
        real = torch.randint(1, length + 1, (samples, 1))
        real[0] = length
        mask = (torch.arange(length) < real).long()
        if draw.random() < 0.5:
            mask = mask.flip(1)
        ids = ids.masked_fill(mask == 0, PAD)
    if model.loss_type == "ForCausalLM":
        labels = ids.masked_fill(mask == 0, -100) if draw.random() < 0.7 else ids.clone()
    elif model.loss_type == "ForSequenceClassification":
        labels = torch.randint(LABELS, (samples,))
    else:
        labels = torch.randint(VOCABULARY, (samples, draw.choice([2, 5])))
        labels[:, 1:][torch.rand(labels[:, 1:].shape) < 0.3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_the_settings_the_sum_is_that_of_single_samples(family, seed):
    draw = random.Random(f"{family.__name__} {seed}")
    torch.manual_seed(seed)
    model = draw_model(draw, family)
    batch = draw_batch(draw, model)
    reference = copy.deepcopy(model)
    if family not in (llama, switch):
        reference.set_experts_implementation("eager")
        model.set_experts_implementation(draw.choice(["eager", "grouped_mm", "batched_mm"]))

    clipping_norm = float(clipped_sum(model, batch, math.inf)[1].median())
    sums, norms = clipped_sum(model, batch, clipping_norm)

    expected, expected_norms = one_at_a_time(reference, batch, clipping_norm)
    tolerance = 2e-7 if family in IN_FLOAT32 else 1e-10
    torch.testing.assert_close(norms, expected_norms, rtol=tolerance, atol=1e-13)
    assert difference(sums, expected) <= tolerance * size(expected)
