"""How a job learns: its task, its steps, clipping, the optimiser, and what balances the experts."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dpmoe_operator.api.base import (
    DISTINCT,
    ApiModel,
    DecimalString,
    SpecError,
    decimal,
    exactly_one,
    list_set,
    positive,
)

Task = Literal["classification", "language-modelling"]


class ClippingGroup(ApiModel):
    """Parameters that are clipped together, by fnmatch patterns of their names."""

    parameters: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=253)]],
        list_set(max_length=64, min_length=1),
        DISTINCT,
    ]
    weight: DecimalString = "1"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        positive("spec.privacy.clipping.groups.weight", self.weight)
        return self


class Clipping(ApiModel):
    """How each unit's gradient is brought to the clipping norm, which bounds it in every mode."""

    mode: Literal["flat", "per-group", "automatic"] = "flat"
    groups: Annotated[list[ClippingGroup], Field(max_length=64)] = []
    gamma: DecimalString | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.groups and self.mode != "per-group":
            raise SpecError(
                "spec.privacy.clipping.groups",
                f"{len(self.groups)} groups",
                "must be absent unless mode is per-group",
            )
        if self.gamma is not None and self.mode != "automatic":
            raise SpecError(
                "spec.privacy.clipping.gamma",
                self.gamma,
                "must be absent unless mode is automatic",
            )
        positive("spec.privacy.clipping.gamma", self.gamma)
        return self


class Optimizer(ApiModel):
    """The optimiser of the noised gradient."""

    name: Literal["sgd", "adamw", "adambc"] = "adamw"
    learning_rate: DecimalString
    weight_decay: DecimalString = "0"
    momentum: DecimalString = "0"
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        positive("spec.training.optimizer.learningRate", self.learning_rate)
        if decimal(self.momentum) >= 1:
            raise SpecError("spec.training.optimizer.momentum", self.momentum, "must be below 1")
        return self


class Balancing(ApiModel):
    """What keeps the experts evenly used. It costs no privacy beyond the job's mechanism."""

    method: Literal["none", "sequence", "released-load"] = "none"
    strength: DecimalString | None = None
    through: Literal["bias", "loss"] | None = None
    load_share: DecimalString | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        place = "spec.training.balancing"
        if self.method == "none" and self.strength is not None:
            raise SpecError(f"{place}.strength", self.strength, "must be absent for method none")
        if self.method != "released-load":
            for name, value in (("through", self.through), ("loadShare", self.load_share)):
                if value is not None:
                    raise SpecError(
                        f"{place}.{name}", value, "must be absent unless method is released-load"
                    )
        positive(f"{place}.strength", self.strength)
        positive(f"{place}.loadShare", self.load_share)
        if self.load_share is not None and decimal(self.load_share) >= 1:
            raise SpecError(f"{place}.loadShare", self.load_share, "must be below 1")
        return self


class Training(ApiModel):
    """The run. Exactly one of epochs and steps.

    `task` says what is learnt: a text's class, which needs blocks with labels, or its next tokens.
    `precision` is what products are computed in; weights, sums and noise are float32 in both.
    """

    method: Literal["dp-sgd"] = "dp-sgd"
    task: Task = "classification"
    logical_batch: Annotated[int, Field(ge=1, le=100_000_000)]
    physical_batch: Annotated[int, Field(ge=1, le=4096)] = 64
    epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None
    steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    max_tokens: Annotated[int, Field(ge=4, le=8192)] = 128
    precision: Literal["float32", "bfloat16"] = "float32"
    optimizer: Optimizer
    balancing: Balancing = Balancing()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        exactly_one("spec.training", {"epochs": self.epochs, "steps": self.steps})
        return self
