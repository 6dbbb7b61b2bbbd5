"""Tokenised rows, and the physical batches made of them.

A batch is padded to its own longest row, never to the plan's longest: rows are short, and the
bound on their length is there for memory. Padding is masked, so it is no part of any gradient.

Where the lower layers of the model are frozen, what they make of a row never changes, so it is
computed once and kept in half precision. That halves a step's work and more, and is as private as
the row: it depends on nothing else and never leaves the process.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpmoe_trainer.dp.losses import IGNORED
from dpmoe_trainer.dp.sampling import Indices, physical_batches

Batch = dict[str, Tensor]
"""`attention_mask` [B, T]; `labels`, classes [B] or tokens [B, T]; and `input_ids` [B, T] or
`hidden_states` [B, T, D]."""

Lower = Callable[[Tensor, Tensor], Tensor]
"""A model's frozen lower part: input_ids and attention_mask [B, T] to hidden_states [B, T, D]."""

ENCODED_AT_ONCE = 1000
"""Texts that the tokenizer gets in one call."""


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int, padding: int
) -> list[np.ndarray]:
    """Each text's token ids, cut to `max_tokens`.

    A text without any token becomes one of padding: attention needs something to look at.
    """
    encoded: list[np.ndarray] = []
    for start in range(0, len(texts), ENCODED_AT_ONCE):
        chunk = list(texts[start : start + ENCODED_AT_ONCE])
        ids = tokenizer(chunk, truncation=True, max_length=max_tokens)["input_ids"]
        encoded += [np.array(row or [padding], dtype=np.int32) for row in ids]
    return encoded


class Rows:
    """All rows of one or more tables, as batches of tensors.

    Args:
        tokens: each row's token ids, not empty.
        labels: each row's class; None where a row's own tokens are what is learnt.
        padding: the token id that fills shorter rows up.
        device: where batches are made.
        lower: the model's frozen lower part, if batches are to carry its outputs.
        cache_bytes: most memory for these; rows beyond it are computed whenever drawn.
    """

    def __init__(
        self,
        tokens: Sequence[np.ndarray],
        labels: Sequence[int] | None,
        padding: int,
        device: torch.device,
        lower: Lower | None = None,
        cache_bytes: int = 0,
    ) -> None:
        assert labels is None or len(tokens) == len(labels), "every row has a label"
        self._tokens = tokens
        self._lengths = np.array([len(row) for row in tokens])
        self._labels = None if labels is None else torch.tensor(labels, dtype=torch.long)
        self._padding = padding
        self._device = device
        self._lower = lower
        self._hidden: dict[int, Tensor] = {}
        self._free_bytes = cache_bytes

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def sizes(self) -> np.ndarray:
        """How long each row is, [rows]: what logical batches are split by, the same on all ranks.

        Token counts here, but comparable only with one another.
        """
        return self._lengths

    def batches(self, parts: Iterable[Indices]) -> Iterator[Batch | None]:
        """A batch of each part's rows, in order; None for a part without any."""
        for part in parts:
            yield self.batch(part.tolist()) if len(part) else None

    def empty(self) -> Batch:
        """A batch of no rows, for a model that all ranks go through together."""
        none = torch.zeros(0, 2, dtype=torch.long, device=self._device)
        labels = none if self.learn_tokens else none[:, 0]
        return {"attention_mask": none, "labels": labels, "input_ids": none}

    @property
    def learn_tokens(self) -> bool:
        """Whether what is learnt is the rows' own tokens, not classes."""
        return self._labels is None

    def physical_batches(self, rows: Sequence[int], size: int) -> Iterator[Batch]:
        """Batches of at most `size` rows, alike in length so that little is padded."""
        for chosen in physical_batches(np.array(rows, dtype=np.int64), size, self._lengths):
            yield self.batch(chosen.tolist())

    def batch(self, rows: Sequence[int]) -> Batch:
        """One batch of the given rows, which must not be empty."""
        batch = {"attention_mask": self._attention_mask(rows), "labels": self._labels_of(rows)}
        if self._lower is None:
            return batch | {"input_ids": self._input_ids(rows)}
        return batch | {"hidden_states": self._hidden_states(rows, self._lower)}

    def _labels_of(self, rows: Sequence[int]) -> Tensor:
        if self._labels is None:
            return self._input_ids(rows).masked_fill(self._attention_mask(rows) == 0, IGNORED)
        return self._labels[list(rows)].to(self._device)

    def _attention_mask(self, rows: Sequence[int]) -> Tensor:
        lengths = torch.from_numpy(self._lengths[list(rows)])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return mask.long().to(self._device)

    def _input_ids(self, rows: Sequence[int]) -> Tensor:
        ids = torch.full((len(rows), int(self._lengths[list(rows)].max())), self._padding)
        for position, row in enumerate(rows):
            ids[position, : self._lengths[row]] = torch.from_numpy(self._tokens[row])
        return ids.to(self._device)

    def _hidden_states(self, rows: Sequence[int], lower: Lower) -> Tensor:
        """The frozen layers' outputs [B, T, D]; padded with zeros, which the mask hides."""
        fresh = [row for row in rows if row not in self._hidden]
        computed = dict(zip(fresh, self._run_lower(fresh, lower), strict=True)) if fresh else {}
        known = [computed[row] if row in computed else self._hidden[row] for row in rows]
        for row, hidden in computed.items():
            if hidden.nbytes <= self._free_bytes:
                self._hidden[row] = hidden
                self._free_bytes -= hidden.nbytes
        batch = torch.zeros(len(rows), int(self._lengths[list(rows)].max()), known[0].shape[1])
        for position, hidden in enumerate(known):
            batch[position, : len(hidden)] = hidden
        return batch.to(self._device)

    @torch.no_grad()
    def _run_lower(self, rows: Sequence[int], lower: Lower) -> list[Tensor]:
        """Each row's output [its length, D], in half precision unless that overflows."""
        outputs = lower(self._input_ids(rows), self._attention_mask(rows)).cpu()
        kept = []
        for row, output in zip(rows, outputs, strict=True):
            exact = output[: self._lengths[row]].float()
            half = exact.half()
            kept.append(half if half.isfinite().all() else exact.clone())
        return kept
