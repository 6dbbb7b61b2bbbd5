"""A gate with its gradient written in place is transformers' own."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from dpmoe_trainer.dp.gating import gated


class _Experts:
    _apply_gate = _default_apply_gate
    act_fn = nn.SiLU()


class _OtherExperts(_Experts):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return gate_up.chunk(2, -1)[1]


def _with_gradient(gate: Any, gate_up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    product = gate(gate_up)
    return product, torch.autograd.grad(product, gate_up, gradient)[0]


def test_the_gate_and_its_gradient_are_those_of_transformers() -> None:
    experts = _Experts()
    for rows in (0, 1, 128, 300):
        gate_up = torch.randn(rows, 14, dtype=torch.float64, requires_grad=True)
        gradient = torch.randn(rows, 7, dtype=torch.float64)
        ours = _with_gradient(lambda x: gated(experts, x), gate_up, gradient)
        theirs = _with_gradient(lambda x: _default_apply_gate(experts, x), gate_up, gradient)
        assert "SiluProduct" in type(ours[0].grad_fn).__name__
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_another_gate_or_activation_stays_the_model_s_own() -> None:
    gate_up = torch.randn(3, 4, requires_grad=True)
    assert torch.equal(gated(_OtherExperts(), gate_up), gate_up[:, 2:])
    tanh = type("Tanh", (_Experts,), {"act_fn": nn.Tanh()})()
    assert torch.equal(gated(tanh, gate_up), gate_up[:, :2].tanh() * gate_up[:, 2:])
