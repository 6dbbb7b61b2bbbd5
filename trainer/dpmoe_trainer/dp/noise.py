"""Gaussian noise on the clipped gradient sum: N(0, (σC)²) on every trained parameter.

Every number of every trained parameter gets noise, also where no sample had a gradient: noise only
on the experts that tokens reached would tell which ones those were.

The noise of an expert depends on its own index, not on where in a tensor or on which rank it lies,
so sharding a layer by expert changes nothing.

A caveat that all floating-point implementations share: the output is not exactly Gaussian, and the
low bits of a noised float can tell of its unnoised value (Mironov 2012, "On significance of the
least significant bits for differential privacy"). Noise is drawn on the 2⁻⁵³ grid and added in
float64 before it is rounded to the gradient's type, which is what one can do without a discrete
mechanism.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dpmoe_trainer.dp.keys import NoiseKey

__all__ = ["NoiseKey", "add_noise", "standard_normal"]

_BLOCK = 1 << 20
"""Numbers drawn at once, which bounds the memory a large parameter takes."""


def add_noise(
    gradients: Mapping[str, Tensor],
    noise_multiplier: float,
    clipping_norm: float,
    key: NoiseKey,
    step: int,
    first_expert: int = 0,
) -> dict[str, Tensor]:
    """Adds N(0, (σC)²) to every number of every gradient.

    Once a step, on the sum over the whole logical batch: noise on the same step twice would be the
    same noise.

    Args:
        gradients: Clipped sums by parameter name, as `clipped_sum` gives for all trained
            parameters. Fused expert weights (of a module called `experts`) have the experts first.
        noise_multiplier: σ, the noise's standard deviation relative to C.
        clipping_norm: C, the sum's sensitivity to one sample.
        key: The run's secret.
        step: The step, from 0.
        first_expert: Under expert parallelism, the index in its layer of the first expert here.

    Raises:
        ValueError: σ or C is not positive and finite.
    """
    scale = noise_multiplier * clipping_norm
    for name, value in (("noise_multiplier", noise_multiplier), ("clipping_norm", clipping_norm)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}: noise needs a positive, finite number")
    return {
        name: _noised(name, gradient, scale, key, step, first_expert)
        for name, gradient in gradients.items()
    }


def _noised(
    name: str, gradient: Tensor, scale: float, key: NoiseKey, step: int, first_expert: int
) -> Tensor:
    if _is_fused_experts(name):
        noise = torch.stack(
            [
                standard_normal(one.numel(), key, name, step, first_expert + index)
                for index, one in enumerate(gradient)
            ]
        )
    else:
        noise = standard_normal(gradient.numel(), key, name, step)
    noise = noise.view(gradient.shape).to(gradient.device)
    return (gradient.double() + scale * noise).to(gradient.dtype)


def _is_fused_experts(name: str) -> bool:
    return name.split(".")[-2:-1] == ["experts"]


def standard_normal(count: int, key: NoiseKey, *context: str | int) -> Tensor:
    """Standard normal numbers by Box and Muller, the same for the same context.

    Returns:
        [count] float64.
    """
    blocks = [
        _box_muller(key, min(_BLOCK, count - start), *context, start)
        for start in range(0, count, _BLOCK)
    ]
    return torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.float64)


def _box_muller(key: NoiseKey, count: int, *context: str | int) -> Tensor:
    pairs = (count + 1) // 2
    uniform = torch.from_numpy(key.uniform(2 * pairs, "noise", *context))
    # Half a grid step up: the logarithm of zero is none of the normal's values.
    radius = (-2 * (uniform[:pairs] + 2.0**-54).log()).sqrt()
    angle = 2 * np.pi * uniform[pairs:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]
