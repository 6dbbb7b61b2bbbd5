"""LoRA on experts, as `peft` wraps them: fused weights (`target_parameters`), or linear layers.

peft forms W_e + s·B_e·A_e for all experts in every forward pass. The engine computes the two small
factors on the routed rows instead, which is the same function, and clips their gradients as those
of two more expert layers.

Shapes: E experts, R the rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dpmoe_trainer.dp.errors import NotPerSample
from dpmoe_trainer.models.expert_adapters import Factor, is_of_peft, unwrapped

_ATTRIBUTE = "_dpmoe_adapters"


@dataclass(frozen=True)
class ExpertAdapter:
    """A low-rank addition to one weight of an experts module.

    Attributes:
        down: A, [E·R, I].
        up: B, [O, R·E].
        experts: E, those that are here.
        scaling: s.
    """

    down: Tensor
    up: Tensor
    experts: int
    scaling: float

    @property
    def downs(self) -> Factor:
        """How A holds the experts'."""
        return Factor(self.experts, is_down=True)

    @property
    def ups(self) -> Factor:
        """How B does."""
        return Factor(self.experts, is_down=False)


def adapted(experts: nn.Module, kind: str) -> list[ExpertAdapter]:
    """The adapters of an experts module's weight `kind`, while `own_adapters` holds."""
    return getattr(experts, _ATTRIBUTE, {}).get(kind, [])


def is_linear_wrapper(module: nn.Module) -> bool:
    """Whether this is peft's wrapper of a layer."""
    return is_of_peft(module, "BaseTunerLayer")


def adapters_by_layer(layers: Sequence[Any]) -> list[tuple[list[Tensor], list[Tensor], float]]:
    """The adapters of one linear layer of each expert: A [R, I] and B [O, R] of each, and s.

    Raises:
        NotPerSample: The experts have not the same adapters, or these are merged or no plain LoRA.
    """
    if not any(map(is_linear_wrapper, layers)):
        return []
    if not all(map(is_linear_wrapper, layers)):
        raise NotPerSample("some experts of a layer have adapters and some have none: adapt all")
    if any(layer.merged for layer in layers):
        raise NotPerSample("a LoRA adapter is merged into its weights: unmerge it to train it")
    found = []
    for name in layers[0].active_adapters:
        if any(layer.disable_adapters for layer in layers):
            continue
        if not all(name in layer.lora_A and name in layer.active_adapters for layer in layers):
            raise NotPerSample(f"some experts of a layer lack the adapter {name!r}: adapt all")
        if len({layer.scaling[name] for layer in layers}) > 1:
            raise NotPerSample(f"the experts' adapters {name!r} are scaled differently: use one")
        found.append(
            (
                [layer.lora_A[name].weight for layer in layers],
                [layer.lora_B[name].weight for layer in layers],
                float(layers[0].scaling[name]),
            )
        )
    return found


def _is_of_many(wrapper: Any, experts: Any) -> bool:
    """Whether the wrapped parameter is a weight of each of several experts, here or elsewhere."""
    weight: Tensor = getattr(experts, wrapper.parameter_name)
    return weight.dim() == 3 and experts.num_experts > 1


@contextmanager
def own_adapters(wrapper: Any) -> Iterator[None]:
    """Has an experts module compute the low-rank factors that peft's wrapper would add to it.

    Raises:
        NotPerSample: The wrapper is not around fused experts, or its adapters are merged.
    """
    experts: Any = unwrapped(wrapper)
    if not hasattr(experts, "has_post_expert_norm") or not _is_of_many(wrapper, experts):
        raise NotPerSample(
            f"peft's target_parameters names {wrapper.parameter_name!r} of a "
            f"{type(experts).__name__}, which is no module of two fused experts or more: name "
            "linear layers in target_modules (all-linear takes routers, too)"
        )
    if wrapper.merged:
        raise NotPerSample("a LoRA adapter is merged into its weights: unmerge it to train it")
    adapters: dict[str, list[ExpertAdapter]] = vars(experts).setdefault(_ATTRIBUTE, {})
    if not wrapper.disable_adapters:
        adapters[wrapper.parameter_name] = [
            ExpertAdapter(
                wrapper.lora_A[name].weight,
                wrapper.lora_B[name].weight,
                wrapper.num_experts,
                wrapper.scaling[name],
            )
            for name in wrapper.active_adapters
            if name in wrapper.lora_A
        ]
    wrapper.forward = lambda *args, **kwargs: wrapper.base_layer(*args, **kwargs)
    try:
        yield
    finally:
        del wrapper.forward
        vars(experts).pop(_ATTRIBUTE, None)
