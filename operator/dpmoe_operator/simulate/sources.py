"""The published workloads by name, with their parameters as a YAML file states them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dpmoe_operator.api.base import ApiModel, DeltaString, EpsilonString
from dpmoe_operator.privacy.capacity import Conversion
from dpmoe_operator.simulate.generators import amazon, dpack, large, privatekube
from dpmoe_operator.simulate.trace import TraceOptions, Weights, read_trace
from dpmoe_operator.simulate.workload import Workload

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Number = Annotated[int, Field(ge=1, le=1_000_000)]


class PrivateKubeSingle(ApiModel):
    """PrivateKube's microbenchmark on one block."""

    kind: Literal["privatekube-single"]
    interval: Positive = 1.0
    seconds: Positive = 236.0

    def make(self, seed: int, folder: Path) -> Workload:
        """The workload."""
        return privatekube.single_block(seed, interval=self.interval, seconds=self.seconds)


class PrivateKubeMulti(ApiModel):
    """PrivateKube's microbenchmark on many blocks, basic or Rényi."""

    kind: Literal["privatekube-multi"]
    renyi: bool = False
    interval: Positive | None = None
    seconds: Positive = 300.0

    def make(self, seed: int, folder: Path) -> Workload:
        """The workload."""
        return privatekube.multi_block(
            seed, renyi=self.renyi, interval=self.interval, seconds=self.seconds
        )


class DPackBlocks(ApiModel):
    """DPack's blocks knob."""

    kind: Literal["dpack-blocks"]
    spread: NotNegative
    tasks: Number = 1000
    blocks: Number = 20

    def make(self, seed: int, folder: Path) -> Workload:
        """The workload."""
        return dpack.blocks_knob(seed, self.spread, tasks=self.tasks, blocks=self.blocks)


class DPackOrders(ApiModel):
    """DPack's orders knob."""

    kind: Literal["dpack-orders"]
    spread: NotNegative
    smallest: Positive = 0.01
    tasks: Number = 1000

    def make(self, seed: int, folder: Path) -> Workload:
        """The workload."""
        return dpack.orders_knob(seed, self.spread, smallest=self.smallest, tasks=self.tasks)


class DPackBoth(ApiModel):
    """Both knobs of DPack."""

    kind: Literal["dpack-both"]
    block_spread: NotNegative = 4.0
    order_spread: NotNegative = 8.0
    smallest: Positive = 0.02
    tasks: Number = 1000
    blocks: Number = 20

    def make(self, seed: int, folder: Path) -> Workload:
        """The workload."""
        return dpack.both_knobs(
            seed,
            block_spread=self.block_spread,
            order_spread=self.order_spread,
            smallest=self.smallest,
            tasks=self.tasks,
            blocks=self.blocks,
        )


class Amazon(ApiModel):
    """In the manner of the Amazon Reviews experiment."""

    kind: Literal["amazon"]
    tasks_per_day: Positive = 300.0
    days: Number = 50
    initial_blocks: Number = 10

    def make(self, seed: int, folder: Path) -> Workload:
        """The workload."""
        return amazon.amazon(
            seed,
            tasks_per_day=self.tasks_per_day,
            days=self.days,
            initial_blocks=self.initial_blocks,
        )


class Large(ApiModel):
    """One very large round."""

    kind: Literal["large"]
    tasks: Number = 100_000
    blocks: Number = 1000

    def make(self, seed: int, folder: Path) -> Workload:
        """The workload."""
        return large.large(seed, tasks=self.tasks, blocks=self.blocks)


class Trace(ApiModel):
    """A CSV file in the format of Alibaba-DP."""

    kind: Literal["trace"]
    path: str
    horizon: Number = 30
    initial_blocks: Number = 100
    epsilon: EpsilonString = "10"
    delta: DeltaString = "1e-7"
    conversion: Conversion = "classic"
    weights: Weights = "count"
    tasks: Number | None = None

    def make(self, seed: int, folder: Path) -> Workload:
        """The workload."""
        options = self.model_dump(exclude={"kind", "path"})
        return read_trace(folder / self.path, TraceOptions(seed=seed, **options))


Generator = Annotated[
    PrivateKubeSingle
    | PrivateKubeMulti
    | DPackBlocks
    | DPackOrders
    | DPackBoth
    | Amazon
    | Large
    | Trace,
    Field(discriminator="kind"),
]
