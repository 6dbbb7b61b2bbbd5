"""What a manifest says of the recipe, pinned for the plan with every default filled in.

None of it changes what the run costs: in every mode the mechanism's sensitivity is the clipping
norm C (docs/design/balancing.md).
"""

from dpmoe_operator.api.dpmoejob import DPMoEJobSpec
from dpmoe_operator.api.privateblock import Dataset
from dpmoe_operator.launch import paths
from dpmoe_trainer.contract import (
    BalancingPlan,
    ClippingGroup,
    ClippingPlan,
    LoraPlan,
    ModelPlan,
    OptimizerName,
    OptimizerPlan,
    Precision,
    TrainingSettings,
    UpcyclePlan,
)

GAMMA = "0.01"
"""γ of automatic clipping, as its authors recommend for all tasks."""

BIAS_STRENGTH, LOSS_STRENGTH = "0.05", "0.01"
"""How far a step moves a bias at most; the factor of a balancing loss."""

LOAD_SHARE = "0.02"
"""The released loads' share of C²: gradients lose one percent of their clipping norm."""


def clipping_plan(spec: DPMoEJobSpec) -> ClippingPlan | None:
    """How gradients are clipped; None for flat clipping."""
    clipping = spec.privacy.clipping
    if clipping.mode == "flat":
        return None
    if clipping.mode == "automatic":
        return ClippingPlan(mode=clipping.mode, gamma=float(clipping.gamma or GAMMA))
    groups = tuple(
        ClippingGroup(parameters=tuple(group.parameters), weight=float(group.weight))
        for group in clipping.groups
    )
    return ClippingPlan(mode=clipping.mode, groups=groups)


def balancing_plan(spec: DPMoEJobSpec) -> BalancingPlan | None:
    """What is done for balanced experts; None for nothing."""
    balancing = spec.training.balancing
    if balancing.method == "none":
        return None
    released = balancing.method == "released-load"
    through = (balancing.through or "bias") if released else None
    strength = BIAS_STRENGTH if through == "bias" else LOSS_STRENGTH
    return BalancingPlan(
        method=balancing.method,
        strength=float(balancing.strength or strength),
        through=through,
        load_share=float(balancing.load_share or LOAD_SHARE) if released else None,
    )


def precision_plan(spec: DPMoEJobSpec) -> Precision | None:
    """What products are computed in; None for float32."""
    precision = spec.training.precision
    return None if precision == "float32" else precision


def lora_plan(spec: DPMoEJobSpec) -> LoraPlan | None:
    """The adapters that are trained; None where the weights themselves are."""
    lora = spec.model.lora
    if lora is None:
        return None
    return LoraPlan(
        rank=lora.rank,
        alpha=float(lora.alpha) if lora.alpha is not None else 2.0 * lora.rank,
        attention="attention" in lora.on,
        experts="experts" in lora.on,
    )


def model_plan(spec: DPMoEJobSpec, dataset: Dataset) -> ModelPlan:
    """The model, how it is made, and what of it is trained."""
    model = spec.model
    return ModelPlan(
        path=paths.model(model),
        hugging_face=model.hugging_face.id if model.hugging_face else None,
        revision=model.hugging_face.revision if model.hugging_face else None,
        upcycle=UpcyclePlan(
            experts=model.upcycle.experts,
            top_k=model.upcycle.top_k,
            layers=tuple(model.upcycle.layers),
        )
        if model.upcycle
        else None,
        labels=dataset.labels if spec.training.task == "classification" else None,
        trainable=tuple(model.trainable),
        lora=lora_plan(spec),
    )


def training_settings(spec: DPMoEJobSpec) -> TrainingSettings:
    """What shapes the run and costs no privacy."""
    training = spec.training
    optimizer = training.optimizer
    return TrainingSettings(
        method=training.method,
        optimizer=OptimizerPlan(
            name=OptimizerName(optimizer.name),
            learning_rate=float(optimizer.learning_rate),
            weight_decay=float(optimizer.weight_decay),
            momentum=float(optimizer.momentum),
            warmup_steps=optimizer.warmup_steps,
        ),
        max_tokens=training.max_tokens,
        physical_batch=training.physical_batch,
        precision=precision_plan(spec),
        balancing=balancing_plan(spec),
    )
