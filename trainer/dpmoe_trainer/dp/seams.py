"""Parts of a model that the engine computes itself while it clips, and gives back afterwards.

Most of a model runs its own code, watched. Three kinds of module lose track of samples or of the
weights in a way that no watch can follow, and are computed by the engine: experts, LoRA on experts,
and layers under gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts,
)

from dpmoe_trainer.dp.checkpointing import own_checkpointing
from dpmoe_trainer.dp.rules.experts import IMPLEMENTATION
from dpmoe_trainer.dp.rules.lora import own_adapters
from dpmoe_trainer.dp.rules.switch import switch_forward
from dpmoe_trainer.dp.tape import Tape
from dpmoe_trainer.models.expert_adapters import is_wrapper


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def own_parts(model: nn.Module, tape: Tape) -> Iterator[None]:
    """Has the engine compute experts, their adapters and checkpointed layers."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, SwitchTransformersExperts):
                stack.enter_context(_own_forward(module, partial(switch_forward, module)))
            elif is_wrapper(module):
                stack.enter_context(own_adapters(module))
        stack.enter_context(_own_experts(model))
        stack.enter_context(own_checkpointing(model, tape))
        yield


@contextmanager
def _own_forward(module: Any, forward: Callable[..., Tensor]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _own_experts(model: nn.Module) -> Iterator[None]:
    """Has the model's fused experts run `dp.rules.experts`, and then what they ran before."""
    # One attribute that transformers' decorator for experts modules sets, and nothing else has.
    experts: list[Any] = [m for m in model.modules() if hasattr(m, "has_post_expert_norm")]
    before = [(module.config, module.config._experts_implementation) for module in experts]
    try:
        for config, _ in before:
            config._experts_implementation = IMPLEMENTATION
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation
