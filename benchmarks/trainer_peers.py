"""Opacus on the same model, with experts taken apart so that it can clip them at all.

Opacus knows linear layers whose input's first dimension is the sample, and no fused experts. So
each expert becomes two linear layers, and its rows are gathered into [B, most rows of a sample, d],
filled up with zeros. That is the fastest form of the model that it clips correctly.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn
from transformers import MixtralForCausalLM

from benchmarks.trainer_models import CLIPPING_NORM
from dpmoe_trainer.dp.losses import per_sample_losses

Step = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""A batch in, some of the clipped sums out."""


class UnfusedExperts(nn.Module):
    """A Mixtral's routed layer, each expert of linear layers of its own."""

    def __init__(self, block: Any, choices: int) -> None:
        super().__init__()
        self._choices = choices
        self.gate = _linear(block.gate.weight)
        self.ups = nn.ModuleList(map(_linear, block.experts.gate_up_proj))
        self.downs = nn.ModuleList(map(_linear, block.experts.down_proj))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, d] to the same."""
        x_BTD = hidden_states
        chances = self.gate(x_BTD).float().softmax(-1)
        weights, chosen = chances.topk(self._choices, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x_BTD.dtype)
        output = torch.zeros_like(x_BTD)
        for index, (up, down) in enumerate(zip(self.ups, self.downs, strict=True)):
            weight_BT = (weights * (chosen == index)).sum(-1)
            routed_BT = (chosen == index).any(-1)
            rows = max(1, int(routed_BT.sum(1).max()))
            order_BT = torch.argsort(routed_BT.int(), dim=1, descending=True, stable=True)
            place_BL1 = order_BT[:, :rows, None]
            place_BLD = place_BL1.expand(-1, -1, x_BTD.shape[2])
            gate, value = up(x_BTD.gather(1, place_BLD)).chunk(2, -1)
            rows_BLD = down(F.silu(gate) * value) * weight_BT[..., None].gather(1, place_BL1)
            output = output.scatter_add(1, place_BLD, rows_BLD)
        return output


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.detach().clone())
    return layer


def unfused(model: MixtralForCausalLM) -> Any:
    """A copy of the model whose experts are taken apart."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.mlp = UnfusedExperts(layer.mlp, model.config.num_experts_per_tok)
    return model.train()


def _losses(wrapped: nn.Module, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = wrapped(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return per_sample_losses(model, logits, batch["labels"])


def opacus_hooks(model: MixtralForCausalLM, samples: int) -> Step:
    """Every sample's gradient in memory."""
    apart = unfused(model)
    wrapped = GradSampleModule(apart, loss_reduction="sum", strict=False)
    optimizer = DPOptimizer(
        torch.optim.SGD(apart.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=CLIPPING_NORM,
        expected_batch_size=samples,
        loss_reduction="sum",
    )

    def step(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        _losses(wrapped, apart, batch).sum().backward()
        optimizer.clip_and_accumulate()
        return {"lm_head.weight": apart.lm_head.weight.summed_grad}

    return step


def opacus_ghost(model: MixtralForCausalLM, samples: int) -> Step:
    """Norms without gradients, then a second backward pass of the scaled losses."""
    apart = unfused(model)
    wrapped = GradSampleModuleFastGradientClipping(
        apart,
        loss_reduction="sum",
        strict=False,
        max_grad_norm=CLIPPING_NORM,
        use_ghost_clipping=True,
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(apart.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=CLIPPING_NORM,
        expected_batch_size=samples,
        loss_reduction="sum",
    )

    def step(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        losses = _losses(wrapped, apart, batch)
        DPTensorFastGradientClipping(wrapped, optimizer, losses, "sum").backward()
        return {"lm_head.weight": apart.lm_head.weight.grad}

    return step
