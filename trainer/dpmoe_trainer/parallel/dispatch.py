"""The way of tokens to the ranks that hold their experts, and back.

Rows leave sorted by (expert, sample), so what a rank must know of those that arrive is how many
there are of each (expert, sample) pair: the counts that expert parallelism exchanges anyway, only
finer. Where they arrive, they are sorted by (expert, sample of the company), so that a sample's
rows at an expert are one segment whichever rank computes the sample.

Shapes: S rows here, R that arrive, P ranks, E experts and B samples of a rank, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpmoe_trainer.dp.segments import Segments
from dpmoe_trainer.parallel.collectives import Group, exchange
from dpmoe_trainer.parallel.company import Company
from dpmoe_trainer.parallel.shards import Shard


@dataclass(frozen=True)
class Journey:
    """One layer's rows on their way.

    Attributes:
        sent: rows for each rank.
        received: rows from each rank.
        segments: the rows that arrived, by this rank's experts and the company's samples.
        group: the ranks.
    """

    sent: list[int]
    received: list[int]
    segments: Segments
    group: Group

    @classmethod
    def of(cls, segments: Segments, shard: Shard, company: Company) -> Journey:
        """Tells the other ranks what will come, and hears what will come from them.

        Args:
            segments: the rows here, by all experts and this rank's samples.
            shard: the layer's experts on this rank.
            company: the samples of all ranks.
        """
        ranks = len(company.counts)
        own_PEB = segments.counts.view(ranks, shard.count, segments.batch)
        sizes = [shard.count * samples for samples in company.counts]
        told = exchange(own_PEB.flatten(), [own_PEB[0].numel()] * ranks, sizes, shard.group)
        parts = told.split(sizes)
        numbers = torch.stack([own_PEB.sum((1, 2)), torch.stack([part.sum() for part in parts])])
        sent, received = numbers.tolist()
        pair_R = _pairs(company, shard.count, told.device).repeat_interleave(told)
        arrived = Segments.of(
            torch.div(pair_R, company.samples, rounding_mode="floor")[:, None],
            pair_R % company.samples,
            shard.count,
            company.samples,
            of_company=True,
        )
        return cls(sent, received, arrived, shard.group)

    def out(self, x_SD: Tensor) -> Tensor:
        """To the ranks that hold the experts; [R, D] in the order of `segments`."""
        arrived = exchange(x_SD, self.sent, self.received, self.group)
        return arrived.index_select(0, self.segments.slot)

    def back(self, y_RD: Tensor) -> Tensor:
        """To where the rows came from, in the order in which they left; [S, D]."""
        place_R = torch.empty_like(self.segments.slot)
        place_R[self.segments.slot] = torch.arange(len(place_R), device=place_R.device)
        return exchange(y_RD.index_select(0, place_R), self.received, self.sent, self.group)


def _pairs(company: Company, experts: int, device: torch.device) -> Tensor:
    """expert·samples + sample of every pair, in the order in which the ranks count them."""
    expert_E1 = torch.arange(experts, device=device)[:, None] * company.samples
    return torch.cat(
        [
            (expert_E1 + torch.arange(start, start + samples, device=device)).flatten()
            for start, samples in zip(company.starts, company.counts, strict=True)
        ]
    )
