"""A model over the ranks of a plan: which part of it each holds, and the whole of it again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dpmoe_trainer.checkpoint import Part
from dpmoe_trainer.models.expert_adapters import Factor, expert_factors
from dpmoe_trainer.parallel.dense import dense_shards, gather_dense, offsets, shard_dense
from dpmoe_trainer.parallel.hand_out import hand_out_rest, require_one_layout
from dpmoe_trainer.parallel.ranks import Ranks
from dpmoe_trainer.parallel.shards import gather_experts, shard_experts, sharded_parameters


@dataclass(frozen=True)
class Spread:
    """What of a model's parameters is here, by their names; nothing of those that are whole.

    Attributes:
        first_experts: of fused experts, the number of the first that is here.
        offsets: of what else is cut, how many numbers come before those that are here.
        parts: both, as checkpoints keep them.
        factors: of adapters on fused experts, how they hold the experts'.
    """

    first_experts: dict[str, int]
    offsets: dict[str, int]
    parts: dict[str, Part]
    factors: dict[str, Factor]


def spread(model: nn.Module, ranks: Ranks, dense: bool, device: torch.device) -> Spread:
    """Gives this rank its part of the model, in place; all ranks call this together.

    Before whatever holds on to parameters or buffers, which are new ones.

    Args:
        model: whole on rank 0, on its host or its device; of the others, only its outline matters.
        ranks: who shares it.
        dense: whether also what is no expert is cut.
        device: where the parts go.

    Raises:
        NotShardable: it cannot be spread so.
    """
    if not ranks.alone:
        require_one_layout(model, ranks)
        shard_experts(model, ranks, device)
        hand_out_rest(model, ranks, device)
    if dense:
        shard_dense(model, ranks)
    experts = sharded_parameters(model)
    # Of ranks that hold the same experts, the first writes them.
    writes = ranks.rank < ranks.expert_ranks
    parts = {n: Part(each.first, each.count, each.total, writes) for n, each in experts.items()}
    parts |= {
        name: Part(each.first, len(each.held), each.whole.shape[0])
        for name, each in dense_shards(model).items()
    }
    firsts = {name: each.first for name, each in experts.items()}
    return Spread(firsts, offsets(model), parts, expert_factors(model))


def gather(model: nn.Module, keep: bool) -> None:
    """Gives the whole model to the ranks that keep it, in their hosts' memory.

    All ranks call this together.
    """
    gather_dense(model, keep)
    gather_experts(model, keep)
