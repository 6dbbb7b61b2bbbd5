"""What ranks say to each other, and how a rank learns that another one is gone.

Every rank makes the same calls in the same order. A call that fails means that a rank died, hangs
or left the order; no step can be finished without it, so all that is left is to end the process and
to start all ranks again (`PeerLost`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpmoe_trainer.errors import PeerLost

Group = dist.ProcessGroup | None
"""Ranks that talk to each other; None is all of them."""


@contextmanager
def listening(what: str) -> Iterator[None]:
    """Turns any failure of a collective into `PeerLost`.

    The backends raise plain RuntimeErrors, whose texts hold addresses and differ by version.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise PeerLost(
            f"{what}: another rank is gone or silent ({type(error).__name__})"
        ) from error


def sum_in_place(tensor: Tensor, group: Group = None) -> None:
    """Σ over the group's ranks; the same bits on all of them."""
    with listening("a sum over the ranks"):
        dist.all_reduce(tensor, group=group)


def gather_numbers(number: int, device: torch.device, group: Group = None) -> list[int]:
    """One whole number of each rank, in the order of ranks."""
    own = torch.tensor([number], device=device)
    found = own.new_empty(dist.get_world_size(group))
    with listening("an exchange of sizes"):
        dist.all_gather_single(found, own, group=group)
    return [int(each) for each in found.tolist()]


def gather_rows(rows: Tensor, group: Group = None) -> Tensor:
    """The ranks' equal blocks of rows, one after the other."""
    found = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    with listening("a gathering of shards"):
        dist.all_gather_single(found, rows.contiguous(), group=group)
    return found


def first_of(tensor: Tensor, group: Group = None) -> None:
    """The tensor of the group's first rank, in place of the others'."""
    with listening("a parameter from the first rank"):
        dist.broadcast(tensor, group=group, group_src=0)


def rows_of_first(own: Tensor, whole: Tensor | None, group: Group) -> None:
    """Fills `own` with this rank's block of the rows of the group's first rank.

    Args:
        own: [rows, …], the same shape on all ranks.
        whole: [ranks · rows, …] on the first rank; elsewhere None.
        group: the ranks.
    """
    blocks = None if whole is None else list(whole.contiguous().split(len(own)))
    with listening("experts from the first rank"):
        dist.scatter(own, blocks, group=group, group_src=0)


class GatherParameters:
    """What FSDP2 gathers parameters with, as `FSDPModule.set_custom_all_gather` takes it."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Group = None,
        async_op: bool = False,
    ) -> dist.Work | None:
        """The ranks' equal blocks, one after the other, into the output."""
        with listening("a gathering of parameters"):
            return dist.all_gather_single(
                output_tensor, input_tensor, group=group, async_op=async_op
            )


def sum_and_scatter(rows: Tensor) -> Tensor:
    """Of Σ over all ranks, this rank's block of rows; all blocks are equal."""
    own = rows.new_empty(rows.shape[0] // dist.get_world_size(), *rows.shape[1:])
    with listening("a sum over the ranks"):
        dist.reduce_scatter_single(own, rows.contiguous())
    return own


def true_anywhere(condition: Tensor) -> bool:
    """Whether a condition, a tensor of one element, holds on any rank."""
    count = condition.to(torch.int32)
    sum_in_place(count)
    return bool(count)


def tell(content: Any) -> Any:
    """What rank 0 has to say, on every rank; the others' own is ignored."""
    box = [content]
    with listening("word from rank 0"):
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def tell_all(content: Any) -> list[Any]:
    """What each rank has to say, in the order of ranks, on every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    with listening("word from all ranks"):
        dist.all_gather_object(found, content)
    return found


def exchange(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """Rows to and from each rank of the group; differentiable, the gradients go the way back.

    Args:
        rows: [Σ sent, …], those for the first rank first.
        sent: Rows for each rank.
        received: Rows from each rank.
        group: The ranks.

    Returns:
        [Σ received, …], those of the first rank first.
    """
    moved: Tensor = _Exchange.apply(rows, list(sent), list(received), group)
    return moved


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Group
    ) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        return _move(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.sizes
        return _move(gradient, received, sent, ctx.group), None, None, None


def _move(rows: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    found = rows.new_empty(sum(received), *rows.shape[1:])
    with listening("an exchange of tokens"):
        dist.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
    return found
