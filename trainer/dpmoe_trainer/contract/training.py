"""What shapes a run and costs no privacy."""

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dpmoe_trainer.contract.base import Contract


class OptimizerName(StrEnum):
    """Optimisers of the noised gradient; all are post-processing of what was released."""

    SGD = "sgd"
    ADAMW = "adamw"
    ADAMBC = "adambc"


class OptimizerPlan(Contract):
    """The optimiser and its public settings."""

    name: OptimizerName = OptimizerName.ADAMW
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0


class BalancingPlan(Contract):
    """What keeps the experts evenly used; it costs no privacy beyond the plan's mechanism.

    Attributes:
        method: `sequence`, a balancing loss over each row's own tokens; or `released-load`,
            steering by expert loads that are released with the gradients, in the same query.
        strength: of a loss, its factor; of a bias, how far a step moves it at most.
        through: of `released-load`, what is steered: the bias on the routers' choice, or a loss.
        load_share: of `released-load`, the loads' share of C².
    """

    method: Literal["sequence", "released-load"]
    strength: Annotated[float, Field(gt=0)]
    through: Literal["bias", "loss"] | None = None
    load_share: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        released = self.method == "released-load"
        if released != (self.through is not None) or released != (self.load_share is not None):
            raise ValueError(
                "through and loadShare must be set where method is released-load, and only there"
            )
        return self


Precision = Literal["float32", "bfloat16"]
"""No float16: it overflows, and models clamp that by the values of the whole batch."""


class TrainingSettings(Contract):
    """What shapes the run and costs no privacy.

    Attributes:
        method: the algorithm.
        optimizer: what makes updates of noised sums.
        max_tokens: where longer rows are cut.
        physical_batch: most rows that go through the model at once.
        precision: what the model's products are computed in; absent for float32. Weights, the
            optimiser's state, norms, clipped sums and noise are float32 in any case.
        balancing: what keeps the experts evenly used; absent for nothing.
    """

    method: Literal["dp-sgd"] = "dp-sgd"
    optimizer: OptimizerPlan
    max_tokens: Annotated[int, Field(ge=4, le=8192)] = 128
    physical_batch: Annotated[int, Field(ge=1, le=4096)] = 64
    precision: Precision | None = None
    balancing: BalancingPlan | None = None
