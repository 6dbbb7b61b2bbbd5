"""What parts of a step cost, in time of the clock and of the processor."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Cost:
    """Seconds of the clock and of the processor."""

    clock: float
    processor: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.clock + other.clock, self.processor + other.processor)


class Stopwatch:
    """Collects the costs of named parts.

    Attributes:
        costs: of each part, one a turn.
    """

    def __init__(self, device: str) -> None:
        self.costs: dict[str, list[Cost]] = {}
        self._device = device

    def run(self, name: str, part: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a part, and counts what it cost."""
        self._wait()
        clock, processor = time.perf_counter(), time.process_time()
        result = part(*arguments)
        self._wait()
        cost = Cost(time.perf_counter() - clock, time.process_time() - processor)
        self.costs.setdefault(name, []).append(cost)
        return result

    def start_over(self) -> None:
        """Forgets the first turn, which warmed up."""
        self.costs.clear()

    def median(self, *names: str) -> Cost:
        """Of the sum of some parts, each kind of time by itself."""
        sums = [sum(turn, Cost(0, 0)) for turn in zip(*(self.costs[n] for n in names), strict=True)]
        return Cost(
            statistics.median(cost.clock for cost in sums),
            statistics.median(cost.processor for cost in sums),
        )

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()
