"""The model that a run starts from, and what of it trains."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from dpmoe_trainer.contract.base import Contract, Name, PathString


class UpcyclePlan(Contract):
    """Sparse upcycling: each chosen dense FFN becomes `experts` copies behind a router."""

    experts: Annotated[int, Field(ge=2, le=256)]
    top_k: Annotated[int, Field(ge=1, le=16)]
    layers: Annotated[tuple[int, ...], Field(min_length=1, max_length=256)]


class LoraPlan(Contract):
    """Low-rank adapters, which are trained in place of the weights and merged in at the end.

    Attributes:
        rank: of each adapter, and of each expert's.
        alpha: the additions are scaled by alpha/rank.
        attention: attention's linear layers get adapters.
        experts: fused expert weights get adapters.
    """

    rank: Annotated[int, Field(ge=1, le=1024)]
    alpha: Annotated[float, Field(gt=0)]
    attention: bool = True
    experts: bool = True

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if not (self.attention or self.experts):
            raise ValueError("one of attention and experts must be true")
        return self


class ModelPlan(Contract):
    """Where the pretrained model is and which of its parameters train.

    `labels` is the number of a classifier's classes; absent, a language model is trained.
    `trainable` holds fnmatch patterns over parameter names; empty means all parameters, or with
    `lora` the adapters and a classifier's head.
    """

    path: PathString | None = None
    hugging_face: Name | None = None
    revision: Name | None = None
    upcycle: UpcyclePlan | None = None
    labels: Annotated[int, Field(ge=2, le=1000)] | None = None
    trainable: Annotated[tuple[str, ...], Field(max_length=64)] = ()
    lora: LoraPlan | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.path is None) == (self.hugging_face is None):
            raise ValueError("exactly one of path and huggingFace must be set")
        if self.lora is not None and self.trainable:
            raise ValueError("trainable must be absent where lora is set")
        return self
