"""A model whose loss.backward() hands over the clipped sum of its batch's gradients.

In training mode, a call with a batch and its labels runs the engine: each sample's own loss, its
gradient, clipped and summed. All of it happens in the call; `loss.backward()` only hands the sum to
the optimiser. So there is nothing between the two that a loop could do to the gradient: a loss that
is scaled, or has something added to it that depends on the parameters, is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from dpmoe_trainer.dp.clipping import Clipping
from dpmoe_trainer.dp.engine import Measured, Options, measure
from dpmoe_trainer.dp.private.draws import ClippedSum, Draws, LoopError
from dpmoe_trainer.dp.uses import add_sums


@dataclass
class PrivateOutput(ModelOutput):
    """What a call in training mode returns.

    Attributes:
        loss: The mean of the samples' losses: private, not noised, not for logs.
    """

    loss: Tensor | None = None


class PrivateModule(nn.Module):
    """Wraps a transformers model; in evaluation mode it is that model.

    Args:
        model: The model.
        draws: Where sums are handed over.
        clipping_norm: Tells C, which a scheduler may change.
        clipping: How gradients are clipped.
        physical_batch: Most samples that are computed at once; None for no bound.
    """

    def __init__(
        self,
        model: nn.Module,
        draws: Draws,
        clipping_norm: Callable[[], float],
        clipping: Clipping,
        physical_batch: int | None,
    ) -> None:
        super().__init__()
        self._module = model
        self._draws = draws
        self._clipping_norm = clipping_norm
        self._clipping = clipping
        self._physical_batch = physical_batch

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_module"), name)

    def to_standard_module(self) -> nn.Module:
        """The model, as it was given and now is."""
        return self._module

    def forward(self, *args: Any, **batch: Any) -> Any:
        """The model's output; in training mode the loss alone.

        Raises:
            LoopError: In training mode the batch is not given by keywords.
            NotPerSample: As `clipped_sum` does.
        """
        if not self.training or not torch.is_grad_enabled():
            return self._module(*args, **batch)
        if args:
            raise LoopError("the batch is given by position: call the model as model(**batch)")
        clipping_norm = self._clipping_norm()
        measured = self._measure(batch, Options(clipping_norm, self._clipping))
        samples = len(measured.norms)
        finite = measured.losses[measured.losses.isfinite()]
        loss = finite.mean() if len(finite) else torch.zeros((), device=measured.losses.device)

        def hand_over() -> None:
            self._draws.hand_over(samples, ClippedSum(measured.sums, clipping_norm))

        anchor = torch.zeros((), requires_grad=True)
        return PrivateOutput(loss=_HandOver.apply(anchor, loss.float(), hand_over))

    def _measure(self, batch: dict[str, Tensor], options: Options) -> Measured:
        """The batch, in parts that fit."""
        samples = len(batch["labels"]) if "labels" in batch else 0
        size = self._physical_batch or max(samples, 1)
        parts = [
            measure(
                self._module, {key: v[start : start + size] for key, v in batch.items()}, options
            )
            for start in range(0, max(samples, 1), size)
        ]
        total = parts[0].sums
        for part in parts[1:]:
            add_sums(total, part.sums)
        return Measured(
            total,
            torch.cat([part.norms for part in parts]),
            torch.cat([part.losses for part in parts]),
        )


class _HandOver(torch.autograd.Function):
    """A loss whose backward pass is a call."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, hand_over: Callable[[], None]) -> Tensor:
        ctx.hand_over = hand_over
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        if float(gradient) != 1:
            raise LoopError(
                f"the loss was scaled by {float(gradient):g} before backward(): call "
                "loss.backward() on the loss as it is; a batch is split by "
                "max_physical_batch_size, and its divisor is the expected batch"
            )
        ctx.hand_over()
        return None, None, None
