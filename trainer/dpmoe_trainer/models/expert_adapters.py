"""How `peft` keeps the adapters of fused experts, and what of them is whose.

It wraps each adapted weight of an experts module in a ParamWrapper, one wrapper around the other,
and keeps a factor of all experts' adapters in one matrix: A as [E·R, I] and B as [O, R·E].

Shapes: E experts, R the rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Factor:
    """One of an adapter's two factors, of all experts.

    Attributes:
        experts: E.
        is_down: whether it is A, which comes first; if not, it is B.
    """

    experts: int
    is_down: bool

    def by_expert(self, kept: Tensor) -> Tensor:
        """A as [E, R, I], or B as [E, O, R]."""
        if self.is_down:
            return kept.view(self.experts, -1, kept.shape[1])
        return kept.view(kept.shape[0], -1, self.experts).permute(2, 0, 1)

    def as_kept(self, by_expert: Tensor) -> Tensor:
        """The way back, for any number of experts."""
        if self.is_down:
            return by_expert.flatten(0, 1)
        return by_expert.permute(1, 2, 0).flatten(1)


def is_wrapper(module: nn.Module) -> bool:
    """Whether this is peft's wrapper of a parameter; peft itself need not be installed."""
    return is_of_peft(module, "ParamWrapper")


def is_of_peft(module: nn.Module, name: str) -> bool:
    """Whether this is, or derives from, peft's class of this name."""
    return any(
        cls.__name__ == name and cls.__module__.startswith("peft.") for cls in type(module).__mro__
    )


def wrappers(experts: Any) -> Iterator[Any]:
    """The wrappers around an experts module, from the outermost."""
    while is_wrapper(experts):
        yield experts
        experts = experts.base_layer


def unwrapped(experts: Any) -> nn.Module:
    """The experts module within its wrappers, if it has any."""
    module: nn.Module = experts.get_base_layer() if is_wrapper(experts) else experts
    return module


def factors_of(wrapper: Any) -> Iterator[tuple[nn.Linear, Factor]]:
    """The layers that hold the factors of a wrapper's adapters, and how they do."""
    for layers, is_down in ((wrapper.lora_A, True), (wrapper.lora_B, False)):
        yield from ((layer, Factor(wrapper.num_experts, is_down)) for layer in layers.values())


def expert_factors(model: nn.Module) -> dict[str, Factor]:
    """All factors of adapters on fused experts, by the names of the parameters that hold them."""
    found = {
        layer.weight: factor
        for module in model.modules()
        if is_wrapper(module) and hasattr(unwrapped(module), "has_post_expert_norm")
        for layer, factor in factors_of(module)
    }
    return {name: found[p] for name, p in model.named_parameters() if p in found}
