"""Poisson sampling: each step, each privacy unit is in the batch with probability q, on its own.

This is the sampling that the accounting assumes. The number of units drawn is private, and may be
zero; a step then still adds its noise. A drawn (logical) batch is computed in physical batches of
bounded size, and clipped per sample, so how it is split changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dpmoe_trainer.dp.keys import NoiseKey

Indices = npt.NDArray[np.int64]


def poisson_draw(units: int, sampling_rate: float, key: NoiseKey, step: int) -> Indices:
    """Draws the privacy units of one step.

    Args:
        units: How many there are.
        sampling_rate: q; the probability is exact to 2⁻⁵³.
        key: The run's secret.
        step: The step, from 0.

    Returns:
        The drawn units' indices, ascending; private.

    Raises:
        ValueError: q is not in (0, 1], or there are no units.
    """
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"sampling_rate is {sampling_rate}: give a probability in (0, 1]")
    if units < 1:
        raise ValueError(f"units is {units}: sampling needs at least one privacy unit")
    return np.flatnonzero(key.uniform(units, "poisson draw", step) < sampling_rate).astype(np.int64)


def physical_batches(
    drawn: Indices, size: int, lengths: Sequence[int] | Indices | None = None
) -> list[Indices]:
    """Splits a logical batch into physical ones.

    Args:
        drawn: Indices of the logical batch.
        size: Most samples in a physical batch.
        lengths: The token counts of all samples, by index. If given, samples of like length come
            together, which saves padding.

    Returns:
        Batches of indices; none if nothing was drawn.

    Raises:
        ValueError: `size` is not positive.
    """
    if size < 1:
        raise ValueError(f"the physical batch size is {size}: give at least 1")
    if lengths is not None:
        drawn = drawn[np.argsort(np.asarray(lengths)[drawn], kind="stable")]
    return [drawn[start : start + size] for start in range(0, len(drawn), size)]
