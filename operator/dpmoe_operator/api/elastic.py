"""What less than the whole job would also do: smaller ε, fewer blocks, and what each is worth.

The rest of the spec states the job at its best, of utility 1. Here are the points below it, along
one axis or both; the utility of a combination is the product. One point alone is the lower end of a
range: two more are tried between it and the whole, whose utilities lie on the line between. The
scheduler grants one point, calibrates the run to it, and pins it in the ledger. Where blocks unlock
by time, an operator without foresight grants whatever point the unlocked part allows when the job
comes; with foresight it waits for a better one if budget is coming.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from typing import Annotated, Self

from pydantic import Field, model_validator

from dpmoe_operator.api.base import (
    ApiModel,
    EpsilonString,
    SpecError,
    UtilityString,
    decimal,
    positive,
)

_BETWEEN = 2
"""How many points are tried between the two ends of a range."""

_MILLIONTH = Decimal("1e-6")


class EpsilonPoint(ApiModel):
    """An ε below that of the job, and its utility."""

    epsilon: EpsilonString
    utility: UtilityString


class BlocksPoint(ApiModel):
    """A number of blocks below that of the job, and its utility."""

    count: Annotated[int, Field(ge=1, le=255)]
    utility: UtilityString


class Elastic(ApiModel):
    """Smaller points, the smallest first, each worth more than the one before and less than 1."""

    epsilon: Annotated[list[EpsilonPoint], Field(min_length=1, max_length=3)] | None = None
    blocks: Annotated[list[BlocksPoint], Field(min_length=1, max_length=3)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.epsilon is None and self.blocks is None:
            raise SpecError("spec.elastic", "nothing", "must set epsilon, blocks, or both")
        for name, points in (("epsilon", self.epsilon), ("blocks", self.blocks)):
            utilities = [decimal(point.utility) for point in points or []]
            for point in points or []:
                positive(f"spec.elastic.{name}.utility", point.utility)
            if any(utility >= 1 for utility in utilities) or utilities != sorted(set(utilities)):
                raise SpecError(
                    f"spec.elastic.{name}.utility",
                    [point.utility for point in points or []],
                    "must increase from point to point, and stay below 1, the utility of the whole",
                )
        return self

    def check(
        self, *, epsilon: str | None, noise_multiplier: str | None, count: int | None
    ) -> None:
        """Check the points against the job at its best.

        Args:
            epsilon: `spec.privacy.epsilon`.
            noise_multiplier: `spec.privacy.noiseMultiplier`.
            count: how many blocks the job asks for; None if it does not say.

        Raises:
            SpecError: the points contradict it.
        """
        if self.epsilon is not None:
            if epsilon is None or noise_multiplier is not None:
                raise SpecError(
                    "spec.elastic.epsilon",
                    [point.epsilon for point in self.epsilon],
                    "needs spec.privacy.epsilon, the largest, and no spec.privacy.noiseMultiplier:"
                    " the noise is calibrated to the point that is granted",
                )
            amounts = [decimal(point.epsilon) for point in self.epsilon]
            positive("spec.elastic.epsilon.epsilon", self.epsilon[0].epsilon)
            if [*amounts, decimal(epsilon)] != sorted({*amounts, decimal(epsilon)}):
                raise SpecError(
                    "spec.elastic.epsilon.epsilon",
                    [point.epsilon for point in self.epsilon],
                    f"must increase from point to point, and stay below privacy.epsilon {epsilon}",
                )
        if self.blocks is not None:
            counts = [point.count for point in self.blocks]
            if count is None:
                raise SpecError(
                    "spec.blocks.count", "absent", "must be set, or names, for elastic.blocks"
                )
            if [*counts, count] != sorted({*counts, count}):
                raise SpecError(
                    "spec.elastic.blocks.count",
                    counts,
                    f"must increase from point to point, and stay below the {count} of spec.blocks",
                )

    def points(self, epsilon: str | None, count: int | None) -> list["Point"]:
        """All points of the job, the whole one first, then by falling utility.

        Args:
            epsilon: `spec.privacy.epsilon`.
            count: how many blocks the job asks for at its best.
        """
        budgets: list[tuple[Decimal | None, Decimal]] = [(None, Decimal(1))]
        sizes: list[tuple[int | None, Decimal]] = [(None, Decimal(1))]
        if self.epsilon is not None:
            assert epsilon is not None
            named = [(decimal(one.epsilon), decimal(one.utility)) for one in self.epsilon]
            budgets += _filled(named, decimal(epsilon))
        if self.blocks is not None:
            assert count is not None
            named = [(Decimal(one.count), decimal(one.utility)) for one in self.blocks]
            between = _filled(named, Decimal(count))
            whole = {int(size.to_integral_value()): utility for size, utility in reversed(between)}
            sizes += [(size, utility) for size, utility in whole.items() if size < count]
        points = [
            Point(
                None if amount is None else _text(amount),
                size,
                _text(max(budget_utility * size_utility, _MILLIONTH)),
            )
            for (amount, budget_utility), (size, size_utility) in product(budgets, sizes)
        ]
        return sorted(points, key=lambda point: -decimal(point.utility))


@dataclass(frozen=True)
class Point:
    """One point of a job.

    Attributes:
        epsilon: its ε; None for that of the job.
        count: its blocks; None for all that the job asks for.
        utility: its part of the job's utility.
    """

    epsilon: str | None
    count: int | None
    utility: str


def _filled(
    named: Sequence[tuple[Decimal, Decimal]], whole: Decimal
) -> list[tuple[Decimal, Decimal]]:
    """Points below the whole; a single one with those between it and the whole."""
    if len(named) > 1:
        return list(named)
    [(low, utility)] = named
    steps = [Decimal(step) / (_BETWEEN + 1) for step in range(_BETWEEN + 1)]
    return [(low + (whole - low) * part, utility + (1 - utility) * part) for part in steps]


def _text(number: Decimal) -> str:
    """A number to six decimals, as short as it goes."""
    text = f"{number.quantize(_MILLIONTH):f}"
    return text.rstrip("0").rstrip(".")
