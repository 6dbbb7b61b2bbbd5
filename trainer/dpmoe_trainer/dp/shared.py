"""Values that all samples of a batch share, such as attention sinks and relative position biases.

Such a value is made from a trained parameter alone, broadcast over the batch, and gets one gradient
for all samples. So the tape follows it through reshapes, and where it meets a batch, every
sample is given a copy of its own: the copies' gradients are the per-sample ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dpmoe_trainer.dp.errors import UncoveredParameter

VIEWS = {
    getattr(owner, name)
    for owner in (torch, torch.Tensor)
    for name in ("reshape", "permute", "transpose", "unsqueeze", "squeeze", "movedim")
} | {torch.Tensor.view, torch.Tensor.contiguous, torch.Tensor.to, torch.Tensor.float}
"""Functions that keep a shared value one: their first argument is the value."""

BROADCASTS = {torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.expand}
"""Functions that broadcast over their first dimension, and so bring a shared value to a batch."""


class Shared:
    """A value that holds for every sample, and how to make the samples' copies.

    Attributes:
        name: The trained parameter that it was made from.
        value: The value.
    """

    def __init__(self, name: str, value: Tensor, copies: Callable[[], Tensor]) -> None:
        self.name = name
        self.value = value
        self._copies = copies

    @cached_property
    def per_sample(self) -> Tensor:
        """[B, …] A copy for each sample, made once."""
        return self._copies()

    def viewed(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Shared:
        """The same function of the value and of each sample's copy."""

        def apply(value: Tensor) -> Tensor:
            return function(value, *args, **kwargs)

        return Shared(self.name, apply(self.value), lambda: torch.vmap(apply)(self.per_sample))

    def batched(self) -> Tensor:
        """The copies in place of a leading dimension of one, over which the value is broadcast.

        Raises:
            UncoveredParameter: The value has no such dimension.
        """
        if self.value.dim() == 0 or self.value.shape[0] != 1:
            raise UncoveredParameter(
                f"a value made from trained parameter {self.name!r} meets the batch without a "
                "dimension for it, so its per-sample gradient is unknown: freeze it"
            )
        return self.per_sample.flatten(0, 1)
