"""LoRA on experts, as `peft` wraps them: fused weights (`target_parameters`), or linear layers.

peft forms W_e + s·B_e·A_e for all experts in every forward pass. The engine computes the two small
factors on the routed rows instead, which is the same function, and clips their gradients as those
of two more expert layers. peft keeps A as [E·R, I] and B as [O, R·E].

Shapes: E experts, R the rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dpmoe_trainer.dp.errors import NotPerSample

_ATTRIBUTE = "_dpmoe_adapters"


@dataclass(frozen=True)
class ExpertAdapter:
    """A low-rank addition to one weight of an experts module.

    Attributes:
        down: A, [E·R, I].
        up: B, [O, R·E].
        experts: E.
        scaling: s.
    """

    down: Tensor
    up: Tensor
    experts: int
    scaling: float

    def by_expert_down(self, down: Tensor) -> Tensor:
        """A by expert, [E, R, I]."""
        return down.view(self.experts, -1, down.shape[1])

    def by_expert_up(self, up: Tensor) -> Tensor:
        """B by expert, [E, O, R]."""
        return up.view(up.shape[0], -1, self.experts).permute(2, 0, 1)

    def as_down(self, total_ERI: Tensor) -> Tensor:
        """A's gradient, as peft keeps A."""
        return total_ERI.flatten(0, 1)

    def as_up(self, total_EOR: Tensor) -> Tensor:
        """B's gradient, as peft keeps B."""
        return total_EOR.permute(1, 2, 0).flatten(1)


def adapted(experts: nn.Module, kind: str) -> list[ExpertAdapter]:
    """The adapters of an experts module's weight `kind`, while `own_adapters` holds."""
    return getattr(experts, _ATTRIBUTE, {}).get(kind, [])


def is_wrapper(module: nn.Module) -> bool:
    """Whether this is peft's wrapper of a parameter; peft itself need not be installed."""
    return _is_of_peft(module, "ParamWrapper")


def is_linear_wrapper(module: nn.Module) -> bool:
    """Whether this is peft's wrapper of a layer."""
    return _is_of_peft(module, "BaseTunerLayer")


def _is_of_peft(module: nn.Module, name: str) -> bool:
    return any(
        cls.__name__ == name and cls.__module__.startswith("peft.") for cls in type(module).__mro__
    )


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


@contextmanager
def own_adapters(wrapper: Any) -> Iterator[None]:
    """Has an experts module compute the low-rank factors that peft's wrapper would add to it.

    Raises:
        NotPerSample: The wrapper is not around fused experts, or its adapters are merged.
    """
    experts = wrapper.get_base_layer()
    if not hasattr(experts, "has_post_expert_norm") or wrapper.num_experts < 2:
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
