"""Experts over ranks: each holds a block of a layer's experts, and tokens travel to them.

A fused experts module keeps its class and its names; its parameters lose the experts that other
ranks hold, along their first dimension, and so do adapters. Its shard stands beside them, for the
rule that computes it (`dp.rules.experts`) and for whoever writes the whole model.

The experts come from rank 0, parameter by parameter, so that no other rank ever holds them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpmoe_trainer.models.expert_adapters import Factor, factors_of, unwrapped, wrappers
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
    cut = {
        place.value: shard
        for _, experts in _blocks_of_experts(model)
        if (shard := shard_of(unwrapped(experts))) is not None
        for place in _places(experts)
    }
    return {name: cut[p] for name, p in model.named_parameters() if p in cut}


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
    for name, experts in list(_fused_experts(model)):
        module: Any = unwrapped(experts)
        total = int(module.num_experts)
        if total % ranks.expert_ranks:
            raise NotShardable(
                f"{name!r} has {total} experts, which {ranks.expert_ranks} ranks cannot share "
                "evenly: set expertParallel to a divisor"
            )
        count = total // ranks.expert_ranks
        shard = Shard(ranks.expert_rank * count, count, total, ranks.expert_rank, ranks.experts)
        for place in list(_places(experts)):
            place.put(_received(place.by_expert(), count, ranks, device))
        _tell_wrappers(experts, count)
        setattr(module, _ATTRIBUTE, shard)


def gather_experts(model: nn.Module, keep: bool) -> None:
    """Gives every layer all its experts again, on the ranks that keep them.

    All ranks call this together. They are gathered to the host, since no device need have room for
    them. Where `keep` is false, the shard stays as it is.
    """
    for _, experts in list(_blocks_of_experts(model)):
        module = unwrapped(experts)
        shard = shard_of(module)
        if shard is None:
            continue
        for place in list(_places(experts)):
            whole = gather_rows(place.by_expert(), shard.group)
            if keep:
                place.put(whole.cpu())
        if keep:
            _tell_wrappers(experts, shard.total)
            delattr(module, _ATTRIBUTE)


@dataclass(frozen=True)
class _Place:
    """Where a parameter is held that has a part for each expert.

    Attributes:
        module: the module that holds it.
        name: its name there.
        factor: how it holds the experts, if not along its first dimension.
    """

    module: nn.Module
    name: str
    factor: Factor | None = None

    @property
    def value(self) -> nn.Parameter:
        """The parameter."""
        parameter: nn.Parameter = getattr(self.module, self.name)
        return parameter

    def by_expert(self) -> Tensor:
        """[experts, …]."""
        value = self.value.detach()
        return value if self.factor is None else self.factor.by_expert(value)

    def put(self, by_expert: Tensor) -> None:
        """Holds other experts in place of those."""
        value = by_expert if self.factor is None else self.factor.as_kept(by_expert)
        trained = self.value.requires_grad
        setattr(self.module, self.name, nn.Parameter(value.contiguous(), requires_grad=trained))


def _places(experts: nn.Module) -> Iterator[_Place]:
    """All that an experts module and the adapters on it hold by expert."""
    for wrapper in wrappers(experts):
        yield from (_Place(layer, "weight", factor) for layer, factor in factors_of(wrapper))
    module = unwrapped(experts)
    yield from (_Place(module, name) for name, _ in module.named_parameters(recurse=False))


def _tell_wrappers(experts: nn.Module, count: int) -> None:
    for wrapper in wrappers(experts):
        wrapper.num_experts = count


def _received(value: Tensor, count: int, ranks: Ranks, device: torch.device) -> Tensor:
    """This rank's experts: the row of rank 0 gets them from there, and each passes its own on."""
    own = torch.empty(count, *value.shape[1:], dtype=value.dtype, device=device)
    if ranks.rank < ranks.expert_ranks:
        whole = value.to(device) if ranks.first else None
        rows_of_first(own, whole, ranks.experts)
    if ranks.world > ranks.expert_ranks:
        first_of(own, ranks.replicas)
    return own


def _blocks_of_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules called experts by their names, in their wrappers if they have adapters."""
    for name, block in model.named_modules():
        if isinstance(experts := getattr(block, "experts", None), nn.Module):
            yield f"{name}.experts" if name else "experts", experts


def _fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The same, each of which must be fused.

    Raises:
        NotShardable: one is not, or there is none.
    """
    none = True
    for place, wrapped in _blocks_of_experts(model):
        none = False
        experts: Any = unwrapped(wrapped)
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
        yield place, wrapped
    if none:
        raise NotShardable("the model has no experts to share: set expertParallel to 1")
