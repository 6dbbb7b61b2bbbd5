"""Embeddings: y = E[id]. A sample's gradient has one row for each distinct id that it holds.

Rows are summed by (sample, id) first, so the norm costs as much as the gradient itself; no token
pairs are compared. Covers tables of words, positions and token types alike, and tables that are
looked up once for all samples, such as those of relative position biases.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from dpmoe_trainer.dp.errors import AmbiguousBatch, UncoveredParameter
from dpmoe_trainer.dp.shared import Shared
from dpmoe_trainer.dp.tape import Kept, Tape
from dpmoe_trainer.dp.uses import Factors, Use, wide


class EmbeddingTable(Use):
    """E of shape [ids, D], looked up at [B, …] ids."""

    def __init__(self, name: str, ids: Tensor, rows: int, padding_idx: int | None) -> None:
        self.names = (name,)
        self._rows = rows
        self._input = Kept(ids)
        self._padding_idx = padding_idx

    def squared_norms(self) -> Tensor:
        """Σ over a sample's distinct ids of ‖Σ of that id's rows‖²; the padding id has none."""
        sample_U, _, sums_UD = self._sums
        norms = sums_UD.pow(2).sum(1)
        batch = self._input.value().shape[0]
        return norms.new_zeros(batch).index_add_(0, sample_U, norms)

    def clipped_sum(self, factors: Tensor) -> dict[str, Tensor]:
        """The (sample, id) rows, weighted and added into the table."""
        sample_U, id_U, sums_UD = self._sums
        rows = sums_UD * factors.to(sums_UD.dtype)[sample_U, None]
        table = rows.new_zeros(self._rows, rows.shape[1])
        return {self.names[0]: table.index_add_(0, id_U, rows)}

    def factors(self) -> Factors:
        """A one-hot row for each id, and the gradient there."""
        return Factors(*self._ids_and_gradient())

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient rows summed by (sample, id): the pairs' samples and ids, and their sums."""
        ids_BN, g_BND = self._ids_and_gradient()
        sample_B1 = torch.arange(len(ids_BN), device=ids_BN.device)[:, None]
        pair_U, index_N = torch.unique(sample_B1 * self._rows + ids_BN, return_inverse=True)
        sums_UD = g_BND.new_zeros(pair_U.numel(), g_BND.shape[2])
        sums_UD.index_add_(0, index_N.flatten(), g_BND.flatten(0, 1))
        sample_U = torch.div(pair_U, self._rows, rounding_mode="floor")
        return sample_U, pair_U % self._rows, sums_UD

    def _ids_and_gradient(self) -> tuple[Tensor, Tensor]:
        ids_BN = self._input.value().flatten(1)
        g_BND = wide(self.gradient).reshape(*ids_BN.shape, -1)
        if self._padding_idx is not None:
            # Chosen, not multiplied: a padding row that is not finite still has no gradient.
            g_BND = g_BND.masked_fill((ids_BN == self._padding_idx)[..., None], 0)
        return ids_BN, g_BND


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
    that the gradients arrive by sample. So do other ids that are not the batch's, such as the
    [T, T] of position pairs; their rows are followed until they meet the batch (`dp.shared`). A
    single id [1, 1] may be either, and is followed.

    Raises:
        UncoveredParameter: The table is renormalised in the forward pass, or scaled by how often an
            id is in the batch.
        AmbiguousBatch: The ids may be the batch's, or hold for every sample.
    """
    name, value = tape.claim(weight, "embedding")
    if max_norm is not None or scale_grad_by_freq:
        raise UncoveredParameter(
            f"embedding {name!r} sets max_norm or scale_grad_by_freq, which depend on the batch: "
            "unset them or freeze it"
        )
    assert name is not None, "rules run for trained parameters"
    assert value is not None, "a trained parameter has a value"
    if padding_idx is not None and padding_idx < 0:
        padding_idx += value.shape[0]
    if input.dim() == 2 and input.shape[0] == 1 and input.shape[1] > 1:
        input = input.expand(tape.batch, -1)

    def look_up(ids: Tensor) -> Tensor:
        output = F.embedding(ids, value, padding_idx)
        return tape.record(output, EmbeddingTable(name, ids, value.shape[0], padding_idx))

    if _is_batched(tape, input):
        return look_up(input)
    copies = input.expand(tape.batch, *input.shape)
    rows = F.embedding(input, value, padding_idx)
    return tape.share(Shared(name, rows, lambda: look_up(copies)))


def _is_batched(tape: Tape, ids: Tensor) -> bool:
    if ids.dim() != 2 or ids.shape[0] != tape.batch or ids.shape[1] not in tape.lengths:
        return False
    # [B, T] or, where B = T, perhaps the pairs of T positions. Repeated rows are no such pairs.
    may_be_pairs = tape.batch > 1 and ids.shape[0] == ids.shape[1] and ids.stride(0) != 0
    if may_be_pairs and not tape.holds(ids):
        raise AmbiguousBatch
    return True
