"""One column of private rows on the scratch disk, mapped into memory.

A table's text may be larger than a rank's memory, and a step needs a few rows of it. So the text is
copied once into an Arrow file on the pod's scratch volume, never onto the data's own, and mapped:
what a draw does not name is not read. The file has no name from the start, so nobody else can open
it, and it is gone with the last process that maps it, however that ends. Those are the ranks of one
pod: one of them writes it, and leads the others to it.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpmoe_trainer.errors import PeerLost

Sizes = npt.NDArray[np.int32]

TEXT = pa.large_string()
TOKENS = pa.large_list(pa.int32())

HASHED_AT_ONCE = 2**26
"""Bytes, between two signs of progress."""

_COLUMN = "content"


@dataclass(frozen=True)
class OpenFile:
    """The way to a file without a name, for other processes of this pod and user.

    It leads there while the process that made it lives and holds the file open, and nowhere else.

    Attributes:
        path: of the descriptor, in /proc.
        identity: the file's device and inode.
    """

    path: str
    identity: tuple[int, int]

    @classmethod
    def of(cls, file: IO[bytes]) -> OpenFile:
        """The way to a file that this process holds open."""
        descriptor = file.fileno()
        return cls(f"/proc/{os.getpid()}/fd/{descriptor}", _identity(file))

    def open(self) -> IO[bytes]:
        """The file, from its beginning, to be read.

        Raises:
            PeerLost: the process is gone, or not of this pod.
        """
        try:
            file = open(self.path, "rb")  # noqa: SIM115
        except (FileNotFoundError, ProcessLookupError):
            raise PeerLost("the rank that read the tables for this pod is gone") from None
        if _identity(file) != self.identity:
            file.close()
            raise PeerLost("the rank that read the tables for this pod is gone, or of another pod")
        return file


def _identity(file: IO[bytes]) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


class ScratchColumn:
    """Texts, or lists of token ids, by row.

    To pickle one is to tell another rank of the pod where its file is.

    Args:
        file: an Arrow file of one column; stays open, for the others.
        starts: the first row of each batch of the file.
        sizes: as below.

    Attributes:
        sizes: [rows] each text's bytes, or each list's ids.
        is_text: which of the two.
    """

    def __init__(self, file: IO[bytes], starts: Sequence[int], sizes: Sizes) -> None:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_RANDOM)
        arrow = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped)))
        self.sizes = sizes
        self.is_text = arrow.schema.field(_COLUMN).type == TEXT
        self._mapped = mapped
        self._file = file
        self._arrow = arrow
        self._starts = np.array(starts, dtype=np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        return _column_elsewhere, (OpenFile.of(self._file), self._starts, self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def digest(self, beat: Callable[[], None] = lambda: None) -> str:
        """SHA-256 of all rows; reads them all, and is as private as they are."""
        found = hashlib.sha256()
        content = memoryview(self._mapped)
        self._mapped.madvise(mmap.MADV_SEQUENTIAL)  # several times faster from a disk
        for start in range(0, len(content), HASHED_AT_ONCE):
            found.update(content[start : start + HASHED_AT_ONCE])
            beat()
        self._mapped.madvise(mmap.MADV_RANDOM)
        return found.hexdigest()

    def texts(self, rows: Sequence[int]) -> list[str]:
        """The texts of these rows."""
        return [value.as_py() for value in self._values(rows)]

    def ids(self, rows: Sequence[int]) -> list[npt.NDArray[np.int32]]:
        """The token ids of these rows."""
        return [value.values.to_numpy(zero_copy_only=False) for value in self._values(rows)]

    def _values(self, rows: Sequence[int]) -> list[pa.Scalar]:
        opened: dict[int, pa.Array] = {}
        values = []
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        for row, chunk in zip(rows, chunks.tolist(), strict=True):
            if chunk not in opened:
                opened[chunk] = self._arrow.get_batch(chunk).column(0)
            values.append(opened[chunk][row - int(self._starts[chunk])])
        return values


def _column_elsewhere(file: OpenFile, starts: Sequence[int], sizes: Sizes) -> ScratchColumn:
    return ScratchColumn(file.open(), starts, sizes)


class ScratchWriter:
    """Takes a column part by part, holding no more than a part in memory.

    Args:
        kind: `TEXT` or `TOKENS`, the type of every part.
    """

    def __init__(self, kind: pa.DataType) -> None:
        self._file = tempfile.TemporaryFile(prefix="dpmoe-rows-")  # noqa: SIM115
        schema = pa.schema([(_COLUMN, kind)])
        self._writer = pa.ipc.new_file(pa.PythonFile(self._file, mode="w"), schema)
        self._schema = schema
        self._starts = [0]
        self._sizes: list[Sizes] = []

    def write(self, part: pa.Array) -> None:
        """Appends rows, without any null.

        Raises:
            OSError: the scratch disk is full.
        """
        lengths = pc.binary_length(part) if part.type == TEXT else pc.list_value_length(part)
        self._sizes.append(np.minimum(lengths.to_numpy(), np.iinfo(np.int32).max).astype(np.int32))
        self._starts.append(self._starts[-1] + len(part))
        self._writer.write_batch(pa.record_batch([part], schema=self._schema))

    def finish(self) -> ScratchColumn:
        """The column, to be read; it must have rows.

        Raises:
            OSError: the scratch disk is full.
        """
        self._writer.close()
        self._file.flush()
        return ScratchColumn(self._file, self._starts[:-1], np.concatenate(self._sizes))


class Content:
    """The columns of several tables, one after the other."""

    def __init__(self, columns: Sequence[ScratchColumn]) -> None:
        self.columns = tuple(columns)
        self._starts = np.cumsum([0, *(len(column) for column in columns)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def by_column(
        self, rows: Sequence[int]
    ) -> list[tuple[ScratchColumn, list[int], npt.NDArray[np.int64]]]:
        """These rows column by column: the column, the rows in it, and their places in `rows`."""
        wanted = np.asarray(rows, dtype=np.int64)
        found = []
        for column, (start, end) in zip(self.columns, pairwise(self._starts), strict=True):
            places = np.flatnonzero((start <= wanted) & (wanted < end))
            if len(places):
                found.append((column, (wanted[places] - start).tolist(), places))
        return found
