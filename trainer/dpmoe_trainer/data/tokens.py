"""What the model sees of a row, token by token, computed when the row is drawn and not before."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from dpmoe_trainer.data.scratch import Content, Sizes

Ids = npt.NDArray[np.int32]

ENCODED_AT_ONCE = 1000
"""Texts that the tokenizer gets in one call."""

BYTES_A_TOKEN = 4
"""A rough guess, only good for telling short texts from long ones."""


class Tokens(Protocol):
    """Every row's token ids, on demand.

    Attributes:
        sizes: [rows] about how many tokens each row has. Known of all rows without tokenising any,
            and the same on all ranks, so logical batches are split by it.
    """

    @property
    def sizes(self) -> Sizes:
        """As above."""
        ...

    def of(self, rows: Sequence[int]) -> list[Ids]:
        """The ids of these rows; never empty."""
        ...


class KnownTokens:
    """Ids that are in memory already."""

    def __init__(self, ids: Sequence[Ids]) -> None:
        self._ids = ids
        self.sizes = np.array([len(row) for row in ids], dtype=np.int32)

    def of(self, rows: Sequence[int]) -> list[Ids]:
        """The ids of these rows."""
        return [self._ids[row] for row in rows]


class TableTokens:
    """Ids of tables' rows: of texts by the tokenizer, of token columns as they stand.

    Args:
        content: the tables.
        tokenizer: the model's.
        max_tokens: rows are cut to so many.
        padding: a row without any token becomes one of padding: attention needs something to look
            at.
    """

    def __init__(
        self,
        content: Content,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        padding: int,
    ) -> None:
        self._content = content
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._empty = np.array([padding], dtype=np.int32)
        guesses = [
            column.sizes // BYTES_A_TOKEN + 1 if column.is_text else column.sizes
            for column in content.columns
        ]
        self.sizes = np.minimum(np.concatenate(guesses), max_tokens).astype(np.int32)

    def of(self, rows: Sequence[int]) -> list[Ids]:
        """The ids of these rows, cut to `max_tokens`."""
        found: list[Ids] = [self._empty] * len(rows)
        for column, inside, places in self._content.by_column(rows):
            ids = self._encoded(column.texts(inside)) if column.is_text else column.ids(inside)
            for place, row in zip(places.tolist(), ids, strict=True):
                if len(row):
                    found[place] = row[: self._max_tokens]
        return found

    def _encoded(self, texts: Sequence[str]) -> list[Ids]:
        encoded: list[Ids] = []
        for start in range(0, len(texts), ENCODED_AT_ONCE):
            chunk = list(texts[start : start + ENCODED_AT_ONCE])
            ids = self._tokenizer(chunk, truncation=True, max_length=self._max_tokens)["input_ids"]
            encoded += [np.array(row, dtype=np.int32) for row in ids]
        return encoded
