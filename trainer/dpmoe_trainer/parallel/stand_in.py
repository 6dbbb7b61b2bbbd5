"""A row that stands in where a rank has nothing to compute.

Ranks that share experts go through the model together, also one whose part of the batch is empty.
It then computes a row that counts for nothing: its factor is zero, and so is its load. (So does one
with as many rows as a row has tokens, where ids of rows and of positions could not be told apart.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_ONES = ("attention_mask",)


def with_stand_in(batch: Mapping[str, Tensor], needed: bool) -> dict[str, Tensor]:
    """The batch, with one more row if that is needed: its first again, or one of zeros."""
    return {key: _longer(key, value) for key, value in batch.items()} if needed else dict(batch)


def needs_stand_in(batch: Mapping[str, Tensor]) -> bool:
    """Whether a rank needs one for this batch."""
    rows = next(iter(batch.values())).shape[0]
    return rows == 0 or any(value.dim() > 1 and value.shape[1] == rows for value in batch.values())


def _longer(key: str, value: Tensor) -> Tensor:
    if value.shape[0]:
        return torch.cat([value, value[:1]])
    return value.new_full((1, *value.shape[1:]), int(key in _ONES))
