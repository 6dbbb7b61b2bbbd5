"""LoRA: trains low-rank additions to frozen weights, with `peft`.

Fewer trained numbers get noise, which is what LoRA is for under differential privacy. Adapters go
on attention's linear layers and, by expert, on fused expert weights. `merged` gives back a model of
the family that it was made from, with the same parameters and files.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

_HEADS = ("classifier", "score")


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    attention: bool = True,
    experts: bool = True,
) -> PeftModel:
    """Freezes a model and adds trained low-rank adapters; a classifier's head stays trained.

    Args:
        model: A mixture of experts; it is changed.
        rank: Of each adapter, and of each expert's.
        alpha: The additions are scaled by alpha/rank.
        attention: Whether attention's linear layers get adapters.
        experts: Whether experts do: fused weights, or each expert's linear layers.

    Raises:
        ValueError: Nothing in the model is to get an adapter, or the rank is not positive.
    """
    if rank < 1:
        raise ValueError(f"the adapters' rank is {rank}: give at least 1")
    modules = _attention_layers(model) if attention else []
    modules += _expert_layers(model) if experts else []
    parameters = _fused_weights(model) if experts else []
    if not modules and not parameters:
        raise ValueError(
            f"{type(model).__name__} has nothing to adapt (attention: {attention}, experts: "
            f"{experts}): choose attention, or a model with experts"
        )
    heads = [name for name, _ in model.named_children() if name in _HEADS]
    return get_peft_model(
        model,
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            target_modules=modules,
            target_parameters=parameters or None,
            modules_to_save=heads or None,
        ),
    )


def merged(model: Any) -> Any:
    """The model with its adapters added into its weights, as an ordinary model of its family.

    A model without adapters is returned as it is.
    """
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def _attention_layers(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ("attn" in name.lower() or "attention" in name.lower())
    ]


def _expert_layers(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "experts" in name.split(".")
    ]


def _fused_weights(model: nn.Module) -> list[str]:
    return [
        f"{name}.{kind}"
        for name, module in model.named_modules()
        if hasattr(module, "has_post_expert_norm")
        for kind, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    ]
