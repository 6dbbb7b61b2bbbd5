"""Poisson sampling: each step, each privacy unit is in the batch with probability q, on its own.

This is the sampling that the accounting assumes. The number of units drawn is private, and may be
zero; a step then still adds its noise. A drawn (logical) batch is computed in physical batches of
bounded size, and clipped per sample, so how it is split changes nothing but rounding.

Ranks share a logical batch without a word between them: each makes the same draw from the same key,
splits it by the same rule, and takes its own part. Where layers are sharded, ranks go through the
model in lockstep, so all of them get the same number of physical batches, some perhaps empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpmoe_trainer.dp.keys import NoiseKey

Indices = npt.NDArray[np.int64]

Lengths = Sequence[int] | npt.NDArray[np.integer[Any]]


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


@dataclass(frozen=True)
class Group:
    """Units of a logical batch that go through the model together.

    Attributes:
        unit_rows: the number of rows of the one unit that this is, if it has several: what is
            clipped is then the mean of its rows' gradients, over all batches and ranks. 1 where
            every row is a unit.
        batches: [batches][ranks] the rows of each rank in each physical batch; never empty, though
            a rank's part may be.
    """

    unit_rows: int
    batches: list[list[Indices]]

    def of(self, rank: int) -> list[Indices]:
        """One rank's rows, batch by batch."""
        return [parts[rank] for parts in self.batches]


def lockstep_batches(
    units: Iterable[Sequence[int]],
    ranks: int,
    size: int,
    lengths: Lengths | None = None,
) -> list[Group]:
    """Splits a logical batch into physical ones, and each of these over the ranks.

    A unit of several rows is a group of its own, since nothing of it can be clipped before the
    gradients of all its rows are summed. Units of one row form one group, which comes last. In a
    group, the ranks' numbers of rows differ by one at most; and their sums of lengths, if these are
    given, by the greatest length at most.

    The result depends on the arguments alone, so ranks that agree on these agree on it.

    Args:
        units: the rows of each drawn unit.
        ranks: how many share the logical batch.
        size: most rows that one rank computes at once.
        lengths: the lengths of all rows, by index, as in `physical_batches`.

    Returns:
        Groups of batches; none if nothing was drawn.

    Raises:
        ValueError: `size` or `ranks` is not positive.
    """
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}: give at least 1")
    groups: list[Group] = []
    singles: list[int] = []

    def add(rows: Sequence[int], unit_rows: int) -> None:
        indices = np.array(rows, dtype=np.int64)
        # Every rank gets each so-many-th of rows in order of length: alike in number and in work.
        batches = [
            [together[rank::ranks] for rank in range(ranks)]
            for together in physical_batches(indices, size * ranks, lengths)
        ]
        if batches:
            groups.append(Group(unit_rows, batches))

    for unit in units:
        if len(unit) == 1:
            singles.append(unit[0])
        else:
            add(unit, len(unit))
    add(singles, 1)
    return groups


def physical_batches(drawn: Indices, size: int, lengths: Lengths | None = None) -> list[Indices]:
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
