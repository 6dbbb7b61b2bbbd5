"""Experts over ranks: each holds a block of a layer's experts, and tokens travel to them.

A fused experts module keeps its class and its names; its parameters lose the experts that other
ranks hold, along their first dimension. What the module's shard is stands beside them, for the rule
that computes it (`dp.rules.experts`) and for whoever writes the whole model down.

The experts come from rank 0, parameter by parameter, so that no other rank ever holds them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpmoe_trainer.parallel.collectives import Group, first_of, gather_rows, rows_of_first
from dpmoe_trainer.parallel.ranks import Ranks

_ATTRIBUTE = "_dpmoe_shard"
_CPU = torch.device("cpu")


class NotShardable(Exception):
    """The model's experts cannot be spread over ranks; the message says which, and the remedy."""


@dataclass(frozen=True)
class Shard:
    """The experts of a layer that this rank holds.

    Attributes:
        first: the first one's number in its layer.
        count: how many there are here.
        total: how many the layer has.
        place: this rank's place among those that share them.
        group: these ranks.
    """

    first: int
    count: int
    total: int
    place: int
    group: Group


def shard_of(module: nn.Module) -> Shard | None:
    """A module's shard; None where it has all its experts."""
    shard: Shard | None = getattr(module, _ATTRIBUTE, None)
    return shard


def model_shard(model: nn.Module) -> Shard | None:
    """The shard of any of the model's layers: all have the same ranks. None if it is whole."""
    return next((shard for m in model.modules() if (shard := shard_of(m)) is not None), None)


def sharded_parameters(model: nn.Module) -> dict[str, Shard]:
    """The shards by the name of the parameters that they cut."""
    return {
        f"{name}.{parameter}": shard
        for name, module in model.named_modules()
        if (shard := shard_of(module)) is not None
        for parameter, _ in module.named_parameters(recurse=False)
    }


def shard_experts(model: nn.Module, ranks: Ranks, device: torch.device = _CPU) -> None:
    """Keeps of every layer the experts of this rank, in place; all ranks call this together.

    Args:
        model: whole on rank 0; of the others' experts, only the shapes matter.
        ranks: who shares them.
        device: where they go.

    Raises:
        NotShardable: a layer's experts are not fused, are wrapped, or are not divided evenly.
    """
    if ranks.expert_ranks == 1:
        return
    found = dict(_fused_experts(model))
    for name, module in found.items():
        total = int(module.num_experts)
        if total % ranks.expert_ranks:
            raise NotShardable(
                f"{name!r} has {total} experts, which {ranks.expert_ranks} ranks cannot share "
                "evenly: set expertParallel to a divisor"
            )
        count = total // ranks.expert_ranks
        shard = Shard(ranks.expert_rank * count, count, total, ranks.expert_rank, ranks.experts)
        for parameter, value in list(module.named_parameters(recurse=False)):
            _replace(module, parameter, _received(value, count, ranks, device))
        setattr(module, _ATTRIBUTE, shard)


def gather_experts(model: nn.Module, keep: bool) -> None:
    """Gives every layer all its experts again, on the ranks that keep them.

    All ranks call this together. They are gathered to the host, since no device need have room for
    them. Where `keep` is false, the shard stays as it is.
    """
    for module in [m for m in model.modules() if shard_of(m) is not None]:
        shard = shard_of(module)
        assert shard is not None, "chosen for having one"
        for parameter, value in list(module.named_parameters(recurse=False)):
            whole = gather_rows(value.detach(), shard.group)
            if keep:
                _replace(module, parameter, whole.cpu())
        if keep:
            delattr(module, _ATTRIBUTE)


def _received(value: Tensor, count: int, ranks: Ranks, device: torch.device) -> Tensor:
    """This rank's experts: the row of rank 0 gets them from there, and each passes its own on."""
    own = torch.empty(count, *value.shape[1:], dtype=value.dtype, device=device)
    if ranks.rank < ranks.expert_ranks:
        whole = value.detach().to(device) if ranks.first else None
        rows_of_first(own, whole, ranks.experts)
    if ranks.world > ranks.expert_ranks:
        first_of(own, ranks.replicas)
    return own


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    before: Any = getattr(module, name)
    setattr(module, name, nn.Parameter(value.detach(), requires_grad=before.requires_grad))


def _fused_experts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of experts, each of which must be fused and bare.

    Raises:
        NotShardable: one is not, or there is none.
    """
    none = True
    for name, block in model.named_modules():
        experts: Any = getattr(block, "experts", None)
        if not isinstance(experts, nn.Module):
            continue
        none = False
        place = f"{name}.experts" if name else "experts"
        # One attribute that transformers' decorator for fused experts sets, and nothing else has.
        if not hasattr(experts, "has_post_expert_norm"):
            raise NotShardable(
                f"{place!r} ({type(experts).__name__}) does not hold its experts in fused weights, "
                "so they cannot be spread over ranks: set expertParallel to 1"
            )
        for parameter, value in experts.named_parameters(recurse=False):
            if value.shape[0] != experts.num_experts:
                raise NotShardable(
                    f"parameter '{place}.{parameter}' is not held by expert: set expertParallel "
                    "to 1"
                )
        yield place, experts
    if none:
        raise NotShardable("the model has no experts to share: set expertParallel to 1")
