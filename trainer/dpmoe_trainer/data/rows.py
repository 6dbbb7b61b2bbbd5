"""Rows of tokens, and the physical batches made of them.

A row is read and tokenised when it is drawn, and what that took is kept while there is room. A
batch is padded to its own longest row, never to the plan's longest: rows are short, and the bound
on their length is there for memory. Padding is masked, so it is no part of any gradient.

Where the lower layers of the model are frozen, what they make of a row never changes, so it is
computed once and kept in half precision. That halves a step's work and more, and is as private as
the row: it depends on nothing else and never leaves the process.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dpmoe_trainer.data.scratch import Sizes
from dpmoe_trainer.data.tokens import ENCODED_AT_ONCE, Ids, KnownTokens, Tokens
from dpmoe_trainer.dp.losses import IGNORED
from dpmoe_trainer.dp.sampling import Indices, physical_batches

Batch = dict[str, Tensor]
"""`attention_mask` [B, T]; `labels`, classes [B] or tokens [B, T]; and `input_ids` [B, T] or
`hidden_states` [B, T, D]."""

Lower = Callable[[Tensor, Tensor], Tensor]
"""A model's frozen lower part: input_ids and attention_mask [B, T] to hidden_states [B, T, D]."""

KEPT_ROW_BYTES = 200
"""What Python needs to keep a small array, beside its content."""

UNKNOWN = -1
"""The length of a row that was never tokenised."""


class Rows:
    """All rows of one or more tables, as batches of tensors.

    Args:
        tokens: each row's token ids, on demand or in memory; not empty.
        labels: each row's class; None where a row's own tokens are what is learnt.
        padding: the token id that fills shorter rows up.
        device: where batches are made.
        lower: the model's frozen lower part, if batches are to carry its outputs.
        cache_bytes: most memory for these, or else for tokens; rows beyond it are computed whenever
            drawn.
    """

    def __init__(
        self,
        tokens: Tokens | Sequence[Ids],
        labels: Sequence[int] | Indices | None,
        padding: int,
        device: torch.device,
        lower: Lower | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self._tokens = KnownTokens(tokens) if isinstance(tokens, Sequence) else tokens
        assert labels is None or len(self) == len(labels), "every row has a label"
        self._lengths = np.full(len(self), UNKNOWN, dtype=np.int32)
        self._labels = None if labels is None else torch.as_tensor(labels, dtype=torch.long)
        self._padding = padding
        self._device = device
        self._lower = lower
        self._hidden: dict[int, Tensor] = {}
        self._ids: dict[int, Ids] = {}
        self._free_bytes = cache_bytes

    def __len__(self) -> int:
        return len(self._tokens.sizes)

    @property
    def sizes(self) -> Sizes:
        """[rows] About how long each row is: what logical batches are split by, on all ranks alike.

        Known of all rows without reading any, so it is no exact count of tokens.
        """
        return self._tokens.sizes

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
        parts = physical_batches(np.array(rows, dtype=np.int64), size, self.sizes)
        for batch in self.batches(parts):
            assert batch is not None, "none of these parts is empty"
            yield batch

    def batches(self, parts: Iterable[Indices]) -> Iterator[Batch | None]:
        """One rank's physical batches, one for each part of a logical batch.

        Each has as many rows as its part, and all rows come once; but nearby parts exchange rows,
        so that those of a batch are alike in length, which is known once they are tokenised.

        Args:
            parts: one rank's parts of a `Group`, in its order.

        Returns:
            Batches in order; None for a part without rows.
        """
        for window in _windows(parts):
            rows = np.concatenate(window)
            ids = self._read(rows.tolist())
            rows = rows[np.argsort(self._lengths[rows], kind="stable")]
            ends = np.cumsum([len(part) for part in window])
            for batch in np.split(rows, ends[:-1]):
                yield self._batch(batch.tolist(), ids) if len(batch) else None

    def batch(self, rows: Sequence[int]) -> Batch:
        """One batch of the given rows, which must not be empty."""
        return self._batch(rows, self._read(rows))

    def _read(self, rows: Sequence[int]) -> dict[int, Ids]:
        """The ids of these rows, but of those whose outputs of the frozen layers do instead."""
        needed = [row for row in rows if self._labels is None or row not in self._hidden]
        ids = {row: self._ids[row] for row in needed if row in self._ids}
        fresh = list(dict.fromkeys(row for row in needed if row not in ids))
        for row, read in zip(fresh, self._tokens.of(fresh), strict=True):
            ids[row] = read
            self._lengths[row] = len(read)
            # Where frozen layers' outputs are kept, they have the room: they cost more to compute.
            if self._lower is None and self._take(read.nbytes + KEPT_ROW_BYTES):
                self._ids[row] = read
        return ids

    def _take(self, bytes_: int) -> bool:
        """Whether there is room to keep so much; it is taken if so."""
        if bytes_ > self._free_bytes:
            return False
        self._free_bytes -= bytes_
        return True

    def _batch(self, rows: Sequence[int], ids: Mapping[int, Ids]) -> Batch:
        mask = self._attention_mask(rows)
        batch = {"attention_mask": mask, "labels": self._labels_of(rows, ids, mask)}
        if self._lower is None:
            return batch | {"input_ids": self._input_ids(rows, ids)}
        return batch | {"hidden_states": self._hidden_states(rows, ids, self._lower)}

    def _labels_of(self, rows: Sequence[int], ids: Mapping[int, Ids], mask: Tensor) -> Tensor:
        if self._labels is None:
            return self._input_ids(rows, ids).masked_fill(mask == 0, IGNORED)
        return self._labels[list(rows)].to(self._device)

    def _attention_mask(self, rows: Sequence[int]) -> Tensor:
        lengths = torch.from_numpy(self._lengths[list(rows)])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return mask.long().to(self._device)

    def _input_ids(self, rows: Sequence[int], read: Mapping[int, Ids]) -> Tensor:
        ids = torch.full((len(rows), int(self._lengths[list(rows)].max())), self._padding)
        for position, row in enumerate(rows):
            ids[position, : self._lengths[row]] = torch.tensor(read[row])
        return ids.to(self._device)

    def _hidden_states(self, rows: Sequence[int], ids: Mapping[int, Ids], lower: Lower) -> Tensor:
        """The frozen layers' outputs [B, T, D]; padded with zeros, which the mask hides."""
        fresh = [row for row in rows if row not in self._hidden]
        computed = (
            dict(zip(fresh, self._run_lower(fresh, ids, lower), strict=True)) if fresh else {}
        )
        known = [computed[row] if row in computed else self._hidden[row] for row in rows]
        for row, hidden in computed.items():
            if self._take(hidden.nbytes):
                self._hidden[row] = hidden
        batch = torch.zeros(len(rows), int(self._lengths[list(rows)].max()), known[0].shape[1])
        for position, hidden in enumerate(known):
            batch[position, : len(hidden)] = hidden
        return batch.to(self._device)

    @torch.no_grad()
    def _run_lower(self, rows: Sequence[int], ids: Mapping[int, Ids], lower: Lower) -> list[Tensor]:
        """Each row's output [its length, D], in half precision unless that overflows."""
        outputs = lower(self._input_ids(rows, ids), self._attention_mask(rows)).cpu()
        kept = []
        for row, output in zip(rows, outputs, strict=True):
            exact = output[: self._lengths[row]].float()
            half = exact.half()
            kept.append(half if half.isfinite().all() else exact.clone())
        return kept


def _windows(parts: Iterable[Indices]) -> Iterator[list[Indices]]:
    """Parts that are tokenised together: as many as the tokenizer gets at once, or one."""
    window: list[Indices] = []
    rows = 0
    for part in parts:
        if window and rows + len(part) > ENCODED_AT_ONCE:
            yield window
            window, rows = [], 0
        window.append(part)
        rows += len(part)
    if window:
        yield window
