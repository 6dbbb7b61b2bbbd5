"""What is no expert, over all ranks: each holds some rows of every parameter (FSDP2).

`fully_shard` has each block of layers gather its parameters before it computes, forward and
backward, and let go of them afterwards. What a forward pass sees is one and the same parameter
every time, whose memory comes and goes; that is the one the engine watches. Gradients are the
engine's business: their clipped sums are spread over the ranks as soon as each is complete, so
that no rank ever holds those of the whole model.

Rows are cut along the first dimension into equal chunks, the last of which may be shorter or empty.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from dpmoe_trainer.parallel.collectives import GatherParameters, gather_rows, sum_and_scatter
from dpmoe_trainer.parallel.ranks import Ranks
from dpmoe_trainer.parallel.shards import NotShardable

_ATTRIBUTE = "_dpmoe_dense"


@dataclass(frozen=True)
class DenseShard:
    """A parameter of which this rank holds some rows.

    Attributes:
        whole: what a forward pass sees; it has its shape always, and memory while it is gathered.
        held: this rank's rows, in the memory from which they are gathered.
        first: the number of rows before them.
        ranks: how many ranks hold the others.
    """

    whole: nn.Parameter
    held: nn.Parameter
    first: int
    ranks: int

    @property
    def offset(self) -> int:
        """How many of the parameter's numbers come before those held here."""
        return self.first * prod(self.whole.shape[1:])

    @property
    def chunk(self) -> int:
        """Rows of every rank, before the last ones are cut."""
        return -(-self.whole.shape[0] // self.ranks)

    def summed(self, total: Tensor) -> Tensor:
        """Σ over all ranks of sums of the parameter's shape: the rows that this rank holds."""
        return sum_and_scatter(self._padded(total, self.chunk * self.ranks))[: len(self.held)]

    def gathered(self) -> Tensor:
        """All rows; all ranks call this together."""
        rows = gather_rows(self._padded(self.held.detach(), self.chunk))
        return rows[: self.whole.shape[0]].clone()

    @staticmethod
    def _padded(rows: Tensor, to: int) -> Tensor:
        missing = to - rows.shape[0]
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


@dataclass(frozen=True)
class _Dense:
    """A model's sharding.

    Attributes:
        shards: by parameter name, frozen ones included.
        kinds: the classes that the sharded modules had.
    """

    shards: dict[str, DenseShard]
    kinds: dict[nn.Module, type[nn.Module]]


def dense_shards(model: nn.Module) -> Mapping[str, DenseShard]:
    """What this rank holds of each sharded parameter, by name; empty if none is sharded."""
    dense: _Dense | None = getattr(model, _ATTRIBUTE, None)
    return {} if dense is None else dense.shards


def offsets(model: nn.Module) -> dict[str, int]:
    """How many numbers of each sharded parameter come before those of this rank, by name."""
    return {name: shard.offset for name, shard in dense_shards(model).items()}


def trained_wholes(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters as a forward pass sees them, by name."""
    shards = dense_shards(model)
    return {
        name: shards[name].whole if name in shards else parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def trained_here(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters as this rank holds and updates them, by name."""
    shards = dense_shards(model)
    return {
        name: shards[name].held if name in shards else parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def shard_dense(model: nn.Module, ranks: Ranks) -> None:
    """Keeps this rank's rows of all that is no expert, in place; all ranks call this together.

    After `shard_experts`, and before whatever holds on to parameters, such as an optimiser. From
    here on, ranks go through the model together.

    Raises:
        NotShardable: the model has no blocks, or a parameter cannot be cut.
    """
    if ranks.alone:
        return
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not blocks:
        raise NotShardable(
            f"{type(model).__name__} has no blocks of layers that could be gathered one by one: "
            "set shardDense to false"
        )
    experts = _of_experts(model)
    _check(model, blocks, experts)
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.world,))
    units = [*blocks, model]
    kinds = {unit: type(unit) for unit in units}
    for unit in units:
        sharded: Any = fully_shard(unit, mesh=mesh, ignored_params=experts)
        sharded.set_custom_all_gather(GatherParameters())
    shards = dict(_shards(model, experts, ranks))
    setattr(model, _ATTRIBUTE, _Dense(shards, kinds))


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Has a block's parameters at hand outside of a forward and a backward pass."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def let_go(model: nn.Module) -> None:
    """Frees what a forward pass without a backward pass gathered."""
    if isinstance(model, FSDPModule):
        model.reset_iter_state()


def gather_dense(model: nn.Module, keep: bool) -> None:
    """Gives the model all rows again, and the classes it had, on the ranks that keep them.

    All ranks call this together, with the same model at hand. Where `keep` is false, the model
    stays sharded.
    """
    dense: _Dense | None = getattr(model, _ATTRIBUTE, None)
    if dense is None:
        return
    for unit in dense.kinds:
        unit.reshard()  # type: ignore[operator]
    places = _places(model)
    for name, shard in dense.shards.items():
        rows = shard.gathered()
        if keep:
            # On the host: no device need have room for the whole model.
            whole = nn.Parameter(rows.cpu(), requires_grad=shard.held.requires_grad)
            for module, own in places[name]:
                setattr(module, own, whole)
    if keep:
        for module, kind in dense.kinds.items():
            _undo(module, kind)
        delattr(model, _ATTRIBUTE)


def _undo(module: Any, kind: type[nn.Module]) -> None:
    """Takes `fully_shard` back, for which it has no function: its hooks and its class."""
    state = fully_shard.state(module)  # type: ignore[attr-defined]
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    module.__class__ = kind


def _shards(
    model: nn.Module, experts: Collection[nn.Parameter], ranks: Ranks
) -> Iterator[tuple[str, DenseShard]]:
    """Looks at each unit while it is gathered, one after the other."""
    held: dict[str, Any] = {n: p for n, p in model.named_parameters() if p not in experts}
    for unit in [m for m in model.modules() if isinstance(m, FSDPModule)]:
        unit.unshard()
        for name, whole in model.named_parameters():
            if name in held and whole is not held[name]:
                rows = held[name].to_local().detach()
                chunk = -(-whole.shape[0] // ranks.world)
                first = min(ranks.rank * chunk, whole.shape[0])
                own = nn.Parameter(rows, requires_grad=whole.requires_grad)
                yield name, DenseShard(whole, own, first, ranks.world)
        unit.reshard()


def _of_experts(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of experts and of their adapters."""
    return {
        parameter
        for block in model.modules()
        if isinstance(experts := getattr(block, "experts", None), nn.Module)
        for parameter in experts.parameters()
    }


def _check(model: nn.Module, blocks: list[nn.Module], experts: Collection[nn.Parameter]) -> None:
    """Refuses by name what `fully_shard` cannot cut, or would fail at in the first step."""
    units: dict[nn.Parameter, set[int]] = {}
    for index, block in enumerate(blocks):
        for parameter in block.parameters():
            units.setdefault(parameter, set()).add(index)
    inside = {id(module) for block in blocks for module in block.modules()}
    for module in model.modules():
        if id(module) not in inside:
            for parameter in module.parameters(recurse=False):
                units.setdefault(parameter, set()).add(-1)
    for name, parameter in model.named_parameters():
        if parameter in experts:
            continue
        if parameter.dim() == 0:
            raise NotShardable(
                f"parameter {name!r} is a single number, which ranks cannot share: set shardDense "
                "to false"
            )
        if len(units[parameter]) > 1:
            raise NotShardable(
                f"parameter {name!r} is shared by several blocks of layers, which are gathered one "
                "by one: set shardDense to false"
            )


def _places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Where each parameter is registered, tied ones at several places."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(names[id(parameter)], []).append((module, own))
    return places
