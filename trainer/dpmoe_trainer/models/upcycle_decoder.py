"""Sparse upcycling of dense decoders: Llama and Mistral become Mixtral, Qwen3 becomes Qwen3-MoE.

The results are models that transformers knows, with its own names and files: only the
feed-forward networks change, each into experts that are copies of it (see `models.upcycle`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from dpmoe_trainer.models.checkpoint import UnusableModel, require_complete
from dpmoe_trainer.models.load import load_tokenizer

DECODERS = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
"""Dense families, and the sparse ones of the same attention and norms."""

_INIT_STD = 0.02
_NOT_CARRIED_OVER = ("model_type", "architectures", "dtype", "transformers_version")


def upcycle_decoder(
    folder: Path,
    dense_config: Any,
    experts: int,
    top_k: int,
    layers: Sequence[int],
    num_labels: int | None,
    generator: torch.Generator,
    perturbation: float,
) -> PreTrainedModel:
    """Makes a mixture of experts from a dense decoder; the arguments are `upcycle`'s, checked.

    Raises:
        UnusableModel: The checkpoint has biases that the sparse family has no place for.
        ValueError: The sparse family cannot have experts in these layers only.
    """
    config = _sparse_config(folder, dense_config, experts, top_k, layers)
    factory = AutoModelForCausalLM
    if num_labels is not None:
        factory = AutoModelForSequenceClassification
        config.num_labels = num_labels
        config.problem_type = "single_label_classification"
    model = factory.from_config(config).float()
    source = AutoModelForCausalLM if num_labels is None else AutoModel
    dense, loading = source.from_pretrained(
        folder,
        config=dense_config,
        use_safetensors=True,
        local_files_only=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    require_complete(folder, loading)
    with torch.no_grad():
        _copy(dense.base_model, model.base_model)
        if num_labels is None:
            model.get_output_embeddings().weight.copy_(dense.get_output_embeddings().weight)
        else:
            model.score.weight.copy_(_INIT_STD * _normal(model.score.weight, generator))
        for layer in layers:
            _start(model.base_model.layers[layer].mlp, generator, perturbation)
    return model.eval()


def _sparse_config(
    folder: Path, dense: Any, experts: int, top_k: int, layers: Sequence[int]
) -> Any:
    family = DECODERS[dense.model_type]
    for field in ("mlp_bias", "attention_bias"):
        if getattr(dense, field, False) and not (family == "qwen3_moe" and field != "mlp_bias"):
            raise UnusableModel(
                f"{folder}: config.{field} is True, and {family} has no such biases: use a "
                "checkpoint without them"
            )
    config = AutoConfig.for_model(family)
    for field, value in dense.to_dict().items():
        if hasattr(config, field) and field not in _NOT_CARRIED_OVER:
            setattr(config, field, value)
    config.head_dim = dense.head_dim
    config.rope_parameters = dense.rope_parameters
    config.sliding_window = getattr(dense, "sliding_window", None)
    config.num_experts_per_tok = top_k
    config.output_router_logits = False
    if config.pad_token_id is None:
        config.pad_token_id = load_tokenizer(folder).pad_token_id
    dense_layers = sorted(set(range(dense.num_hidden_layers)) - set(layers))
    if family == "qwen3_moe":
        config.num_experts = experts
        config.moe_intermediate_size = dense.intermediate_size
        config.norm_topk_prob = True
        config.decoder_sparse_step = 1
        config.mlp_only_layers = dense_layers
    elif dense_layers:
        raise ValueError(
            f"layers are {list(layers)}, and a {dense.model_type!r} can be upcycled as a whole "
            f"only: choose all of 0 to {dense.num_hidden_layers - 1}"
        )
    else:
        config.num_local_experts = experts
    return config


def _copy(dense: Any, model: Any) -> None:
    """Copies all that both have, and each dense network into the experts that stand for it."""
    targets = dict(model.named_parameters())
    for name, parameter in dense.named_parameters():
        if name in targets:
            targets[name].copy_(parameter)
    for source, target in zip(dense.layers, model.layers, strict=True):
        if hasattr(target.mlp, "experts"):
            both = torch.cat([source.mlp.gate_proj.weight, source.mlp.up_proj.weight])
            # Copying one network's weight broadcasts it over the experts.
            target.mlp.experts.gate_up_proj.copy_(both)
            target.mlp.experts.down_proj.copy_(source.mlp.down_proj.weight)


def _start(mlp: nn.Module, generator: torch.Generator, perturbation: float) -> None:
    """A fresh router, and experts that differ a little."""
    parts: Any = mlp
    parts.gate.weight.copy_(_INIT_STD * _normal(parts.gate.weight, generator))
    for weight in (parts.experts.gate_up_proj, parts.experts.down_proj):
        weight.add_(_normal(weight, generator), alpha=perturbation * float(weight.std()))


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)
