"""How a sample's gradient norm becomes the factor that its gradient is scaled with.

Three ways, of one and the same sensitivity: whatever a sample's gradient is, its contribution has
an L2 norm of at most C.

- `Flat` (Abadi et al. 2016): min(1, C/‖g‖). The default.
- `PerGroup` (He et al. 2023, "Exploring the limits of differentially private deep learning with
  group-wise clipping", arXiv 2212.01539): each group of parameters has a norm and a threshold C_g
  of its own; the squares of the thresholds sum to C².
- `Automatic` (Bu et al. 2023, "Automatic clipping", arXiv 2206.07136): C/(‖g‖ + γ), so that every
  sample weighs nearly alike and C is no longer to be tuned against the learning rate.

Shapes: B samples, G groups of parameters.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from dpmoe_trainer.dp.errors import NotPerSample
from dpmoe_trainer.parallel.collectives import sum_in_place
from dpmoe_trainer.parallel.shards import Shard

GAMMA = 0.01
"""γ of automatic clipping, as Bu et al. recommend for all their tasks."""

_BLOCK = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class Groups:
    """Trained parameters in groups, each with a norm of its own.

    Attributes:
        of: The group of each parameter, by name.
        shares: Each group's share of C²; they sum to one.
    """

    of: Mapping[str, int]
    shares: tuple[float, ...]

    def thresholds(self, clipping_norm: float) -> list[float]:
        """C_g of each group, with Σ C_g² = C²."""
        return [clipping_norm * math.sqrt(share) for share in self.shares]


class Clipping(ABC):
    """A way of clipping. Immutable; its contributions never exceed the clipping norm."""

    def groups(self, names: Iterable[str]) -> Groups:
        """The groups of the trained parameters: one of all, unless a way has several.

        Raises:
            NotPerSample: A parameter is in no group.
        """
        return Groups(dict.fromkeys(names, 0), (1.0,))

    @abstractmethod
    def scale(self, norms: Tensor, threshold: float) -> Tensor:
        """The factors of one group's gradients, [B], from their norms, [B], and threshold."""


@dataclass(frozen=True)
class Flat(Clipping):
    """min(1, C/‖g‖) for the whole gradient."""

    def scale(self, norms: Tensor, threshold: float) -> Tensor:
        """One where the norm is zero."""
        return (threshold / norms).clamp_max(1)


@dataclass(frozen=True)
class Automatic(Clipping):
    """C/(‖g‖ + γ) for the whole gradient.

    Attributes:
        gamma: γ; a gradient much smaller than it stays small.
    """

    gamma: float = GAMMA

    def __post_init__(self) -> None:
        if not (self.gamma > 0 and math.isfinite(self.gamma)):
            raise ValueError(f"gamma is {self.gamma}: give a positive number")

    def scale(self, norms: Tensor, threshold: float) -> Tensor:
        """Below C/‖g‖, and at most C/γ."""
        if not math.isfinite(threshold):
            raise ValueError(f"clipping_norm is {threshold}: automatic clipping needs a finite one")
        return threshold / (norms + self.gamma)


@dataclass(frozen=True)
class Group:
    """Parameters that are clipped together.

    Attributes:
        parameters: fnmatch patterns over parameter names.
        weight: What share of C² the group's threshold has, relative to the other groups.
    """

    parameters: tuple[str, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.parameters:
            raise ValueError("a clipping group has no parameters: give patterns of their names")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(
                f"the weight of a clipping group is {self.weight}: give a positive one"
            )


@dataclass(frozen=True)
class PerGroup(Clipping):
    """min(1, C_g/‖g_g‖) for each group of parameters.

    Attributes:
        by: The groups; a parameter belongs to the first that matches it. If there are none, each
            block of layers (such as `model.layers.3`) is a group and all else is one more, all
            with equal thresholds.
    """

    by: tuple[Group, ...] = ()

    def groups(self, names: Iterable[str]) -> Groups:
        """As the patterns say, or block by block; a group without trained parameters has no share.

        Raises:
            NotPerSample: No pattern matches a parameter. Names it.
        """
        keys = {name: self._place(name) for name in names}
        found = list(dict.fromkeys(keys.values()))
        weights = [self.by[key].weight if isinstance(key, int) else 1.0 for key in found]
        return Groups(
            {name: found.index(key) for name, key in keys.items()},
            tuple(weight / sum(weights) for weight in weights),
        )

    def _place(self, name: str) -> int | str:
        if not self.by:
            block = _BLOCK.match(name)
            return block.group(1) if block else ""
        for index, group in enumerate(self.by):
            if any(fnmatchcase(name, pattern) for pattern in group.parameters):
                return index
        raise NotPerSample(
            f"trained parameter {name!r} is in no clipping group: add a group that matches it, or "
            "freeze it"
        )

    def scale(self, norms: Tensor, threshold: float) -> Tensor:
        """As flat clipping, of the group."""
        return (threshold / norms).clamp_max(1)


FLAT = Flat()


def clip_factors(
    norms_BG: Tensor, clipping_norm: float, clipping: Clipping, groups: Groups
) -> Tensor:
    """Each sample's factor for each group of parameters, [B, G]."""
    columns = zip(norms_BG.unbind(1), groups.thresholds(clipping_norm), strict=True)
    return torch.stack([clipping.scale(norms, threshold) for norms, threshold in columns], 1)


def squared_norms(
    gradient: Mapping[str, Tensor],
    groups: Groups,
    shards: Mapping[str, Shard] | None = None,
    dense: Collection[str] = (),
) -> Tensor:
    """The squared norm of each group of one gradient, [1, G]; arguments as of `clip_gradient`.

    In double precision: float32 loses the small among many squares, and would clip too little.
    """
    squares = torch.zeros(1, len(groups.shares), dtype=torch.float64)
    in_shards, in_rows = torch.zeros_like(squares), torch.zeros_like(squares)
    for name, part in gradient.items():
        total = in_shards if shards and name in shards else in_rows if name in dense else squares
        total[0, groups.of[name]] += part.double().pow(2).sum().cpu()
    if shards:
        sum_in_place(in_shards, next(iter(shards.values())).group)
    if dense:
        sum_in_place(in_rows)
    return squares + in_shards + in_rows


def clip_gradient(
    gradient: dict[str, Tensor],
    clipping_norm: float,
    clipping: Clipping,
    shards: Mapping[str, Shard] | None = None,
    dense: Collection[str] = (),
) -> tuple[dict[str, Tensor], bool]:
    """One formed gradient, clipped, such as that of a user with several rows.

    Args:
        gradient: By parameter name.
        clipping_norm: C.
        clipping: How.
        shards: Of the parameters of which other ranks hold the other experts, by name; these ranks
            all come here with the same gradient.
        dense: The parameters of which all ranks hold some rows each, by name; likewise.

    Returns:
        The clipped gradient, exactly zero if the gradient is not finite; and whether it is.
    """
    groups = clipping.groups(gradient)
    squares = squared_norms(gradient, groups, shards, dense)
    if not squares.isfinite().all():
        return {name: torch.zeros_like(part) for name, part in gradient.items()}, False
    factors = clip_factors(squares.sqrt(), clipping_norm, clipping, groups)[0].tolist()
    clipped = {name: part * factors[groups.of[name]] for name, part in gradient.items()}
    return clipped, True
