"""Workloads as YAML: blocks and groups of tasks, or a published generator with its parameters.

    name: two teams                       # a published one instead:
    seed: 0                               #   generator: {kind: privatekube-multi, renyi: true}
    budget: {epsilon: "10", delta: "1e-7"}
    blocks: {initial: 10, every: 86400, until: 864000}
    caps: {team-a: "4"}
    rules: {unlock: "time:864000", period: 3600}
    tasks:
      - {namespace: team-a, blocks: {latest: 5},
         arrivals: {poisson: 3600, until: 864000},
         training: {noiseMultiplier: "1.1", samplingRate: "0.01", steps: 2000}}

Amounts are decimal strings, as in the custom resources; times are seconds.
"""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import yaml
from pydantic import Field, model_validator

from dpmoe_operator.api.base import (
    ApiModel,
    DecimalString,
    DeltaString,
    DnsLabel,
    EpsilonString,
    SpecError,
    exactly_one,
    parse,
)
from dpmoe_operator.privacy.capacity import Conversion, capacity
from dpmoe_operator.privacy.mechanisms import demand
from dpmoe_operator.privacy.orders import DEFAULT_ORDERS, parse_orders
from dpmoe_operator.privacy.units import capacity_units, spend_units
from dpmoe_operator.scheduling.round import Floats, Ints
from dpmoe_operator.simulate.amounts import spend_units as spend_units_of
from dpmoe_operator.simulate.curves import laplace
from dpmoe_operator.simulate.elastic import Part, elastic
from dpmoe_operator.simulate.generators.privatekube import BASIC_ORDERS
from dpmoe_operator.simulate.rules import Rules, Unlock
from dpmoe_operator.simulate.sources import Generator
from dpmoe_operator.simulate.workload import NEVER, Workload, make_workload

Seconds = Annotated[float, Field(ge=0)]
Interval = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class BudgetSpec(ApiModel):
    """The budget of every block; without δ, ε adds up (basic composition)."""

    epsilon: EpsilonString
    delta: DeltaString | None = None
    conversion: Conversion = "tight"
    orders: list[str] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.delta is None and self.orders is not None:
            raise SpecError("budget.orders", self.orders, "need a delta; set it or leave both out")
        parse_orders(self.order_names)
        return self

    @property
    def order_names(self) -> Sequence[str]:
        """The orders that blocks track."""
        return DEFAULT_ORDERS if self.orders is None else self.orders

    @property
    def order_numbers(self) -> Floats:
        """float64[A]: the columns of all amounts."""
        if self.delta is None:
            return BASIC_ORDERS
        return np.array([float(order) for order in self.order_names])

    def capacity(self, epsilon: str) -> Ints:
        """int64[A]: what an ε leaves at each order."""
        if self.delta is None:
            return np.array([capacity_units(Decimal(epsilon))], dtype=np.int64)
        room = capacity(epsilon, self.delta, self.order_names, self.conversion)
        return np.array(room, dtype=np.int64)


class BlocksSpec(ApiModel):
    """When blocks open."""

    initial: Count = 1
    every: Interval | None = None
    until: Seconds | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.every is None) != (self.until is None):
            raise SpecError("blocks", self.to_object(), "set every and until together, or neither")
        return self

    def opened(self) -> Floats:
        """float64[B]: when each block opens."""
        later = np.zeros(0)
        if self.every is not None and self.until is not None:
            later = np.arange(self.every, self.until, self.every)
        return np.concatenate((np.zeros(self.initial), later))


class RulesSpec(ApiModel):
    """When rounds happen, and how budget unlocks; see `Rules`."""

    unlock: str = "immediate"
    period: Interval | None = None
    until: Seconds | None = None
    foresight: Seconds = 0.0

    def rules(self) -> Rules:
        """The checked rules."""
        return Rules(Unlock.parse(self.unlock), self.period, self.until, self.foresight)


class ArrivalsSpec(ApiModel):
    """When the tasks of a group arrive: at given seconds, evenly, or as a Poisson process."""

    at: list[Seconds] | None = None
    every: Interval | None = None
    poisson: Interval | None = None
    start: Seconds = 0
    until: Seconds | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        exactly_one("arrivals", {"at": self.at, "every": self.every, "poisson": self.poisson})
        if self.at is None and (self.until is None or self.until <= self.start):
            raise SpecError("arrivals.until", self.until, "must be later than start")
        if self.at == []:
            raise SpecError("arrivals.at", self.at, "must name at least one time")
        return self

    def draw(self, rng: np.random.Generator) -> Floats:
        """float64[n]: when the tasks arrive."""
        if self.at is not None:
            return np.sort(np.array(self.at))
        assert self.until is not None
        if self.every is not None:
            return np.arange(self.start, self.until, self.every)
        assert self.poisson is not None
        count = rng.poisson((self.until - self.start) / self.poisson)
        return np.sort(rng.uniform(self.start, self.until, count))


class SelectionSpec(ApiModel):
    """Which blocks a task asks for, of those that are open when it arrives."""

    latest: Count | None = None
    any: Count | None = None
    all: Literal[True] | None = None
    rows: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        exactly_one(
            "blocks",
            {"latest": self.latest, "any": self.any, "all": self.all, "rows": self.rows},
        )
        return self

    def choose(self, rng: np.random.Generator, there: int) -> Ints | None:
        """int64[n]: blocks, of the first `there`; None if there aren't so many."""
        if self.rows is not None:
            rows = np.unique(np.array(self.rows, dtype=np.int64))
            return rows if rows[-1] < there else None
        count = self.latest or self.any or there
        if count > there:
            return None
        if self.any is not None:
            return np.sort(rng.choice(there, count, replace=False)).astype(np.int64)
        return np.arange(there - count, there)


class TrainingSpec(ApiModel):
    """A training run: Poisson-sampled Gaussian steps."""

    noise_multiplier: DecimalString
    sampling_rate: DecimalString
    steps: Annotated[int, Field(ge=1, le=10**9)]


class PointSpec(ApiModel):
    """Another demand, or other blocks, that an elastic task would also take.

    Attributes:
        utility: What it is worth, of the task's weight.
    """

    utility: Annotated[float, Field(gt=0, lt=1)]
    blocks: SelectionSpec | None = None
    epsilon: EpsilonString | None = None
    training: TrainingSpec | None = None
    laplace: DecimalString | None = None
    curve: list[EpsilonString] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        stated = [name for name in (*_DEMANDS, "blocks") if getattr(self, name) is not None]
        if not stated or len(set(stated) - {"blocks"}) > 1:
            raise SpecError("tasks.points", stated, "must state blocks, one demand, or both")
        return self

    def of(self, whole: "TasksSpec") -> "TasksSpec":
        """The group of tasks at this point."""
        changes = {name: getattr(self, name) for name in _DEMANDS}
        if not any(changes.values()):
            changes = {}
        if self.blocks is not None:
            changes["blocks"] = self.blocks
        return whole.model_copy(update=changes)


_DEMANDS = ("epsilon", "training", "laplace", "curve")


class TasksSpec(ApiModel):
    """A group of tasks that are alike. With `points`, each task is granted at one of them."""

    arrivals: ArrivalsSpec
    blocks: SelectionSpec
    epsilon: EpsilonString | None = None
    training: TrainingSpec | None = None
    laplace: DecimalString | None = None
    curve: list[EpsilonString] | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    timeout: Interval | None = None
    namespace: DnsLabel | None = None
    points: Annotated[list[PointSpec], Field(max_length=16)] = []

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        exactly_one(
            "tasks",
            {
                "epsilon": self.epsilon,
                "training": self.training,
                "laplace": self.laplace,
                "curve": self.curve,
            },
        )
        return self

    def demand(self, budget: BudgetSpec) -> Ints:
        """int64[A]: what a task asks of each of its blocks."""
        basic = budget.delta is None
        if basic != (self.epsilon is not None):
            wanted = "epsilon" if basic else "training, laplace or curve"
            raise SpecError("tasks", self.to_object(), f"must state its demand as {wanted}")
        if self.epsilon is not None:
            return np.array([spend_units(Decimal(self.epsilon))], dtype=np.int64)
        if self.training is not None:
            run = self.training
            noise, rate = float(run.noise_multiplier), float(run.sampling_rate)
            amounts: Sequence[int] = demand(noise, rate, run.steps, budget.order_names)
            return np.array(amounts, dtype=np.int64)
        if self.laplace is not None:
            return spend_units_of(laplace(float(self.laplace), budget.order_numbers))
        assert self.curve is not None
        if len(self.curve) != len(budget.order_names):
            raise SpecError(
                "tasks.curve",
                self.curve,
                f"must have {len(budget.order_names)} amounts, one an order",
            )
        return np.array([spend_units(Decimal(amount)) for amount in self.curve], dtype=np.int64)


class PartSpec(ApiModel):
    """A part of its demand that every task would also take; see `Part`."""

    part: Annotated[float, Field(gt=0, lt=1, multiple_of=0.001)]
    utility: Annotated[float, Field(gt=0, lt=1)]


class WorkloadSpec(ApiModel):
    """A workload and its rules: a generator, or blocks and groups of tasks."""

    name: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    rules: RulesSpec = RulesSpec()
    generator: Generator | None = None
    budget: BudgetSpec | None = None
    blocks: BlocksSpec = BlocksSpec()
    caps: dict[DnsLabel, EpsilonString] = {}
    tasks: list[TasksSpec] = []
    elastic: Annotated[list[PartSpec], Field(max_length=16)] = []

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        exactly_one("workload", {"generator": self.generator, "budget": self.budget})
        if self.budget is not None and not self.tasks:
            raise SpecError("tasks", [], "must have at least one group")
        if self.generator is not None and (self.tasks or self.caps):
            raise SpecError("generator", self.generator.kind, "makes its own tasks; remove yours")
        return self


def read_spec(path: Path, seed: int | None = None) -> tuple[Workload, Rules]:
    """The workload and the rules of a YAML file.

    Args:
        path: The file. Paths in it are relative to its folder.
        seed: Of all random draws, instead of the file's.

    Raises:
        ValueError: It is no YAML, or a field is wrong. Names the field, the value, the remedy.
        OSError: The file can't be read.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: must be a mapping of fields, as docs/simulate.md shows")
    spec = parse(WorkloadSpec, content, at="workload")
    return build(spec, spec.seed if seed is None else seed, path.parent), spec.rules.rules()


def build(spec: WorkloadSpec, seed: int, folder: Path) -> Workload:
    """The workload of a checked spec."""
    if spec.generator is not None:
        made = spec.generator.make(seed, folder)
    else:
        made = _of_tasks(spec, seed)
    if not spec.elastic:
        return made
    return elastic(made, [Part(round(one.part * 1000), one.utility) for one in spec.elastic])


def _of_tasks(spec: WorkloadSpec, seed: int) -> Workload:
    """The workload of a spec that states its own tasks."""
    assert spec.budget is not None
    budget, opened = spec.budget, spec.blocks.opened()
    caps = _Caps(spec.caps, len(opened))
    parts: dict[str, list[Any]] = {name: [] for name in _TASK_FIELDS}
    rng, jobs = np.random.default_rng(seed), 0
    for group in spec.tasks:
        points = [(1.0, group), *((point.utility, point.of(group)) for point in group.points)]
        amounts = [point.demand(budget) for _, point in points]
        for arrival in group.arrivals.draw(rng).tolist():
            there = int(np.searchsorted(opened, arrival, side="right"))
            jobs += 1
            for (utility, point), asked in zip(points, amounts, strict=True):
                rows = _chosen(point.blocks, rng, there, arrival)
                parts["asked"].append(caps.with_caps(rows, group.namespace))
                parts["demand"].append(asked)
                parts["arrival"].append(arrival)
                parts["weight"].append(group.weight * utility)
                parts["priority"].append(group.priority)
                parts["timeout"].append(NEVER if group.timeout is None else group.timeout)
                parts["group"].append(jobs)
    if not parts["asked"]:
        raise SpecError("tasks", len(spec.tasks), "no task arrives; let some arrive earlier")
    return make_workload(
        spec.name or "workload",
        orders=budget.order_numbers,
        capacity=np.concatenate(
            [
                np.tile(budget.capacity(budget.epsilon), (len(opened), 1)),
                *(budget.capacity(epsilon)[None] for epsilon in caps.epsilons),
            ]
        ),
        opened=np.concatenate((opened, opened[caps.blocks])),
        is_cap=np.arange(len(opened) + len(caps.blocks)) >= len(opened),
        demand=np.array(parts["demand"]),
        asked=parts["asked"],
        arrival=np.array(parts["arrival"]),
        weight=np.array(parts["weight"]),
        priority=np.array(parts["priority"], dtype=np.int64),
        timeout=np.array(parts["timeout"]),
        group=np.array(parts["group"], dtype=np.int64)
        if any(group.points for group in spec.tasks)
        else None,
    )


def _chosen(blocks: SelectionSpec, rng: np.random.Generator, there: int, arrival: float) -> Ints:
    """The rows that a task asks for.

    Raises:
        SpecError: There aren't so many blocks yet.
    """
    rows = blocks.choose(rng, there)
    if rows is None:
        raise SpecError(
            "tasks.blocks",
            blocks.to_object(),
            f"only {there} blocks are open at second {arrival:g}; ask for fewer",
        )
    return rows


_TASK_FIELDS = ("asked", "demand", "arrival", "weight", "priority", "timeout", "group")


class _Caps:
    """The rows of namespaces' caps, one for each block that a capped namespace asks for."""

    def __init__(self, caps: Mapping[str, str], blocks: int) -> None:
        self._caps, self._first = caps, blocks
        self._row: dict[tuple[str, int], int] = {}
        self.epsilons: list[str] = []
        self.blocks: list[int] = []

    def with_caps(self, rows: Ints, namespace: str | None) -> Ints:
        """The blocks that a task asks for, and the caps that it is under."""
        if namespace is None or namespace not in self._caps:
            return rows
        return np.append(rows, [self._cap(namespace, block) for block in rows.tolist()])

    def _cap(self, namespace: str, block: int) -> int:
        if (namespace, block) not in self._row:
            self._row[namespace, block] = self._first + len(self.blocks)
            self.blocks.append(block)
            self.epsilons.append(self._caps[namespace])
        return self._row[namespace, block]
