"""A gated expert's inner rows, silu(gate)·up, with both halves of the gradient written in place.

Automatic differentiation would form the halves apart and then copy them together, and go through
whole tensors that no cache holds. The numbers are the same.

Shapes: S rows, F inner.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

_ROWS_AT_ONCE = 128
"""On a processor: a megabyte of 2048 numbers each, which a core's cache holds."""


def gated(experts: Any, gate_up: Tensor) -> Tensor:
    """What an experts module makes of its first product, [S, 2F] to [S, F]."""
    own_gate = type(experts)._apply_gate is not _default_apply_gate
    if own_gate or type(experts.act_fn) not in (nn.SiLU, SiLUActivation):
        product: Tensor = experts._apply_gate(gate_up)
    else:
        product = _SiluProduct.apply(gate_up)
    return product


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        product = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        for rows, rows_product in _in_parts(gate_up, product):
            gate, up = rows.chunk(2, 1)
            torch.mul(F.silu(gate), up, out=rows_product)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        total = torch.empty_like(gate_up)
        for rows, rows_gradient, rows_total in _in_parts(gate_up, gradient, total):
            gate, up = rows.chunk(2, 1)
            gate_total, up_total = rows_total.chunk(2, 1)
            torch.mul(rows_gradient, F.silu(gate), out=up_total)
            torch.ops.aten.silu_backward.grad_input(rows_gradient * up, gate, grad_input=gate_total)
        return total


def _in_parts(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    count = _ROWS_AT_ONCE if rows[0].device.type == "cpu" else max(1, len(rows[0]))
    return zip(*(each.split(count) for each in rows), strict=True)
