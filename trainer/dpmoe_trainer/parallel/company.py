"""The samples that ranks with shared experts compute at the same time.

Each rank computes samples of its own; together they are the company's. They are numbered rank by
rank, so that a count of (expert, sample) pairs tells whose rows arrive, and no id travels with a
token.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dpmoe_trainer.parallel.collectives import Group, gather_numbers, sum_in_place, true_anywhere

_MOST = 16
"""More than the rows that stand in on one rank: so both numbers go in one, by one exchange."""


@dataclass(frozen=True)
class Company:
    """The samples of all ranks that share experts, in one forward pass.

    Attributes:
        counts: rows of each rank, in the order of ranks; each is a sample, or stands in for one.
        stand_ins: how many of a rank's rows stand in; they are its last.
        place: this rank's place among them.
        group: the ranks.
        lockstep: whether all ranks of the world go through the model together, not only these.
    """

    counts: tuple[int, ...]
    stand_ins: tuple[int, ...]
    place: int
    group: Group
    lockstep: bool = False

    @classmethod
    def of(
        cls,
        rows: int,
        stand_ins: int,
        place: int,
        group: Group,
        device: torch.device,
        lockstep: bool = False,
    ) -> Company:
        """Hears how many rows each rank has, those that stand in included."""
        assert stand_ins < _MOST, "a batch has few different lengths"
        numbers = gather_numbers(_MOST * rows + stand_ins, device, group)
        return cls(
            tuple(number // _MOST for number in numbers),
            tuple(number % _MOST for number in numbers),
            place,
            group,
            lockstep,
        )

    def anywhere(self, condition: Tensor) -> bool:
        """Whether a condition on the company's samples holds in any company that is in lockstep.

        What ranks do next may depend on this, and not on the condition alone.
        """
        return true_anywhere(condition) if self.lockstep else bool(condition)

    def real(self, device: torch.device) -> Tensor:
        """Which rows are samples, [samples]."""
        parts = zip(self.counts, self.stand_ins, strict=True)
        return torch.cat(
            [torch.arange(rows, device=device) < rows - stand_in for rows, stand_in in parts]
        )

    @property
    def samples(self) -> int:
        """Rows of all ranks."""
        return sum(self.counts)

    @property
    def starts(self) -> list[int]:
        """The number of each rank's first row."""
        return [0, *accumulate(self.counts[:-1])]

    @property
    def own(self) -> slice:
        """This rank's rows among all."""
        start = self.starts[self.place]
        return slice(start, start + self.counts[self.place])

    def gathered(self, own: Tensor, elsewhere: Tensor) -> Tensor:
        """Σ over ranks of what each knows of the company's samples.

        Args:
            own: [B, …], of this rank's samples alone.
            elsewhere: [samples, …], of all samples, what this rank computed for them.

        Returns:
            [samples, …], the same on every rank.
        """
        total = elsewhere.clone()
        total[self.own] += own
        sum_in_place(total, self.group)
        return total
