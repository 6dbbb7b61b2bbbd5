"""How a model comes to the ranks: rank 0 reads it, and hands out what the others are to hold.

A model may be larger than a device, and as many copies of it as a machine has devices larger than
the machine. So only rank 0 ever holds it whole, in the host's memory. The others build its outline,
which has shapes and no numbers, and each parameter goes from rank 0 to whoever holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpmoe_trainer.parallel.collectives import first_of
from dpmoe_trainer.parallel.ranks import Ranks
from dpmoe_trainer.parallel.shards import NotShardable, sharded_parameters


def outline(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model of this configuration without any numbers, in evaluation mode."""
    with torch.device("meta"):
        return kind(config).eval()


def require_one_layout(model: nn.Module, ranks: Ranks) -> None:
    """Checks that all ranks built the same model; all of them call this together.

    Raises:
        NotShardable: names, shapes or types differ; on all ranks.
    """
    own = [(name, tensor.shape, tensor.dtype) for _, name, tensor in _tensors(model)]
    if ranks.peers.any_of(ranks.peers.from_first(own) != own):
        raise NotShardable(
            f"the ranks build {type(model).__name__} differently from one configuration, so it "
            "cannot be handed out: set parallelism to one worker with at most one GPU, or use "
            "another model"
        )


def hand_out_rest(model: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Gives all ranks all of rank 0's tensors but the experts that are spread; in place.

    All ranks call this together, after `shard_experts`.

    Args:
        model: whole on rank 0 but for those; of the others' tensors, only the shapes matter.
        ranks: who is to have it.
        device: where it goes.
    """
    given: dict[Tensor, Tensor] = {}
    cut = sharded_parameters(model)
    for module, name, tensor in _tensors(model):
        if name in cut:
            continue
        if tensor not in given:  # it may be tied
            given[tensor] = _given(tensor, ranks, device)
        setattr(module, name.rpartition(".")[2], given[tensor])


def _given(tensor: Tensor, ranks: Ranks, device: torch.device) -> Tensor:
    value = tensor.detach()
    value = value.to(device).contiguous() if ranks.first else torch.empty_like(value, device=device)
    first_of(value)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value


def _tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """All parameters and buffers with their modules and names, tied ones wherever they are."""
    for prefix, module in model.named_modules():
        own = [
            *module.named_parameters(prefix, recurse=False, remove_duplicate=False),
            *module.named_buffers(prefix, recurse=False, remove_duplicate=False),
        ]
        yield from ((module, name, tensor) for name, tensor in own)
