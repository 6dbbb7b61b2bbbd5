"""Embeddings: y = E[id]. A sample's gradient has one row for each distinct id that it holds.

Rows are summed by (sample, id) first, so the norm costs as much as the gradient itself; no token
pairs are compared. Covers tables of words, positions and token types alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpmoe_trainer.dp.errors import UncoveredParameter
from dpmoe_trainer.dp.tape import Kept, Tape, Use, wide


class EmbeddingTable(Use):
    """E of shape [ids, D]."""

    def __init__(
        self, tape: Tape, name: str, ids_BT: Tensor, rows: int, padding_idx: int | None
    ) -> None:
        self._name = name
        self._rows = rows
        self._input = Kept(ids_BT)
        self._sample = torch.arange(tape.batch, device=ids_BT.device).repeat_interleave(
            ids_BT.shape[1]
        )
        self._padding_idx = padding_idx
        self._batch = tape.batch

    def squared_norms(self, gradient: Tensor) -> Tensor:
        """Σ over a sample's distinct ids of ‖Σ of that id's rows‖²; the padding id has none."""
        ids_N = self._input.value().flatten()
        g_ND = wide(gradient.flatten(0, 1))
        pair, index_N = torch.unique(self._sample * self._rows + ids_N, return_inverse=True)
        self._sample_U = torch.div(pair, self._rows, rounding_mode="floor")
        self._id_U = pair % self._rows
        self._sums_UD = g_ND.new_zeros(pair.numel(), g_ND.shape[1]).index_add_(0, index_N, g_ND)
        if self._padding_idx is not None:
            self._sums_UD[self._id_U == self._padding_idx] = 0
        norms = self._sums_UD.pow(2).sum(1)
        return norms.new_zeros(self._batch).index_add_(0, self._sample_U, norms)

    def clipped_sum(self, factors: Tensor) -> dict[str, Tensor]:
        """The (sample, id) rows, weighted and added into the table."""
        rows = self._sums_UD * factors.to(self._sums_UD.dtype)[self._sample_U, None]
        table = rows.new_zeros(self._rows, rows.shape[1])
        return {self._name: table.index_add_(0, self._id_U, rows)}


def embedding(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Stands for `torch.nn.functional.embedding`.

    Ids of shape [1, T], as models give for positions, hold for every sample: they are repeated, so
    that the gradients arrive by sample.

    Raises:
        UncoveredParameter: The ids are not [B, T], or the table is renormalised in the forward
            pass or scaled by how often an id is in the batch.
    """
    name, value = tape.claim(weight, "embedding")
    if max_norm is not None or scale_grad_by_freq:
        raise UncoveredParameter(
            f"embedding {name!r} sets max_norm or scale_grad_by_freq, which depend on the batch: "
            "unset them or freeze it"
        )
    if input.dim() == 2 and input.shape[0] == 1:
        input = input.expand(tape.batch, -1)
    if input.dim() != 2 or input.shape[0] != tape.batch:
        raise UncoveredParameter(
            f"embedding {name!r} got ids that are not [B, T], so an id's sample is unknown: "
            "freeze it"
        )
    assert name is not None, "rules run for trained parameters"
    assert value is not None, "a trained parameter has a value"
    if padding_idx is not None and padding_idx < 0:
        padding_idx += value.shape[0]
    output = F.embedding(input, value, padding_idx)
    return tape.record(output, EmbeddingTable(tape, name, input, value.shape[0], padding_idx))
