"""Matrix products: torch's own, or the compiled ones where these are the faster."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpmoe_trainer.dp import kernels


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """left·right of two matrices."""
    product = left.new_empty(left.shape[0], right.shape[1])
    multiply_into([product], [left], [right])
    return product


def multiply_into(
    products: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor]
) -> None:
    """Writes left·right of each pair of matrices into their product, whose rows are contiguous."""
    if kernels.multiplies(*products, *lefts, *rights):
        kernels.multiply(products, lefts, rights)
        return
    for product, left, right in zip(products, lefts, rights, strict=True):
        torch.mm(left, right, out=product)
