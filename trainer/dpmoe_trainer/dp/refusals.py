"""What makes a sample's gradient depend on the rest of its batch, refused by name.

A static scan, so that the refusal comes before any forward pass. It knows the usual culprits; what
it cannot know, `dpmoe_trainer.dp.check_model` finds by comparing with one sample at a time.
"""

from __future__ import annotations

from torch import nn

from dpmoe_trainer.dp.errors import NotPerSample

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)

_COUPLED_FAMILIES = {
    "nllb-moe": "its experts' capacity counts the tokens of the whole batch",
    "switch_transformers": "its experts get tokens without their samples",
}


def refuse_coupled(model: nn.Module) -> None:
    """Raises if the model is known to couple the samples of a batch.

    Raises:
        NotPerSample: Names the setting or module, and the remedy.
    """
    config = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        raise NotPerSample(
            "config.output_router_logits is True, which adds a balancing loss over the whole "
            "batch: set it to False"
        )
    family = getattr(config, "model_type", None)
    if family in _COUPLED_FAMILIES:
        raise NotPerSample(f"model type {family!r} is not supported: {_COUPLED_FAMILIES[family]}")
    for name, module in model.named_modules():
        if isinstance(module, _BATCH_NORMS):
            raise NotPerSample(
                f"module {name!r} is a {type(module).__name__}, which normalises over the batch: "
                "replace it with a layer norm"
            )
