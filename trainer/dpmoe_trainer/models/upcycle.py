"""Sparse upcycling: a dense BERT or decoder checkpoint becomes a mixture of experts.

Each chosen layer's feed-forward network is copied into E experts under a fresh router (Komatsuzaki
et al. 2023, "Sparse Upcycling", arXiv 2212.05055). Weights of a token's experts sum to one, so
equal copies compute exactly what the dense layer did; then small noise makes them differ, or they
would get equal gradients for ever. Nothing here sees private data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, BertModel, PreTrainedModel

from dpmoe_trainer.models.bert_moe import (
    DPMoEBertConfig,
    DPMoEBertForSequenceClassification,
    DPMoEBertLayer,
)
from dpmoe_trainer.models.checkpoint import UnusableModel, inspect_folder, require_complete
from dpmoe_trainer.models.upcycle_decoder import DECODERS, upcycle_decoder

_INIT_STD = 0.02
_NOT_CARRIED_OVER = (
    "model_type",
    "architectures",
    "dtype",
    "transformers_version",
    "_name_or_path",
)


def upcycle(
    dense_dir: str | Path,
    experts: int,
    top_k: int,
    layers: Sequence[int],
    num_labels: int | None,
    seed: int,
    perturbation: float = 0.01,
) -> PreTrainedModel:
    """Makes a mixture of experts from a dense checkpoint.

    A BERT becomes our own `DPMoEBertForSequenceClassification`; Llama and Mistral become Mixtral
    and Qwen3 becomes Qwen3-MoE, as transformers knows them.

    Args:
        dense_dir: Folder with the checkpoint, in safetensors.
        experts: E, experts of each chosen layer.
        top_k: Experts that compute a token, at most E.
        layers: Which layers get experts, from 0; for a Mixtral that must be all.
        num_labels: Classes of the new head; None keeps a decoder's own, for language modelling.
        seed: Seeds the router, the head and the perturbation.
        perturbation: Standard deviation of the noise on the experts' weights, relative to the
            weights' own; zero leaves equal copies.

    Raises:
        UnusableModel: The folder is refused (`inspect_folder`), or its model is none of these.
        ValueError: Expert, layer or label counts do not fit together.
    """
    folder = inspect_folder(Path(dense_dir))
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.model_type not in (*DECODERS, "bert") or getattr(config, "is_decoder", False):
        raise UnusableModel(
            f"{folder}: upcycling takes a dense BERT encoder, or one of {', '.join(DECODERS)}; "
            f"this is a {config.model_type!r} (is_decoder {getattr(config, 'is_decoder', False)})"
        )
    _check_shape(experts, top_k, layers, num_labels, config.num_hidden_layers)
    generator = torch.Generator().manual_seed(seed)
    if config.model_type in DECODERS:
        return upcycle_decoder(
            folder, config, experts, top_k, layers, num_labels, generator, perturbation
        )
    if num_labels is None:
        raise ValueError("num_labels is None, and a BERT has no head of its own: give the classes")
    dense, loading = BertModel.from_pretrained(
        folder,
        config=config,
        add_pooling_layer=False,
        use_safetensors=True,
        local_files_only=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    require_complete(folder, loading)
    model = DPMoEBertForSequenceClassification(
        _moe_config(config, experts, top_k, layers, num_labels)
    )
    _copy_dense(dense, model)
    _initialise_new(model, generator, perturbation)
    return model.eval()


def _check_shape(
    experts: int, top_k: int, layers: Sequence[int], num_labels: int | None, dense_layers: int
) -> None:
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k} of {experts} experts: choose 1 ≤ top_k ≤ experts")
    if not layers or len(set(layers)) != len(layers) or not set(layers) <= set(range(dense_layers)):
        raise ValueError(
            f"layers are {list(layers)}: choose distinct ones of 0 to {dense_layers - 1}"
        )
    if num_labels is not None and num_labels < 2:
        raise ValueError(f"num_labels is {num_labels}: a classifier has at least 2")


def _moe_config(
    dense: DPMoEBertConfig, experts: int, top_k: int, layers: Sequence[int], num_labels: int
) -> DPMoEBertConfig:
    kept = {key: v for key, v in dense.to_dict().items() if key not in _NOT_CARRIED_OVER}
    kept |= {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_layers": sorted(layers),
        # Whatever the dense model was trained with: dropout is off under differential privacy.
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": False,
        "id2label": {index: f"LABEL_{index}" for index in range(num_labels)},
        "label2id": {f"LABEL_{index}": index for index in range(num_labels)},
        "problem_type": "single_label_classification",
    }
    return DPMoEBertConfig(**kept)


@torch.no_grad()
def _copy_dense(dense: BertModel, model: DPMoEBertForSequenceClassification) -> None:
    model.embeddings.load_state_dict(dense.embeddings.state_dict())
    for source, target in zip(dense.encoder.layer, model.layers, strict=True):
        if not isinstance(target, DPMoEBertLayer):
            target.load_state_dict(source.state_dict())
            continue
        target.attention.load_state_dict(source.attention.state_dict())
        target.LayerNorm.load_state_dict(source.output.LayerNorm.state_dict())
        # Copying one network's weight broadcasts it over the experts.
        target.experts.up_proj.copy_(source.intermediate.dense.weight)
        target.experts.up_proj_bias.copy_(source.intermediate.dense.bias)
        target.experts.down_proj.copy_(source.output.dense.weight)
        target.experts.down_proj_bias.copy_(source.output.dense.bias)


@torch.no_grad()
def _initialise_new(
    model: DPMoEBertForSequenceClassification, generator: torch.Generator, perturbation: float
) -> None:
    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    model.classifier.weight.copy_(_INIT_STD * normal(model.classifier.weight))
    model.classifier.bias.zero_()
    for layer in model.layers:
        if isinstance(layer, DPMoEBertLayer):
            layer.router.weight.copy_(_INIT_STD * normal(layer.router.weight))
            for weight in (layer.experts.up_proj, layer.experts.down_proj):
                weight.add_(normal(weight), alpha=perturbation * float(weight.std()))
