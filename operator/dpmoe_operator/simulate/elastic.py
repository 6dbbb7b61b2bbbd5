"""Elastic versions of a workload: every task would also take a part of what it asks, for less.

A part of a Rényi curve is the curve of the same run with a larger noise multiplier (exactly so for
the Gaussian mechanism, σ/√part), which costs less and is worth less.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dpmoe_operator.privacy.units import MAX_UNITS
from dpmoe_operator.simulate.workload import Workload

_PART = re.compile(r"(?P<part>0\.[0-9]{1,3}):(?P<utility>0\.[0-9]{1,6})")
_WHOLE = 1000
"""Parts are in thousandths, so that amounts times them fit 64 bits."""


@dataclass(frozen=True)
class Part:
    """A smaller demand that would also do.

    Attributes:
        thousandths: Of the task's demand, from 1 to 999.
        utility: What it is worth, of the task's weight, in (0, 1).

    Raises:
        ValueError: A number is out of range.
    """

    thousandths: int
    utility: float

    def __post_init__(self) -> None:
        if not 1 <= self.thousandths < _WHOLE or not 0 < self.utility < 1:
            raise ValueError(
                f"elastic: a part of {self.thousandths}/{_WHOLE} for {self.utility}: both must lie"
                " between 0 and 1, the part in steps of 0.001."
            )

    @classmethod
    def parse(cls, text: str) -> "Part":
        """The part that a command line states, as `PART:UTILITY`.

        >>> Part.parse("0.5:0.7")
        Part(thousandths=500, utility=0.7)

        Raises:
            ValueError: It is none.
        """
        match = _PART.fullmatch(text)
        if match is None:
            raise ValueError(f"elastic: {text!r} is no part; say PART:UTILITY, such as 0.5:0.7")
        return cls(round(float(match["part"]) * _WHOLE), float(match["utility"]))


def elastic(workload: Workload, parts: Sequence[Part]) -> Workload:
    """The workload in which every task is an elastic job: itself, or one of the parts.

    Raises:
        ValueError: It is elastic already, or a part is worth as much as a larger one.
    """
    if workload.group is not None:
        raise ValueError("elastic: the workload has elastic jobs already; leave the parts out")
    sizes = sorted(parts, key=lambda part: part.thousandths)
    worth = [part.utility for part in sizes]
    if len(set(worth)) < len(worth) or worth != sorted(worth):
        raise ValueError(f"elastic: utilities {worth} must increase with the parts")
    points = len(parts) + 1
    tasks = np.repeat(np.arange(workload.tasks), points)
    size = np.tile([*(part.thousandths for part in sizes), _WHOLE], workload.tasks)
    utility = np.tile([*worth, 1.0], workload.tasks)
    whole = workload.demand[tasks]
    # Rounded up, and a demand without end stays so.
    part = np.where(whole == MAX_UNITS, MAX_UNITS, -(-whole * size[:, np.newaxis] // _WHOLE))
    return replace(
        workload,
        name=f"{workload.name}, elastic",
        demand=part.astype(np.int64),
        indptr=np.append(0, np.cumsum(np.diff(workload.indptr)[tasks])),
        indices=workload.indices[workload.whole.pairs_of(tasks)],
        arrival=workload.arrival[tasks],
        weight=workload.weight[tasks] * utility,
        priority=workload.priority[tasks],
        timeout=workload.timeout[tasks],
        group=tasks.astype(np.int64),
    )
