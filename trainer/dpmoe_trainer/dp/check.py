"""Has the engine prove itself on a model, before it sees data.

The rules know how torch functions use parameters, not how a model arranges its rows. So the engine
runs once on made-up tokens and is compared with plain automatic differentiation of the model's own
loss, one sample at a time. A model that couples samples, or mixes their rows, cannot pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dpmoe_trainer.dp.engine import clipped_sum, evaluating
from dpmoe_trainer.dp.errors import NotPerSample

_SAMPLES, _TOKENS = 3, 5


def check_model(model: nn.Module, tolerance: float = 1e-3) -> None:
    """Compares the engine's gradient sum and norms with the model's own, sample by sample.

    Costs a few passes over three samples of five tokens, and the gradients of two in memory.

    Args:
        model: As `clipped_sum` takes it.
        tolerance: Largest relative difference that rounding may explain.

    Raises:
        NotPerSample: They differ, or `clipped_sum` refuses the model. Names the parameter.
    """
    batch = _made_up_batch(model)
    sums, norms = clipped_sum(model, batch, math.inf)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: torch.zeros_like(total) for name, total in sums.items()}
    scale = torch.zeros_like(norms[0])
    with evaluating(model):
        for index in range(_SAMPLES):
            gradients = _own_gradients(model, parameters, batch, index)
            norm = torch.stack([g.double().pow(2).sum() for g in gradients.values()]).sum().sqrt()
            _compare(f"the norm of sample {index}", norms[index] - norm, norm, tolerance)
            scale += norm
            for name, gradient in gradients.items():
                expected[name] += gradient
    for name, total in sums.items():
        _compare(f"parameter {name!r}", total - expected[name], scale, tolerance)


def _own_gradients(
    model: nn.Module, parameters: dict[str, nn.Parameter], batch: dict[str, Tensor], index: int
) -> dict[str, Tensor]:
    """One sample's gradient by the model's own loss."""
    sample = {key: value[index : index + 1] for key, value in batch.items()}
    with torch.enable_grad():
        loss = model(**sample).loss
    gradients = torch.autograd.grad(
        loss, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, gradients, strict=True))


def _made_up_batch(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    shape = (_SAMPLES, _TOKENS)
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.long)
    mask[-1, -2:] = 0
    if config.pad_token_id is not None:
        ids[ids == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
        ids[-1, -2:] = config.pad_token_id
    if getattr(model, "loss_type", None) == "ForCausalLM":
        labels = ids.masked_fill(mask == 0, -100)
    else:
        labels = torch.arange(_SAMPLES) % config.num_labels
    device = next(model.parameters()).device
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {key: value.to(device) for key, value in batch.items()}


def _compare(what: str, difference: Tensor, scale: Tensor, tolerance: float) -> None:
    relative = float(difference.double().pow(2).sum().sqrt() / scale.clamp_min(1e-12))
    if not relative <= tolerance:
        raise NotPerSample(
            f"the engine and the model's own gradients differ in {what} by {relative:.1e} of the "
            "gradient: the model couples or mixes the samples of a batch; freeze that part or use "
            "another model"
        )
