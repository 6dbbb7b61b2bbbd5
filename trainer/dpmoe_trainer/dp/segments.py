"""Routed rows in (expert, sample) segments, and the norm of a gradient summed over a segment.

After routing, a sample's rows at one expert form its gradient G_be = Σ_s g_s·a_sᵀ there, and
‖∇ℓ_b‖² gains ‖G_be‖² for every expert e. Sorted by (expert, sample), each such set of rows is one
contiguous segment of n rows, and ‖G_be‖² = Σ_{s,s'} (a_s·a_s')(g_s·g_s') costs n²·(I+O) instead of
the n·I·O of forming it. With T tokens, top-k of E experts, n is about T·k/E: routing makes the
ghost norm cheaper than that of the dense layer.

Shapes: N tokens, K experts of each token, S = N·K rows, I inputs, O outputs, M segments of L rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dpmoe_trainer.dp.tape import wide

_CHUNK_ELEMENTS = 1 << 22
"""Gathered rows (or formed gradients) held at once: 16 MiB in float32, about a core's cache."""


@dataclass(frozen=True)
class Segments:
    """Rows sorted by (expert, sample); a segment is one such pair's rows, and none is empty.

    Attributes:
        slot_S: For each sorted row its place in the token-major order (token·K + choice).
        token_S: The token of each sorted row.
        expert_M: Each segment's expert.
        sample_M: Each segment's sample.
        start_M: Each segment's first row.
        length_M: Each segment's number of rows.
        rows_per_expert: Rows of every expert, in order; zero where no token went.
        batch: Samples in the batch.
    """

    slot_S: Tensor
    token_S: Tensor
    expert_M: Tensor
    sample_M: Tensor
    start_M: Tensor
    length_M: Tensor
    rows_per_expert: list[int]
    batch: int

    @classmethod
    def of(cls, expert_NK: Tensor, sample_N: Tensor, experts: int, batch: int) -> Segments:
        """Sorts the rows of a routing decision.

        Args:
            expert_NK: The experts of each token.
            sample_N: The sample of each token.
            experts: Experts in the layer.
            batch: Samples in the batch.
        """
        choices = expert_NK.shape[1]
        pair_S = expert_NK.reshape(-1) * batch + sample_N.repeat_interleave(choices)
        sorted_S, slot_S = torch.sort(pair_S, stable=True)
        pair_M, length_M = torch.unique_consecutive(sorted_S, return_counts=True)
        expert_M = torch.div(pair_M, batch, rounding_mode="floor")
        per_expert = length_M.new_zeros(experts).index_add_(0, expert_M, length_M)
        return cls(
            slot_S=slot_S,
            token_S=torch.div(slot_S, choices, rounding_mode="floor"),
            expert_M=expert_M,
            sample_M=pair_M % batch,
            start_M=length_M.cumsum(0) - length_M,
            length_M=length_M,
            rows_per_expert=per_expert.tolist(),
            batch=batch,
        )

    @cached_property
    def sample_S(self) -> Tensor:
        """The sample of each sorted row."""
        return self.sample_M.repeat_interleave(self.length_M)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The segments grouped by length, rounded up to four lengths an octave."""
        octave = torch.floor(torch.log2(self.length_M.double())).long()
        step = 2 ** (octave - 2).clamp_min(0)
        rounded_M = torch.div(self.length_M + step - 1, step, rounding_mode="floor") * step
        return [Bucket.of(self, rounded_M == rows, rows) for rows in rounded_M.unique().tolist()]


@dataclass(frozen=True)
class Bucket:
    """Segments of about one length: their rows' indices, filled up with a row of their own.

    A stranger's row there could carry its infinities over, even multiplied with zero.

    Attributes:
        index_ML: Rows of each segment.
        real_ML: False where the index is filling.
        sample_M: Each segment's sample.
    """

    index_ML: Tensor
    real_ML: Tensor
    sample_M: Tensor

    @classmethod
    def of(cls, segments: Segments, chosen: Tensor, rows: int) -> Bucket:
        """The chosen segments, as index blocks of `rows` rows."""
        start_M, length_M = segments.start_M[chosen, None], segments.length_M[chosen, None]
        position_1L = torch.arange(rows, device=start_M.device)[None]
        real_ML = position_1L < length_M
        return cls(
            index_ML=torch.where(real_ML, start_M + position_1L, start_M),
            real_ML=real_ML,
            sample_M=segments.sample_M[chosen],
        )

    def chunks(self, elements_of_one: int) -> Iterator[Bucket]:
        """Splits the bucket so that a chunk needs about `_CHUNK_ELEMENTS` numbers of memory."""
        size = max(1, _CHUNK_ELEMENTS // elements_of_one)
        parts = zip(
            self.index_ML.split(size),
            self.real_ML.split(size),
            self.sample_M.split(size),
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
        [batch], in at least float32.
    """
    inputs, outputs = a_SI.shape[1], g_SO.shape[1]
    norms = wide(a_SI.new_zeros(segments.batch))
    for bucket in segments.buckets:
        rows = bucket.index_ML.shape[1]
        ghost = rows * (inputs + outputs) < inputs * outputs
        for chunk in bucket.chunks(rows * (inputs + outputs) if ghost else inputs * outputs):
            g_MLO = wide(g_SO[chunk.index_ML])
            real_M1L = chunk.real_ML[:, None].to(g_MLO.dtype)
            if weights:
                a_MLI = wide(a_SI[chunk.index_ML])
                product = _ghost_norms if ghost else _direct_norms
                norms.index_add_(0, chunk.sample_M, product(a_MLI, g_MLO, real_M1L))
            if biases:
                sums_MO = torch.bmm(real_M1L, g_MLO).squeeze(1)
                norms.index_add_(0, chunk.sample_M, sums_MO.pow_(2).sum(1))
    return norms


def _ghost_norms(a_MLI: Tensor, g_MLO: Tensor, real_M1L: Tensor) -> Tensor:
    pairs_MLL = torch.bmm(a_MLI, a_MLI.transpose(1, 2))
    pairs_MLL *= torch.bmm(g_MLO, g_MLO.transpose(1, 2))
    return torch.bmm(torch.bmm(real_M1L, pairs_MLL), real_M1L.transpose(1, 2)).flatten()


def _direct_norms(a_MLI: Tensor, g_MLO: Tensor, real_M1L: Tensor) -> Tensor:
    return torch.bmm(g_MLO.transpose(1, 2) * real_M1L, a_MLI).pow_(2).sum((1, 2))
