"""Tiny models of every family that the engine clips, and batches for them."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForSequenceClassification,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
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
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersTop1Router,
)

from dpmoe_trainer.models import DPMoEBertConfig, DPMoEBertForSequenceClassification
from dpmoe_trainer.models.lora import add_lora

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
DEEPSEEK = DECODER | {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}


def _bert():
    config = DPMoEBertConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_layers=[1], num_labels=LABELS
    )
    return DPMoEBertForSequenceClassification(config)


def _mixtral(**settings: Any):
    return MixtralForCausalLM(MixtralConfig(**DECODER | settings, num_local_experts=4))


def _gpt_oss():
    return GptOssForCausalLM(GptOssConfig(**DECODER, head_dim=4, num_local_experts=4))


def _switch():
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        d_ff=24,
        d_kv=4,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=3,
        expert_capacity=2,
        pad_token_id=PAD,
        decoder_start_token_id=PAD,
    )
    return SwitchTransformersForConditionalGeneration(config)


FAMILIES = {
    "dpmoe-bert": _bert,
    "mixtral-classifier": lambda: MixtralForSequenceClassification(
        MixtralConfig(**DECODER, num_local_experts=4)
    ),
    "mixtral-lm": _mixtral,
    "mixtral-tied": lambda: _mixtral(tie_word_embeddings=True),
    "mixtral-lora": lambda: add_lora(_mixtral(), rank=2, alpha=4.0),
    "olmoe-lm": lambda: OlmoeForCausalLM(OlmoeConfig(**DECODER, num_experts=4)),
    "qwen2-lm": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**FINE, shared_expert_intermediate_size=12)
    ),
    "qwen3-classifier": lambda: Qwen3MoeForSequenceClassification(
        Qwen3MoeConfig(**FINE, head_dim=4)
    ),
    "gpt-oss-lm": _gpt_oss,
    "gpt-oss-lora": lambda: add_lora(_gpt_oss(), rank=2, alpha=4.0),
    "deepseek-v2-classifier": lambda: DeepseekV2ForSequenceClassification(
        DeepseekV2Config(**DEEPSEEK, topk_method="group_limited_greedy")
    ),
    "deepseek-v3-lm": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK)),
    "switch": _switch,
    "switch-lora": lambda: add_lora(_switch(), rank=2, alpha=4.0),
}

TOLERANCE = {name: 2e-7 if name.startswith("deepseek") else 1e-10 for name in FAMILIES}
"""How exact a family is in float64: DeepSeek's routers compute in float32 whatever their model."""


def build(family: str, dtype: torch.dtype = torch.float64):
    """The family's model, with weights large enough that routing differs from token to token."""
    torch.manual_seed(1)
    model = _cast(FAMILIES[family](), dtype)
    for module in model.modules():
        if hasattr(module, "has_post_expert_norm"):
            # What it runs without the engine, in float64.
            module.config._experts_implementation = "eager"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not family.startswith("switch"):
                parameter.mul_(5)
            if parameter.dim() == 1 or not parameter.any():  # An adapter's second factor is zero.
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def in_double(model: nn.Module):
    """The same model in double precision."""
    return _cast(copy.deepcopy(model), torch.float64)


def _cast(model: nn.Module, dtype: torch.dtype):
    for module in model.modules():
        if isinstance(module, SwitchTransformersTop1Router):
            module.dtype = dtype
    return model.to(dtype)


def make_batch(model: nn.Module, samples: int, length: int, seed: int = 0):
    """Random tokens, the padding token among them, of random lengths of at least two."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = _tokens(samples, length, generator)
    if model.loss_type == "ForConditionalGeneration":
        labels, counted = _tokens(samples, length // 2 + 2, generator)
        labels = labels.masked_fill(counted == 0, -100)
    elif model.loss_type == "ForCausalLM":
        labels = ids.masked_fill(mask == 0, -100)
    else:
        labels = torch.randint(LABELS, (samples,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _tokens(samples: int, length: int, generator: torch.Generator):
    ids = torch.randint(1, VOCABULARY, (samples, length), generator=generator)
    # Not the first: a classifier or an adapter that sees nothing but padding has no gradient.
    inner = torch.rand(ids.shape, generator=generator)[:, 1:] < 0.15
    ids[:, 1:] = ids[:, 1:].masked_fill(inner, PAD)
    real = torch.randint(2, length + 1, (samples, 1), generator=generator)
    mask = (torch.arange(length) < real).long()
    return ids.masked_fill(mask == 0, PAD), mask


def rows(batch, index):
    return {key: value[index] for key, value in batch.items()}


def join(*batches):
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def crowd_of(sample, samples: int):
    """Copies of one of a sample's own tokens: all crowd into the experts that it goes to."""
    crowd = join(*[sample] * samples)
    crowd["input_ids"][:, :] = sample["input_ids"][0, 0]
    crowd["attention_mask"][:, :] = 1
    return crowd
