"""A loader that draws each batch as a Poisson sample, with the run's secret key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from dpmoe_trainer.dp.keys import NoiseKey
from dpmoe_trainer.dp.private.draws import Draws
from dpmoe_trainer.dp.sampling import poisson_draw

Batch = dict[str, Tensor]


class PoissonLoader:
    """Batches of a data set, each sample in each with the same probability, on its own.

    As many batches an epoch as the loader that it stands for has, of that size on average, made by
    its collator. A batch may be empty: it then has every entry, with no rows.

    Attributes:
        dataset: The data set; one item is one privacy unit.
        sample_rate: q, one over the number of batches.
    """

    def __init__(self, loader: DataLoader[Any], key: NoiseKey, draws: Draws) -> None:
        if isinstance(loader.dataset, IterableDataset):
            raise ValueError("data_loader is of a stream, which cannot be sampled: give a data set")
        if loader.batch_size is None:
            raise ValueError("data_loader has no batch_size, which says the expected batch: set it")
        dataset: Any = loader.dataset
        self.dataset = dataset
        self.sample_rate = 1 / len(loader)
        self._draws = draws
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=_Draw(len(dataset), len(loader), self.sample_rate, key),
            collate_fn=_Collate(loader.collate_fn, dataset),
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            self._draws.draw(len(batch["labels"]))
            yield batch


class _Draw(Sampler[list[int]]):
    """The draws, one step after another; an epoch goes on where the last one ended."""

    def __init__(self, units: int, steps: int, sampling_rate: float, key: NoiseKey) -> None:
        self._units, self._steps = units, steps
        self._sampling_rate = sampling_rate
        self._key = key
        self._next = 0

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self._steps):
            step, self._next = self._next, self._next + 1
            yield poisson_draw(self._units, self._sampling_rate, self._key, step).tolist()


class _Collate:
    """The collator, which gets no empty list to see."""

    def __init__(self, collate: Callable[[list[Any]], Batch], dataset: Sequence[Any]) -> None:
        self._collate = collate
        self._dataset = dataset

    def __call__(self, samples: list[Any]) -> Batch:
        if samples:
            return dict(self._collate(samples))
        return {key: value[:0] for key, value in self._collate([self._dataset[0]]).items()}
