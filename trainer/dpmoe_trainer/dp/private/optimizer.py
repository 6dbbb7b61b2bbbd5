"""Opacus' optimiser on sums that the engine clipped, with the engine's noise.

`DPOptimizerFastGradientClipping` is the one of Opacus' optimisers that takes clipped sums. It keeps
its part (the wrapped optimiser, the divisor, the accountant's hook); what is replaced is where the
sums come from and how they are noised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from opacus.optimizers import DPOptimizerFastGradientClipping
from torch import nn

from dpmoe_trainer.dp.keys import NoiseKey
from dpmoe_trainer.dp.noise import add_noise
from dpmoe_trainer.dp.private.draws import Draws, LoopError


class PrivateOptimizer(DPOptimizerFastGradientClipping):
    """An optimiser whose step takes the clipped sum, noises it, and divides it.

    Args:
        optimizer: What makes an update of the noised mean gradient.
        trained: Its parameters, by name in the model.
        draws: Where the sums come from.
        key: Keys the noise.
        noise_multiplier: σ.
        max_grad_norm: C.
        expected_batch_size: The public divisor.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        trained: Mapping[str, nn.Parameter],
        draws: Draws,
        key: NoiseKey,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
        )
        self._trained = dict(trained)
        self._draws = draws
        self._key = key
        self._steps = 0

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Not used here.

        Raises:
            LoopError: Always, as `BatchMemoryManager` splits batches by it.
        """
        raise LoopError(
            "steps are not skipped (BatchMemoryManager): pass max_physical_batch_size to "
            "make_private, which splits batches itself"
        )

    def accumulate(self) -> None:
        """Takes the sum of the batch under way.

        Raises:
            LoopError: There is none, or a gradient came to a parameter in another way.
        """
        for name, parameter in self._trained.items():
            if parameter.grad is not None:
                raise LoopError(
                    f"a gradient reached {name!r} that was not clipped: the loss must be the "
                    "wrapped model's, as it is"
                )
        self._released = self._draws.release()

    def add_noise(self) -> None:
        """Noise on every number of every trained parameter."""
        released = self._released
        del self._released
        noised = add_noise(
            released.sums, self.noise_multiplier, released.clipping_norm, self._key, self._steps
        )
        self._steps += 1
        for name, parameter in self._trained.items():
            parameter.grad = noised[name].to(parameter.dtype)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; the noised gradients do not stay."""
        result = super().step(closure)
        self.zero_grad()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops gradients; a batch that was handed over stays until the next is drawn."""
        super().zero_grad(set_to_none=True)
