"""Gradient checkpointing: a layer is computed again in the backward pass, rather than kept.

Book-keeping holds every trained layer's input and output gradient until all norms are known, which
would undo what checkpointing saves. So a checkpointed layer keeps its own input and output gradient
only. It is computed again for its norms, and, when the clip factors are known, once more for its
clipped sums.

The gradient that is clipped must be the one whose norm was taken. A router that breaks a near-tie
another way the second time would send a token elsewhere. So what the layer chose the first time
(top-k, argmax) is chosen again, and its random numbers are drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.modeling_layers import GradientCheckpointingLayer

from dpmoe_trainer.dp.rules import RULES
from dpmoe_trainer.dp.tape import Kept, Tape
from dpmoe_trainer.dp.uses import ClipFactors, Clippable, Use, add_sums
from dpmoe_trainer.dp.watch import watching
from dpmoe_trainer.parallel.dense import gathered


@contextmanager
def own_checkpointing(model: nn.Module, tape: Tape) -> Iterator[None]:
    """Has the layers for which the model has checkpointing on checkpointed by the engine."""
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
    ]
    before = [getattr(layer, "_gradient_checkpointing_func", None) for layer in layers]
    try:
        for layer in layers:
            layer._gradient_checkpointing_func = partial(_checkpointed, tape, layer)
            # transformers checkpoints in training mode only. This is the layer's own flag: its
            # parts stay in evaluation mode, and so does the layer while it computes.
            layer.training = True
        yield
    finally:
        for layer, function in zip(layers, before, strict=True):
            layer._gradient_checkpointing_func = function
            layer.training = False


def _checkpointed(tape: Tape, layer: nn.Module, run: partial[Any], *args: Any) -> Any:
    """Computes a layer as transformers calls it, and has it computed again in the backward pass."""
    given, structure = tree_flatten(((*run.args, *args), run.keywords))
    given = [_of_every_sample(tape, leaf) for leaf in given]
    places = [place for place, leaf in enumerate(given) if _is_differentiable(leaf)]

    def compute(*inputs: Tensor) -> Any:
        leaves = list(given)
        for place, value in zip(places, inputs, strict=True):
            leaves[place] = value
        arguments, keywords = tree_unflatten(leaves, structure)
        layer.training = False
        try:
            outputs, form = tree_flatten(run.func(*arguments, **keywords))
        finally:
            layer.training = True
        recomputed.form = form
        return tuple(_of_every_sample(Tape.active(), output) for output in outputs)

    recomputed = Recomputed(tape, layer, compute)
    # Without an input that needs a gradient, autograd would not ask for any.
    anchor = torch.ones((), requires_grad=True)
    inputs = [given[place] for place in places]
    for place in places:
        given[place] = None
    outputs = _Recompute.apply(recomputed, anchor, *inputs)
    return tree_unflatten(list(outputs), recomputed.form)


def _of_every_sample(tape: Tape, leaf: Any) -> Any:
    """A value that all samples share enters and leaves a layer as the samples' copies."""
    shared = tape.shared(leaf)
    return leaf if shared is None else shared.batched()


def _of_its_own(output: Any) -> Any:
    """The same numbers, but no view: a view that is changed in place loses the hooks on it."""
    if isinstance(output, Tensor) and output._is_view():
        return torch.ops.aten._unsafe_view(output, output.shape)
    return output


def _is_differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


class Recomputed(Clippable):
    """A checkpointed layer: its inputs, its outputs' gradients, and how to compute it again."""

    form: Any

    def __init__(
        self, tape: Tape, layer: nn.Module, compute: Callable[..., tuple[Any, ...]]
    ) -> None:
        self._tape = tape
        self._layer = layer
        self._compute = compute
        self._choices: list[Tensor] = []
        self._inputs: list[Kept] = []
        self._gradients: tuple[Tensor | None, ...] = ()

    def first(self, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Computes the layer, keeping only what it takes to do so again."""
        self._inputs = [Kept(value) for value in inputs]
        device = self._tape.device
        self._autocast = _autocast_of(device)
        self._random = _random_state(device)
        with _Choices(self._choices, repeat=False):
            outputs = self._compute(*(value.detach() for value in inputs))
        return tuple(_of_its_own(output) for output in outputs)

    def add_norms(self, gradients: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """Takes the outputs' gradients, adds the layer's norms; returns the inputs' gradients."""
        self._gradients = gradients
        self._tape.fired.append(self)
        names: set[str] = set()

        def receive(use: Use) -> None:
            names.update(use.names)
            self._tape.add_norms(use)

        inputs = self._again(receive)
        self.names = tuple(names)
        return inputs

    def clipped(self, factors: ClipFactors) -> dict[str, Tensor]:
        """The sums of all uses in the layer."""
        total: dict[str, Tensor] = {}

        def receive(use: Use) -> None:
            add_sums(total, use.clipped(factors))

        with gathered(self._layer):
            self._again(receive)
        return total

    def _again(self, receive: Callable[[Use], None]) -> list[Tensor | None]:
        inputs = [kept.value().detach().requires_grad_() for kept in self._inputs]
        tape = self._tape.replay(receive)
        with _random_again(self._random, self._tape.device):
            with (
                torch.enable_grad(),
                torch.autocast(**self._autocast),
                watching(tape, RULES),
                _Choices(list(self._choices), repeat=True),
            ):
                outputs = self._compute(*inputs)
            reached = [
                (output, gradient)
                for output, gradient in zip(outputs, self._gradients, strict=True)
                if gradient is not None and _is_differentiable(output)
            ]
            if reached:
                torch.autograd.backward([o for o, _ in reached], [g for _, g in reached])
        return [value.grad for value in inputs]


class _Recompute(torch.autograd.Function):
    """A layer's outputs; their gradients' way back is the layer's, computed again."""

    @staticmethod
    def forward(ctx: Any, layer: Recomputed, anchor: Tensor, *inputs: Tensor) -> tuple[Any, ...]:
        ctx.layer = layer
        ctx.set_materialize_grads(False)
        return layer.first(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.layer.add_norms(gradients))


class _Choices(TorchFunctionMode):
    """Notes which entries a layer chooses by their size, or has it choose the noted ones again."""

    def __init__(self, noted: list[Tensor], repeat: bool) -> None:
        super().__init__()
        self._noted = noted
        self._repeat = repeat

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _TOP_K:
            return self._top_k(function, *args, **kwargs)
        if function in _ARGMAX and not self._repeat:
            self._noted.append(function(*args, **kwargs))
            return self._noted[-1]
        if function in _ARGMAX:
            return self._noted.pop(0)
        return function(*args, **kwargs)

    def _top_k(self, function: Any, input: Tensor, k: int, dim: int = -1, **options: Any) -> Any:
        if self._repeat:
            indices = self._noted.pop(0)
            return torch.return_types.topk((input.gather(dim, indices), indices))
        found = function(input, k, dim, **options)
        self._noted.append(found.indices)
        return found


_TOP_K = {torch.topk, torch.Tensor.topk}
_ARGMAX = {torch.argmax, torch.Tensor.argmax}


def _autocast_of(device: torch.device) -> dict[str, Any]:
    """What it takes to have the same autocast again."""
    return {
        "device_type": device.type,
        "dtype": torch.get_autocast_dtype(device.type),
        "enabled": torch.is_autocast_enabled(device.type),
    }


_Random = tuple[Tensor, Tensor | None]
"""The states of the random generators: the CPU's, and the device's if that is another."""


def _random_state(device: torch.device) -> _Random:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


@contextmanager
def _random_again(state: _Random, device: torch.device) -> Iterator[None]:
    on_cpu, on_device = state
    with torch.random.fork_rng([] if on_device is None else [device]):
        torch.set_rng_state(on_cpu)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)
        yield
