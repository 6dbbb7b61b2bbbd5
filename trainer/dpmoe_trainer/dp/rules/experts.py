"""Fused experts: the 3-D weights that one routed layer keeps for all its experts.

Registered with transformers as the experts implementation `dpmoe`, which every model family whose
experts module carries `@use_experts_implementation` can run: gated or not, with or without biases,
weights stored either way round. Rows are computed in (expert, sample) order, so that a sample's
rows at an expert are one segment (`dp.segments`).

Shapes: N tokens, K experts of each, S = N·K rows, E experts, D hidden, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dpmoe_trainer.dp.errors import NotPerSample
from dpmoe_trainer.dp.segments import Segments, squared_norms
from dpmoe_trainer.dp.tape import Kept, Tape, Use, wide

IMPLEMENTATION = "dpmoe"


class ExpertLayer(Use):
    """W of shape [E, O, I] (or [E, I, O], where the family stores it so), and b of shape [E, O].

    A frozen one of the two has no name here.
    """

    def __init__(
        self,
        weight_name: str | None,
        bias_name: str | None,
        rows_SI: Tensor,
        segments: Segments,
        inputs_first: bool,
    ) -> None:
        self._weight_name = weight_name
        self._bias_name = bias_name
        self._input = Kept(rows_SI)
        self._segments = segments
        self._inputs_first = inputs_first

    def squared_norms(self, gradient: Tensor) -> Tensor:
        """Σ_e ‖G_be‖² over the sample's segments."""
        self._g_SO = gradient
        weights, biases = self._weight_name is not None, self._bias_name is not None
        return squared_norms(self._input.value(), gradient, self._segments, weights, biases)

    def clipped_sum(self, factors: Tensor) -> dict[str, Tensor]:
        """One product an expert over its rows; an expert without rows gets zeros."""
        a_SI, g_SO = wide(self._input.value()), wide(self._g_SO)
        factors_S = factors.to(a_SI.dtype)[self._segments.row_sample]
        formed = {}
        if self._bias_name is not None:
            formed[self._bias_name] = self._by_expert(factors_S[:, None], g_SO).squeeze(1)
        if self._weight_name is not None:
            # Scaling the narrower operand is the cheaper.
            if a_SI.shape[1] < g_SO.shape[1]:
                a_SI = a_SI * factors_S[:, None]
            else:
                g_SO = g_SO * factors_S[:, None]
            left, right = (a_SI, g_SO) if self._inputs_first else (g_SO, a_SI)
            formed[self._weight_name] = self._by_expert(left, right)
        return formed

    def _by_expert(self, left: Tensor, right: Tensor) -> Tensor:
        """leftᵀ·right over each expert's rows, [E, …, …]."""
        counts = self._segments.rows_per_expert
        total = left.new_empty(len(counts), left.shape[1], right.shape[1])
        parts = zip(left.split(counts), right.split(counts), total, strict=True)
        for left_e, right_e, total_e in parts:
            torch.mm(left_e.T, right_e, out=total_e)
        return total


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What an experts module runs while a tape watches.

    Args:
        module: The experts module, with transformers' attributes of such modules.
        hidden_states: [N, D] tokens, sample-major.
        top_k_index: [N, K] experts of each token.
        top_k_weights: [N, K] their weights.

    Returns:
        [N, D].

    Raises:
        NotPerSample: The module is sharded by expert, normalises expert outputs, or its tokens are
            not the batch's B·T.
    """
    tape = Tape.active()
    _require_plain(module)
    if len(hidden_states) != tape.batch * tape.length:
        raise NotPerSample(
            "an experts layer got other tokens than the batch's B·T, so a token's sample is unknown"
        )
    sample_N = torch.arange(tape.batch, device=hidden_states.device).repeat_interleave(tape.length)
    segments = Segments.of(top_k_index, sample_N, module.num_experts, tape.batch)

    x_SD = hidden_states.index_select(0, segments.token)
    if module.has_gate:
        h_SF = module._apply_gate(_expert_linear(tape, module, "gate_up_proj", x_SD, segments))
    else:
        h_SF = module.act_fn(_expert_linear(tape, module, "up_proj", x_SD, segments))
    y_SD = _expert_linear(tape, module, "down_proj", h_SF, segments)

    y_SD = y_SD * top_k_weights.reshape(-1, 1).index_select(0, segments.slot)
    place_S = torch.empty_like(segments.slot)
    place_S[segments.slot] = torch.arange(len(place_S), device=place_S.device)
    y_NKD = y_SD.index_select(0, place_S).view(*top_k_index.shape, -1)
    return y_NKD.sum(1).to(hidden_states.dtype)


def _require_plain(module: Any) -> None:
    name = type(module).__name__
    if module._is_expert_parallel:
        raise NotPerSample(f"{name} is sharded over ranks: run the engine on a whole layer")
    if module.has_post_expert_norm:
        raise NotPerSample(f"{name} normalises expert outputs, for which there is no rule")


def _expert_linear(
    tape: Tape, module: nn.Module, kind: str, rows_SI: Tensor, segments: Segments
) -> Tensor:
    """Each expert's linear layer on its rows: parameters `kind` and `kind`_bias of the module."""
    use = f"experts' {kind}"
    weight_name, weight = tape.claim(getattr(module, kind), use)
    bias_name, bias = tape.claim(getattr(module, f"{kind}_bias", None), use)
    assert weight is not None, "experts have weights"
    inputs_first = bool(module.is_transposed)
    output_SO = _ExpertProduct.apply(
        rows_SI, weight if inputs_first else weight.transpose(1, 2), segments.rows_per_expert
    )
    if bias is not None:
        output_SO = output_SO + bias.index_select(0, segments.expert).repeat_interleave(
            segments.length, 0
        )
    if weight_name is None and bias_name is None:
        return output_SO
    layer = ExpertLayer(weight_name, bias_name, rows_SI, segments, inputs_first)
    return tape.record(output_SO, layer)


class _ExpertProduct(torch.autograd.Function):
    """x·W_e for the rows of each expert e; differentiable in the rows only."""

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, weight_EIO: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(weight_EIO)
        ctx.counts = counts
        return _products(x_SI, weight_EIO, counts)

    @staticmethod
    def backward(ctx: Any, gradient_SO: Tensor) -> tuple[Tensor, None, None]:
        (weight_EIO,) = ctx.saved_tensors
        return _products(gradient_SO, weight_EIO.transpose(1, 2), ctx.counts), None, None


def _products(x_SI: Tensor, weight_EIO: Tensor, counts: list[int]) -> Tensor:
    output = x_SI.new_empty(x_SI.shape[0], weight_EIO.shape[2])
    for x_e, weight_e, output_e in zip(
        x_SI.split(counts), weight_EIO, output.split(counts), strict=True
    ):
        torch.mm(x_e, weight_e, out=output_e)
    return output


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
