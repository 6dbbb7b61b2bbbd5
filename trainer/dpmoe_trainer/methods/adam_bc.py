"""Adam with its second moment corrected for the noise (DP-AdamBC).

Tang, Shpilevskiy and Lécuyer 2023, "DP-AdamBC: Your DP-Adam is actually DP-SGD (unless you apply
bias correction)", arXiv 2312.14334, algorithm 1. Noise of variance Φ = (σC/B)² on the mean gradient
adds Φ to Adam's second moment, for every number alike. Where Φ is most of it, the division by its
root no longer tells one number from another. Φ is public, so it is subtracted:

    Δ = m̂ / √max(v̂ − Φ, γ'),   m̂ = m/(1 − β₁ᵗ),   v̂ = v/(1 − β₂ᵗ)

All of it is post-processing of the noised gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

FLOOR = 0.1
"""γ' relative to Φ. v̂ is a mean over about 1/(1 − β₂) squares, so with β₂ = 0.98 it is off by about
a seventh of Φ: what is below a tenth is the estimate's error, and no curvature."""

_LEAST = 1e-16
"""γ' without noise: the square of Adam's own ε."""


class AdamBC(torch.optim.Optimizer):
    """DP-AdamBC, with decoupled weight decay as in AdamW.

    Args:
        parameters: What to train.
        lr: The learning rate.
        noise: √Φ, the standard deviation of the noise on the gradients that `step` gets; public.
        betas: β₁ and β₂.
        weight_decay: Share of a parameter taken away each step, times the learning rate.
        floor: γ'; by default a tenth of Φ.

    Raises:
        ValueError: The noise, the floor or a β has no meaning.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        noise: float,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
        floor: float | None = None,
    ) -> None:
        if not (noise >= 0 and math.isfinite(noise)):
            raise ValueError(f"noise is {noise}: give the noise's standard deviation, at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}: give numbers in [0, 1)")
        if floor is None:
            floor = max(FLOOR * noise**2, _LEAST)
        if not (floor > 0 and math.isfinite(floor)):
            raise ValueError(f"floor is {floor}: give a positive number")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(parameters, {**defaults, "noise": noise, "floor": floor})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient.

        Raises:
            ValueError: There is a closure: a gradient is released once a step.
        """
        if closure is not None:
            raise ValueError("closure is set: DP-AdamBC takes the gradient that is there")
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(group, parameters)

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["step"] = 0
                self.state[parameter]["first"] = torch.zeros_like(parameter)
                self.state[parameter]["second"] = torch.zeros_like(parameter)
            self.state[parameter]["step"] += 1
        gradients = [p.grad for p in parameters if p.grad is not None]
        firsts = [self.state[p]["first"] for p in parameters]
        seconds = [self.state[p]["second"] for p in parameters]
        steps = [self.state[p]["step"] for p in parameters]
        beta1, beta2 = group["betas"]

        torch._foreach_lerp_(firsts, gradients, 1 - beta1)
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, gradients, gradients, 1 - beta2)

        scales = torch._foreach_div(seconds, [1 - beta2**step for step in steps])
        torch._foreach_sub_(scales, group["noise"] ** 2)
        torch._foreach_clamp_min_(scales, group["floor"])
        torch._foreach_sqrt_(scales)

        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        sizes = [-group["lr"] / (1 - beta1**step) for step in steps]
        torch._foreach_addcdiv_(parameters, firsts, scales, sizes)
