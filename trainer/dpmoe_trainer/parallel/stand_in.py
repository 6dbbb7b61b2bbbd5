"""Rows that stand in where a rank has nothing to compute.

Ranks that share a model go through it together, also one whose part of the batch is empty. It then
computes a row that counts for nothing: its factor is zero, and so is its load. (So does one with as
many rows as a row has tokens, where ids of rows and of positions could not be told apart.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_ONES = ("attention_mask",)


def with_stand_ins(batch: Mapping[str, Tensor], needed: int) -> dict[str, Tensor]:
    """The batch, with so many more rows: its first again, or one of zeros."""
    return {key: _longer(key, value, needed) for key, value in batch.items()}


def stand_ins(batch: Mapping[str, Tensor]) -> int:
    """How many a rank needs for this batch."""
    rows = next(iter(batch.values())).shape[0]
    lengths = {0} | {value.shape[1] for value in batch.values() if value.dim() > 1}
    return next(more for more in range(len(lengths) + 1) if rows + more not in lengths)


def _longer(key: str, value: Tensor, needed: int) -> Tensor:
    if not needed:
        return value
    if value.shape[0]:
        return torch.cat([value, value[:1].expand(needed, *value.shape[1:])])
    return value.new_full((needed, *value.shape[1:]), int(key in _ONES))
