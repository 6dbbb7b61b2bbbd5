"""Routed rows in (expert, sample) segments, and the norm of a gradient summed over a segment.

After routing, a sample's rows at one expert form its gradient G_be = Σ_s g_s·a_sᵀ there, and
‖∇ℓ_b‖² gains ‖G_be‖² for every expert e. Sorted by (expert, sample), each such set of rows is one
contiguous segment of n rows, and ‖G_be‖² = Σ_{s,s'} (a_s·a_s')(g_s·g_s') costs n²·(I+O) instead of
the n·I·O of forming it; half of that, as the pairs are symmetric. With T tokens, top-k of E
experts, n is about T·k/E: routing makes the ghost norm cheaper than that of the dense layer.

On a processor, a compiled kernel goes through the pairs of a segment in place; gradients of longer
segments are formed one by one. Elsewhere segments of about one length are gathered and multiplied
together.

Shapes: N tokens, K experts of each token, S = N·K rows, I inputs, O outputs, M segments of L rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dpmoe_trainer.dp import kernels
from dpmoe_trainer.dp.ghost import squared_norms_of_pairs
from dpmoe_trainer.dp.uses import wide

_CHUNK_ELEMENTS = 1 << 22
"""Gathered rows (or formed gradients) held at once: 16 MiB in float32, about a core's cache."""


@dataclass(frozen=True)
class Segments:
    """Rows sorted by (expert, sample); a segment is one such pair's rows, and none is empty.

    Attributes:
        slot: [S] For each sorted row its place in the token-major order (token·K + choice).
        token: [S] The token of each sorted row.
        expert: [M] Each segment's expert.
        sample: [M] Each segment's sample.
        start: [M] Each segment's first row.
        length: [M] Each segment's number of rows.
        rows_per_expert: [E] Rows of every expert, zero where no token went.
        batch: Samples in the batch.
        of_company: Whether these are the samples of all ranks that share the experts, and the
            experts those of this rank.
    """

    slot: Tensor
    token: Tensor
    expert: Tensor
    sample: Tensor
    start: Tensor
    length: Tensor
    rows_per_expert: list[int]
    batch: int
    of_company: bool = False

    @classmethod
    def of(
        cls,
        expert_NK: Tensor,
        sample_N: Tensor,
        experts: int,
        batch: int,
        of_company: bool = False,
    ) -> Segments:
        """Sorts the rows of a routing decision.

        Args:
            expert_NK: The experts of each token.
            sample_N: The sample of each token.
            experts: Experts in the layer.
            batch: Samples in the batch.
            of_company: Whether they are those of all ranks that share the experts.
        """
        choices = expert_NK.shape[1]
        pair_S = expert_NK.reshape(-1) * batch + sample_N.repeat_interleave(choices)
        sorted_S, slot = torch.sort(pair_S, stable=True)
        pair_M, length = torch.unique_consecutive(sorted_S, return_counts=True)
        expert = torch.div(pair_M, batch, rounding_mode="floor")
        per_expert = length.new_zeros(experts).index_add_(0, expert, length)
        return cls(
            slot=slot,
            token=torch.div(slot, choices, rounding_mode="floor"),
            expert=expert,
            sample=pair_M % batch,
            start=length.cumsum(0) - length,
            length=length,
            rows_per_expert=per_expert.tolist(),
            batch=batch,
            of_company=of_company,
        )

    @cached_property
    def counts(self) -> Tensor:
        """[E, B] How many rows an expert has of a sample."""
        counts_EB = self.length.new_zeros(len(self.rows_per_expert), self.batch)
        counts_EB[self.expert, self.sample] = self.length
        return counts_EB

    @cached_property
    def row_sample(self) -> Tensor:
        """[S] The sample of each sorted row."""
        return self.sample.repeat_interleave(self.length)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The segments grouped by length, rounded up to four lengths an octave."""
        octave = torch.floor(torch.log2(self.length.double())).long()
        step = 2 ** (octave - 2).clamp_min(0)
        rounded_M = torch.div(self.length + step - 1, step, rounding_mode="floor") * step
        return [Bucket.of(self, rounded_M == rows, rows) for rows in rounded_M.unique().tolist()]


@dataclass(frozen=True)
class Bucket:
    """Segments of about one length: their rows' indices, filled up with a row of their own.

    A stranger's row there could carry its infinities over, even multiplied with zero.

    Attributes:
        segment: [M'] Which segments.
        index: [M', L] Rows of each segment.
        real: [M', L] False where the index is filling.
    """

    segment: Tensor
    index: Tensor
    real: Tensor

    @classmethod
    def of(cls, segments: Segments, chosen: Tensor, rows: int) -> Bucket:
        """The chosen segments, as index blocks of `rows` rows."""
        start, length = segments.start[chosen, None], segments.length[chosen, None]
        position_1L = torch.arange(rows, device=start.device)[None]
        real = position_1L < length
        index = torch.where(real, start + position_1L, start)
        return cls(chosen.nonzero().squeeze(1), index, real)

    def chunks(self, elements_of_one: int) -> Iterator[Bucket]:
        """Splits the bucket so that a chunk needs about `_CHUNK_ELEMENTS` numbers of memory."""
        size = max(1, _CHUNK_ELEMENTS // elements_of_one)
        parts = zip(
            self.segment.split(size),
            self.index.split(size),
            self.real.split(size),
            strict=True,
        )
        return (Bucket(*part) for part in parts)


def squared_norms(
    a_SI: Tensor, g_SO: Tensor, segments: Segments, weights: bool, biases: bool
) -> Tensor:
    """Each sample's squared gradient norm at the experts' weights and biases.

    Σ_e ‖Σ_s g_s·a_sᵀ‖² for the weights, and Σ_e ‖Σ_s g_s‖² for the biases.

    Args:
        a_SI: The experts' inputs, in the segments' order.
        g_SO: The loss gradients of their outputs.
        segments: The order.
        weights: Whether the weights are trained.
        biases: Whether the biases are trained.

    Returns:
        [batch] float64, of products in at least float32.
    """
    norms = torch.zeros(segments.batch, dtype=torch.float64, device=g_SO.device)
    if not len(segments.length):
        return norms  # No token of any rank came to the experts here.
    g_SO = wide(g_SO)
    if weights:
        norms.index_add_(0, segments.sample, _weight_norms(wide(a_SI), g_SO, segments))
    if biases:
        sums_MO = torch.segment_reduce(g_SO, "sum", lengths=segments.length, axis=0)
        norms.index_add_(0, segments.sample, sums_MO.pow_(2).sum(1, dtype=torch.float64))
    return norms


def _weight_norms(a_SI: Tensor, g_SO: Tensor, segments: Segments) -> Tensor:
    """‖Σ_s g_s·a_sᵀ‖² of each segment, [M] float64."""
    if kernels.usable(a_SI, g_SO):
        return _compiled_norms(a_SI, g_SO, segments)
    return _gathered_norms(a_SI, g_SO, segments)


def _compiled_norms(a_SI: Tensor, g_SO: Tensor, segments: Segments) -> Tensor:
    inputs, outputs = a_SI.shape[1], g_SO.shape[1]
    norms_M = torch.empty(len(segments.length), dtype=torch.float64)
    long_M = segments.length * (inputs + outputs) > 2 * inputs * outputs
    short_M = ~long_M
    norms_M[short_M] = kernels.squared_norms(
        a_SI, g_SO, segments.start[short_M], segments.length[short_M]
    )
    if long_M.any():
        formed = torch.empty(outputs, inputs, dtype=g_SO.dtype)
        for segment in long_M.nonzero().squeeze(1).tolist():
            first = int(segments.start[segment])
            rows = slice(first, first + int(segments.length[segment]))
            torch.mm(g_SO[rows].T, a_SI[rows], out=formed)
            norms_M[segment] = formed.pow_(2).sum(dtype=torch.float64)
    return norms_M


def _gathered_norms(a_SI: Tensor, g_SO: Tensor, segments: Segments) -> Tensor:
    inputs, outputs = a_SI.shape[1], g_SO.shape[1]
    norms_M = torch.empty(len(segments.length), dtype=torch.float64, device=g_SO.device)
    for bucket in segments.buckets:
        rows = bucket.index.shape[1]
        ghost = rows * (inputs + outputs) < inputs * outputs
        product = _ghost_norms if ghost else _formed_norms
        for chunk in bucket.chunks(rows * (inputs + outputs) if ghost else inputs * outputs):
            real_M1L = chunk.real[:, None].to(g_SO.dtype)
            norms = product(a_SI[chunk.index], g_SO[chunk.index], real_M1L)
            norms_M[chunk.segment] = norms.double()
    return norms_M


def _ghost_norms(a_MLI: Tensor, g_MLO: Tensor, real_M1L: Tensor) -> Tensor:
    pairs_MLL = torch.bmm(a_MLI, a_MLI.transpose(1, 2))
    pairs_MLL *= torch.bmm(g_MLO, g_MLO.transpose(1, 2))
    pairs_MLL *= real_M1L
    pairs_MLL *= real_M1L.transpose(1, 2)
    return squared_norms_of_pairs(pairs_MLL)


def _formed_norms(a_MLI: Tensor, g_MLO: Tensor, real_M1L: Tensor) -> Tensor:
    return torch.bmm(g_MLO.transpose(1, 2) * real_M1L, a_MLI).pow_(2).sum((1, 2))
