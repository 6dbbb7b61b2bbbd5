"""A use of a trained parameter, and the norm of a parameter's gradient over several uses.

A use turns its output's gradient into a part of each sample's squared gradient norm, and later,
once the clip factors are known, into the clipped sum. Where a parameter has one use, its squared
norm is that use's. Where it has several (a word table that is also the head), a sample's gradient
is the sum over the uses, and ‖Σ_u G_u‖² has the cross terms 2⟨G_u, G_v⟩ besides the squared norms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dpmoe_trainer.dp.errors import UncoveredParameter
from dpmoe_trainer.dp.ghost import floored

_PAIRS_AT_ONCE = 1 << 24
"""Row pairs held at once: 64 MiB in float32."""


def wide(tensor: Tensor) -> Tensor:
    """The tensor in at least float32: norms and sums are never formed in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class ClipFactors(NamedTuple):
    """What samples are scaled with, in each group of parameters.

    Attributes:
        own: [B, G] of the batch.
        company: [S, G] of all samples that ranks with shared experts compute together; without such
            ranks, those of the batch.
    """

    own: Tensor
    company: Tensor


class Clippable(ABC):
    """Something that the backward pass met, and that has clipped sums to give afterwards.

    Attributes:
        names: The trained parameters that it has sums of.
    """

    names: tuple[str, ...]

    @abstractmethod
    def clipped(self, factors: ClipFactors) -> dict[str, Tensor]:
        """Σ_b factors[b, g]·∇ℓ_b for each of its parameters, of group g, by parameter name."""


class Use(Clippable):
    """One use of trained parameters, from its output's gradient to its clipped gradient sum.

    Attributes:
        group: Their clipping group.
        of_company: Whether its rows are of the samples of all ranks that share the experts.
        gradient: The loss gradient of its output, once the backward pass has reached it.
    """

    group: int = 0
    of_company: bool = False
    gradient: Tensor

    def clipped(self, factors: ClipFactors) -> dict[str, Tensor]:
        """With its samples' and its group's factors."""
        factors_BG = factors.company if self.of_company else factors.own
        return self.clipped_sum(factors_BG[:, self.group])

    @abstractmethod
    def clipped_sum(self, factors: Tensor) -> dict[str, Tensor]:
        """Σ_b factors[b]·∇ℓ_b for each of its parameters, by parameter name."""

    @abstractmethod
    def squared_norms(self) -> Tensor:
        """This use's part of ‖∇ℓ_b‖², [batch]."""

    def factors(self) -> Factors:
        """The per-sample gradients as sums of outer products, for a parameter with other uses.

        Raises:
            UncoveredParameter: They have no such form.
        """
        raise UncoveredParameter(
            f"parameter {self.names[0]!r} is used twice in one forward pass, once by "
            f"{type(self).__name__}, for which there is no cross term: untie or freeze it"
        )


class Formed(Use):
    """A use whose per-sample gradients are small, and so are formed and kept."""

    def __init__(self, name: str) -> None:
        self.names = (name,)

    @abstractmethod
    def form(self) -> Tensor:
        """The samples' gradients, [B, …]."""

    @cached_property
    def per_sample(self) -> Tensor:
        """The samples' gradients, formed once."""
        formed = self.form()
        del self.gradient
        return formed

    def squared_norms(self) -> Tensor:
        """‖G_b‖²."""
        return self.per_sample.flatten(1).pow(2).sum(1)

    def clipped_sum(self, factors: Tensor) -> dict[str, Tensor]:
        """The samples' gradients, weighted."""
        return {self.names[0]: weighted_sum(factors, self.per_sample)}

    def factors(self) -> Factors:
        """Each gradient as one row."""
        right = self.per_sample.flatten(1)[:, None]
        return Factors(torch.ones_like(right[..., :1]), right)


def weighted_sum(factors: Tensor, per_sample: Tensor) -> Tensor:
    """Σ_b factors[b]·per_sample[b]."""
    return torch.tensordot(factors.to(per_sample.dtype), per_sample, dims=1)


def add_sums(total: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Adds sums by parameter name: a parameter may have several uses."""
    for name, part in more.items():
        total[name] = total[name] + part if name in total else part


@dataclass(frozen=True)
class Factors:
    """Per-sample gradients G_b = Σ_n left_n ⊗ right_n over n rows.

    Attributes:
        left: [B, n, O], or integers [B, n], each the place of the one in a one-hot row.
        right: [B, n, I].
    """

    left: Tensor
    right: Tensor

    def row_norms(self) -> Tensor:
        """‖left_n‖·‖right_n‖, [B, n]."""
        norms = self.right.pow(2).sum(2)
        if self.left.is_floating_point():
            norms = norms * self.left.pow(2).sum(2)
        return norms.sqrt()


def inner_products(one: Factors, other: Factors) -> Tensor:
    """⟨G_b, G'_b⟩ = Σ_{n,m} (left_n·left'_m)(right_n·right'_m), [B].

    Between a head and the table that it shares, this costs T²·D and a lookup: the left factor of an
    embedding's row is one-hot, so left_n·left'_m is one of the head's output gradients.
    """
    rows = one.right.shape[1] * other.right.shape[1]
    size = max(1, _PAIRS_AT_ONCE // max(rows, 1))
    parts = zip(
        *(side.split(size) for side in (one.left, one.right, other.left, other.right)), strict=True
    )
    products = []
    for one_left, one_right, other_left, other_right in parts:
        pairs = one_right @ other_right.transpose(1, 2)
        pairs *= _left_products(one_left, other_left)
        products.append(pairs.sum((1, 2)))
    return torch.cat(products)


def _left_products(one: Tensor, other: Tensor) -> Tensor:
    if one.is_floating_point() and other.is_floating_point():
        return one @ other.transpose(1, 2)
    if one.is_floating_point():
        return one.gather(2, other[:, None, :].expand(-1, one.shape[1], -1))
    if other.is_floating_point():
        return _left_products(other, one).transpose(1, 2)
    return one[:, :, None] == other[:, None, :]


def tied_squared_norms(uses: Sequence[Use]) -> Tensor:
    """‖Σ_u G_u‖² of one parameter over all its uses, [B]; never below what rounding lets one know.

    Raises:
        UncoveredParameter: A use has no cross term.
    """
    factors = [use.factors() for use in uses]
    norms = sum(
        (1 if one == other else 2) * inner_products(factors[one], factors[other])
        for one in range(len(factors))
        for other in range(one, len(factors))
    )
    assert isinstance(norms, Tensor), "a tied parameter has uses"
    terms = torch.stack([factor.row_norms().sum(1) for factor in factors]).sum(0).pow(2)
    return floored(norms, terms)
