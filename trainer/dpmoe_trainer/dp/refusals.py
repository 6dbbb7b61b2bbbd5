"""What makes a sample's gradient depend on the rest of its batch, refused by name.

The static scan refuses the usual culprits before any forward pass. What it cannot know, such as how
a router chooses, `dpmoe_trainer.dp.check_model` finds by comparing with one sample at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dpmoe_trainer.dp.errors import NotPerSample

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)

_COUPLED_FAMILIES = {
    "nllb-moe": "its experts' capacity counts the tokens of the whole batch",
}

_BATCH_ROUTING = {"expert_choice", "experts_choose", "sinkhorn", "base_layer"}


def refuse_coupled(model: nn.Module) -> None:
    """Raises if the model is known to couple the samples of a batch.

    Raises:
        NotPerSample: Names the setting or module, and the remedy.
    """
    config = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        raise NotPerSample(
            "config.output_router_logits is True, which adds a balancing loss over the whole "
            "batch: set it to False, and balance by each sample's own loss or by released loads "
            "(training.balancing)"
        )
    _refuse_batch_routing(config)
    family = getattr(config, "model_type", None)
    if family in _COUPLED_FAMILIES:
        raise NotPerSample(f"model type {family!r} is not supported: {_COUPLED_FAMILIES[family]}")
    if _is_half(model):
        raise NotPerSample(
            "the model computes in float16, whose overflow models clamp by the whole batch's "
            "values: use bfloat16 or float32"
        )
    for name, module in model.named_modules():
        if isinstance(module, _BATCH_NORMS):
            raise NotPerSample(
                f"module {name!r} is a {type(module).__name__}, which normalises over the batch: "
                "replace it with a layer norm"
            )


def _is_half(model: nn.Module) -> bool:
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        return True
    return any(
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        for device in ("cpu", "cuda")
    )


def _refuse_batch_routing(config: Any) -> None:
    """Routers that choose tokens for experts, or balance them, over the whole batch."""
    for field, value in vars(config).items() if config is not None else ():
        if isinstance(value, str) and value.lower().replace("-", "_") in _BATCH_ROUTING:
            raise NotPerSample(
                f"config.{field} is {value!r}, which routes a token by the batch's other tokens: "
                "use a router whose tokens choose their experts"
            )


@contextmanager
def refusing_changed_buffers(model: nn.Module) -> Iterator[None]:
    """Raises if a buffer changed meanwhile: it would carry un-noised data from batch to batch.

    Raises:
        NotPerSample: Names the buffer.
    """
    before = _buffer_states(model)
    yield
    after = _buffer_states(model)
    changed = [name for name, state in after.items() if before.get(name) != state]
    if changed:
        raise NotPerSample(
            f"the model's forward pass changed buffer {changed[0]!r}, which so remembers private "
            "data without noise: turn that update off"
        )


def _buffer_states(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (buffer.data_ptr(), buffer._version) for name, buffer in model.named_buffers()}
