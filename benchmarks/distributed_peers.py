"""Expert-parallel training without privacy: what the trainer's exchange is compared with.

The same tokens take the same way, sorted by expert alone; the ranks tell each other how many there
are for each expert; the weights' gradients come from autograd. Products are transformers' grouped
ones. What all ranks hold is summed afterwards, one parameter after the other as the trainer does.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dpmoe_trainer.parallel.collectives import exchange
from dpmoe_trainer.parallel.shards import Shard, shard_of, sharded_parameters

IMPLEMENTATION = "plain-expert-parallel"


def plain_parallel_step(model: Any, batch: dict[str, Tensor]) -> None:
    """The gradient of the ranks' mean loss, without privacy."""
    model.config._experts_implementation = IMPLEMENTATION
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    shards = sharded_parameters(model)
    for name, parameter in sorted(model.named_parameters()):
        if name not in shards:
            dist.all_reduce(parameter.grad)


def _forward(module: Any, x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
    shard = shard_of(module)
    assert shard is not None, "experts are spread"
    choices = chosen_NK.shape[1]
    _, slot = torch.sort(chosen_NK.flatten(), stable=True)
    counts = torch.bincount(chosen_NK.flatten(), minlength=shard.total)
    rows = x_ND.index_select(0, torch.div(slot, choices, rounding_mode="floor"))
    out = _away(module, rows, counts, shard)
    out = out * weights_NK.flatten()[slot, None]
    place = torch.empty_like(slot)
    place[slot] = torch.arange(len(slot), device=slot.device)
    return out.index_select(0, place).view(*chosen_NK.shape, -1).sum(1)


def _away(module: Any, rows: Tensor, counts: Tensor, shard: Shard) -> Tensor:
    """To the ranks that hold the experts, through these, and back."""
    ranks = shard.total // shard.count
    told = exchange(counts, [shard.count] * ranks, [shard.count] * ranks, shard.group)
    by_rank = torch.stack([counts.view(ranks, -1).sum(1), told.view(ranks, -1).sum(1)]).tolist()
    sent, received = by_rank
    arrived = exchange(rows, sent, received, shard.group)
    expert = torch.arange(shard.count, device=rows.device).repeat(ranks).repeat_interleave(told)
    _, order = torch.sort(expert, stable=True)
    ends = told.view(ranks, -1).sum(0).cumsum(0).int()
    gate_up = _grouped(arrived[order], module.gate_up_proj, ends)
    out = _grouped(module._apply_gate(gate_up), module.down_proj, ends)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return exchange(out[place], received, sent, shard.group)


def _grouped(rows: Tensor, weight: nn.Parameter, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
