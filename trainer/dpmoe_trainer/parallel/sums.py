"""The logical batch's sum, from what each rank summed over its samples."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from dpmoe_trainer.parallel.collectives import sum_in_place
from dpmoe_trainer.parallel.ranks import Ranks
from dpmoe_trainer.parallel.shards import Shard


def sum_over_ranks(
    sums: dict[str, Tensor],
    shards: Mapping[str, Shard],
    ranks: Ranks,
    dense: Collection[str] = (),
) -> dict[str, Tensor]:
    """Adds up the ranks' clipped sums, in place.

    A parameter that all hold is summed over all ranks. An expert's sum already has all samples of
    the ranks that share it, so it is summed over its replicas. One of which a rank holds some rows
    (`dense`) has all samples of all ranks.
    """
    if ranks.alone:
        return sums
    for name in sorted(sums.keys() - dense):
        total = sums[name] = sums[name].contiguous()
        if name not in shards:
            sum_in_place(total)
        elif ranks.world > ranks.expert_ranks:
            sum_in_place(total, ranks.replicas)
    return sums


def counted_once(
    sums: dict[str, Tensor],
    shards: Mapping[str, Shard],
    ranks: Ranks,
    dense: Collection[str] = (),
) -> dict[str, Tensor]:
    """Of sums that are over all ranks already, what this rank adds so that each counts once."""

    def own(name: str) -> bool:
        if name in dense:
            return True
        return ranks.rank < ranks.expert_ranks if name in shards else ranks.first

    return {name: total for name, total in sums.items() if own(name)}
