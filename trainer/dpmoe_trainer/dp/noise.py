"""Gaussian noise on the clipped gradient sum: N(0, (σC)²) on every trained parameter.

Every number of every trained parameter gets noise, also where no sample had a gradient: noise only
on the experts that tokens reached would tell which ones those were.

Each (parameter, expert, step) has a stream of its own (`dp.stream`), keyed with the run's secret.
So an expert's noise does not depend on where in a tensor or on which rank it lies, and sharding a
layer by expert changes nothing. A rank that holds a part of any other parameter draws that part of
the parameter's stream.

A caveat that all floating-point implementations share: the output is not exactly Gaussian, and the
low bits of a noised float can tell of its unnoised value (Mironov 2012, "On significance of the
least significant bits for differential privacy"). Noise is drawn on the 2⁻⁵³ grid and added in
float64 before it is rounded to the gradient's type, which is what one can do without a discrete
mechanism.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dpmoe_trainer.dp.keys import NoiseKey
from dpmoe_trainer.dp.stream import add_normal
from dpmoe_trainer.models.expert_adapters import Factor

__all__ = ["NoiseKey", "add_noise"]


@torch.no_grad()
def add_noise(
    gradients: dict[str, Tensor],
    noise_multiplier: float,
    clipping_norm: float,
    key: NoiseKey,
    step: int,
    first_experts: Mapping[str, int] | None = None,
    offsets: Mapping[str, int] | None = None,
    factors: Mapping[str, Factor] | None = None,
) -> dict[str, Tensor]:
    """Adds N(0, (σC)²) to every number of every gradient, in place.

    Once a step, on the sum over the whole logical batch: noise on the same step twice would be the
    same noise.

    Args:
        gradients: Clipped sums by parameter name, as `clipped_sum` gives for all trained
            parameters. Fused expert weights (of a module called `experts`) have the experts first.
        noise_multiplier: σ, the noise's standard deviation relative to C.
        clipping_norm: C, the sum's sensitivity to one sample.
        key: The run's secret.
        step: The step, from 0.
        first_experts: Of the gradients that hold but a part of a layer's experts, the first one's
            index in its layer.
        offsets: Of the gradients that hold but a part of a parameter's numbers, how many come
            before the first one.
        factors: Of the gradients of adapters on fused experts, how they hold the experts'.

    Returns:
        The gradients.

    Raises:
        ValueError: σ or C is not positive and finite.
    """
    scale = noise_multiplier * clipping_norm
    for name, value in (("noise_multiplier", noise_multiplier), ("clipping_norm", clipping_norm)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}: noise needs a positive, finite number")
    for name in offsets or {}:
        assert not _is_by_expert(name), "experts are not cut within an expert"
    for name, gradient in gradients.items():
        factor = (factors or {}).get(name)
        by_expert = gradient if factor is None else factor.by_expert(gradient)
        # A stream's order is that of a contiguous tensor, however this one lies in memory.
        noised = by_expert.contiguous()
        is_by_expert = factor is not None or _is_by_expert(name)
        first_expert = (first_experts or {}).get(name, 0)
        for part, *context in _parts(noised, first_expert if is_by_expert else None):
            first = (offsets or {}).get(name, 0)
            add_normal(part, key.derive("noise", name, step, *context), scale, first)
        if noised is not gradient:
            gradient.copy_(noised if factor is None else factor.as_kept(noised))
    return gradients


def _is_by_expert(name: str) -> bool:
    """Whether a parameter of this name has a stream for each of its experts."""
    return name.split(".")[-2:-1] == ["experts"]


def _parts(
    gradient: Tensor, first_expert: int | None
) -> Iterator[tuple[Tensor, int] | tuple[Tensor]]:
    """What has a stream of its own: each expert, or the whole where nothing is by expert."""
    if first_expert is None:
        yield (gradient,)
    else:
        yield from ((one, first_expert + index) for index, one in enumerate(gradient))
