"""Linear layers: y = W·x + b, and so routers and heads.

A sample's weight gradient is G_b = Σ_t g_t·x_tᵀ over its tokens. Its squared norm is either formed
from G_b itself, or without it as Σ_{t,t'} (x_t·x_t')(g_t·g_t') (ghost norm: Goodfellow 2015, arXiv
1510.01799; Li et al. 2022, arXiv 2110.05679), whichever costs less.

Shapes: B samples, T rows of each, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpmoe_trainer.dp import kernels
from dpmoe_trainer.dp.ghost import squared_norms_of_pairs
from dpmoe_trainer.dp.products import multiply, multiply_into
from dpmoe_trainer.dp.tape import Kept, Tape
from dpmoe_trainer.dp.uses import Factors, Formed, Use, weighted_sum, wide


class LinearWeight(Use):
    """W_OI, book-kept: inputs and output gradients wait until the clip factors are known."""

    def __init__(self, tape: Tape, name: str, rows: Tensor) -> None:
        self.names = (name,)
        self._tape = tape
        self._input = Kept(rows)
        tape.by_sample(rows)  # Refused in the forward pass, where the layer is on the stack.
        self._per_sample_BOI: Tensor | None = None

    def squared_norms(self) -> Tensor:
        """Ghost norm, or the norm of the formed gradients where those are the smaller."""
        x_BTI, g_BTO = self._rows()
        rows, inputs, outputs = x_BTI.shape[1], x_BTI.shape[2], g_BTO.shape[2]
        if rows * (inputs + outputs) < inputs * outputs:
            if kernels.usable(wide(x_BTI), wide(g_BTO)):
                return kernels.squared_norms_of_samples(wide(x_BTI), wide(g_BTO))
            pairs_BTT = wide(g_BTO) @ wide(g_BTO).transpose(1, 2)
            pairs_BTT *= self._tape.gram(x_BTI)
            return squared_norms_of_pairs(pairs_BTT)
        self._per_sample_BOI = wide(g_BTO).transpose(1, 2) @ wide(x_BTI)
        del self.gradient
        return self._per_sample_BOI.pow(2).sum((1, 2))

    def clipped_sum(self, factors: Tensor) -> dict[str, Tensor]:
        """One product over all rows, the narrower operand's scaled by their sample's factor."""
        name = self.names[0]
        if self._per_sample_BOI is not None:
            return {name: weighted_sum(factors, self._per_sample_BOI)}
        x_BTI, g_BTO = self._rows()
        x_BTI, g_BTO = wide(x_BTI), wide(g_BTO)
        factors_B11 = factors.to(x_BTI.dtype)[:, None, None]
        if x_BTI.shape[2] < g_BTO.shape[2]:
            x_BTI = x_BTI * factors_B11
        else:
            g_BTO = g_BTO * factors_B11
        return {name: multiply(g_BTO.flatten(0, 1).T, x_BTI.flatten(0, 1))}

    def factors(self) -> Factors:
        """Output gradients and inputs."""
        x_BTI, g_BTO = self._rows()
        return Factors(wide(g_BTO), wide(x_BTI))

    def _rows(self) -> tuple[Tensor, Tensor]:
        return self._tape.by_sample(self._input.value()), self._tape.by_sample(self.gradient)


class Bias(Formed):
    """A parameter that is added to every row: a sample's gradient is the sum of its rows'."""

    def __init__(self, tape: Tape, name: str) -> None:
        super().__init__(name)
        self._tape = tape

    def form(self) -> Tensor:
        """Σ_t g_t, [B, O]."""
        return wide(self._tape.by_sample(self.gradient)).sum(1)


def linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Stands for `torch.nn.functional.linear`."""
    weight_name, weight_value = tape.claim(weight, "linear")
    bias_name, bias_value = tape.claim(bias, "linear")
    assert weight_value is not None, "a linear layer has a weight"
    output = _linear(input, weight_value, bias_value)
    if weight_name is not None:
        output = tape.record(output, LinearWeight(tape, weight_name, input))
    if bias_name is not None:
        output = tape.record(output, Bias(tape, bias_name))
    return output


def _linear(x: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
    # Under autocast the types are torch's to choose.
    if torch.is_autocast_enabled(x.device.type) or not kernels.multiplies(x, weight_OI):
        return F.linear(x, weight_OI, bias)
    output: Tensor = _Product.apply(x, weight_OI)
    return output if bias is None else output + bias


class _Product(torch.autograd.Function):
    """x·Wᵀ over the last dimension; differentiable in x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.weight = weight_OI
        return _by_rows(x, weight_OI.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _by_rows(gradient, ctx.weight), None


def _by_rows(x: Tensor, matrix_IO: Tensor) -> Tensor:
    output = x.new_empty(*x.shape[:-1], matrix_IO.shape[1])
    flat = output.view(-1, output.shape[-1])
    multiply_into([flat], [x.reshape(-1, x.shape[-1])], [matrix_IO])
    return output
