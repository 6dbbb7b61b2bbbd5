"""The mechanism of a run."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dpmoe_trainer.contract.base import Contract


class ClippingGroup(Contract):
    """Parameters that are clipped together: fnmatch patterns over their names.

    `weight` is the group's share of C², relative to the other groups'.
    """

    parameters: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=253)], ...],
        Field(min_length=1, max_length=64),
    ]
    weight: Annotated[float, Field(gt=0)] = 1.0


class ClippingPlan(Contract):
    """How a unit's gradient is brought to the clipping norm C; its sensitivity is C in every mode.

    Attributes:
        mode: `flat`, min(1, C/‖g‖); `per-group`, the same with a threshold for each group of
            parameters, whose squares sum to C²; `automatic`, C/(‖g‖ + γ).
        groups: of mode `per-group`; none means a group for each block of layers.
        gamma: γ of mode `automatic`.
    """

    mode: Literal["flat", "per-group", "automatic"]
    groups: Annotated[tuple[ClippingGroup, ...], Field(max_length=256)] = ()
    gamma: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.groups and self.mode != "per-group":
            raise ValueError("groups must be absent unless mode is per-group")
        if (self.gamma is not None) != (self.mode == "automatic"):
            raise ValueError("gamma must be set where mode is automatic, and only there")
        return self


class PrivacyPlan(Contract):
    """The mechanism, pinned: the Poisson-subsampled Gaussian, `steps` times.

    Attributes:
        epsilon: the (ε, δ) guarantee of the run by the operator's accountant.
        delta: its δ.
        noise_multiplier: σ; the noise on the clipped sum is N(0, (σC)² I).
        sampling_rate: q, the probability with which a unit is in a step's logical batch.
        steps: how often the mechanism runs, at most.
        clipping_norm: C, the L2 bound of one unit's contribution.
        clipping: how a unit's contribution is brought to C; absent for flat clipping.
        expected_batch: q × units, the public divisor of the noised sum.
        orders: RDP orders of the blocks that pay.
    """

    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    noise_multiplier: Annotated[float, Field(gt=0)]
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=1)]
    clipping_norm: Annotated[float, Field(gt=0)]
    expected_batch: Annotated[float, Field(gt=0)]
    orders: Annotated[tuple[float, ...], Field(min_length=1, max_length=64)]
    clipping: ClippingPlan | None = None
