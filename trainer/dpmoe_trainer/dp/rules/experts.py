"""Experts: linear layers of which each row uses the one that it was routed to.

Rows are computed in (expert, sample) order, so that a sample's rows at an expert are one segment
(`dp.segments`). The fused 3-D weights of most families are reached through the seam that
transformers has for them: this module is the experts implementation `dpmoe`, which every family
whose experts module carries `@use_experts_implementation` can run, gated or not, with or without
biases, weights stored either way round.

Shapes: N tokens, K experts of each, S = N·K rows, E experts, D hidden, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dpmoe_trainer.dp.errors import NotPerSample
from dpmoe_trainer.dp.gating import gated
from dpmoe_trainer.dp.products import multiply_into
from dpmoe_trainer.dp.rules.lora import ExpertAdapter, adapted
from dpmoe_trainer.dp.segments import Segments, squared_norms
from dpmoe_trainer.dp.tape import Kept, Tape
from dpmoe_trainer.dp.uses import Use, wide
from dpmoe_trainer.parallel.dispatch import Journey
from dpmoe_trainer.parallel.shards import shard_of

IMPLEMENTATION = "dpmoe"

Store = Callable[[Tensor], dict[str, Tensor]]
"""Gives a sum over all experts to the parameters that hold it."""


class ExpertWeights(Use):
    """Weights of shape [E, O, I], or [E, I, O] where the family stores them so."""

    def __init__(
        self,
        names: Sequence[str],
        store: Store,
        rows_SI: Tensor,
        segments: Segments,
        inputs_first: bool = False,
        trained_E: Tensor | None = None,
    ) -> None:
        self.names = tuple(names)
        self._store = store
        self._input = Kept(rows_SI)
        self._segments = segments
        self.of_company = segments.of_company
        self._inputs_first = inputs_first
        self._trained_E = trained_E

    def squared_norms(self) -> Tensor:
        """Σ_e ‖G_be‖² over the sample's segments at trained experts."""
        g_SO = self.gradient
        if self._trained_E is not None:
            experts_S = self._segments.expert.repeat_interleave(self._segments.length)
            g_SO = g_SO.masked_fill(~self._trained_E[experts_S, None], 0)
        return squared_norms(self._input.value(), g_SO, self._segments, True, False)

    def clipped_sum(self, factors: Tensor) -> dict[str, Tensor]:
        """One product an expert over its rows; an expert without rows gets zeros."""
        a_SI, g_SO = wide(self._input.value()), wide(self.gradient)
        factors_S1 = factors.to(a_SI.dtype)[self._segments.row_sample, None]
        # Scaling the narrower operand is the cheaper.
        if a_SI.shape[1] < g_SO.shape[1]:
            a_SI = a_SI * factors_S1
        else:
            g_SO = g_SO * factors_S1
        left, right = (a_SI, g_SO) if self._inputs_first else (g_SO, a_SI)
        return self._store(_sums_by_expert(left, right, self._segments.rows_per_expert))


class ExpertBiases(Use):
    """Biases of shape [E, O]."""

    def __init__(self, name: str, segments: Segments) -> None:
        self.names = (name,)
        self._segments = segments
        self.of_company = segments.of_company

    def squared_norms(self) -> Tensor:
        """Σ_e ‖Σ_s g_s‖² over the sample's segments."""
        return squared_norms(self.gradient, self.gradient, self._segments, False, True)

    def clipped_sum(self, factors: Tensor) -> dict[str, Tensor]:
        """One weighted sum an expert over its rows."""
        g_SO = wide(self.gradient)
        factors_S1 = factors.to(g_SO.dtype)[self._segments.row_sample, None]
        total_E1O = _sums_by_expert(factors_S1, g_SO, self._segments.rows_per_expert)
        return {self.names[0]: total_E1O.squeeze(1)}


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
    sample_N = tape.sample_of(hidden_states)
    segments = Segments.of(top_k_index, sample_N, module.num_experts, tape.batch)
    top_k_weights = tape.routed(module, top_k_index, top_k_weights)

    x_SD = hidden_states.index_select(0, segments.token)
    shard = shard_of(module)
    if shard is None:
        y_SD = _through_experts(tape, module, x_SD, segments)
    else:
        journey = Journey.of(segments, shard, tape.company)
        arrived = journey.out(x_SD)
        y_SD = journey.back(_through_experts(tape, module, arrived, journey.segments))

    y_SD = y_SD * top_k_weights.reshape(-1, 1).index_select(0, segments.slot)
    place_S = torch.empty_like(segments.slot)
    place_S[segments.slot] = torch.arange(len(place_S), device=place_S.device)
    y_NKD = y_SD.index_select(0, place_S).view(*top_k_index.shape, -1)
    return y_NKD.sum(1).to(hidden_states.dtype)


def _through_experts(tape: Tape, module: Any, x_SD: Tensor, segments: Segments) -> Tensor:
    """What each row's expert makes of it."""
    if module.has_gate:
        h_SF = gated(module, _fused_linear(tape, module, "gate_up_proj", x_SD, segments))
    else:
        h_SF = module.act_fn(_fused_linear(tape, module, "up_proj", x_SD, segments))
    return _fused_linear(tape, module, "down_proj", h_SF, segments)


def _require_plain(module: Any) -> None:
    name = type(module).__name__
    if module._is_expert_parallel:
        raise NotPerSample(
            f"{name} was sharded over ranks by transformers, which sends no samples with the "
            "tokens: load it whole, and have this package spread its experts"
        )
    if module.has_post_expert_norm:
        raise NotPerSample(f"{name} normalises expert outputs, for which there is no rule")


def _fused_linear(
    tape: Tape, module: nn.Module, kind: str, rows_SI: Tensor, segments: Segments
) -> Tensor:
    """Each expert's linear layer on its rows: parameters `kind` and `kind`_bias of the module."""
    inputs_first = bool(module.is_transposed)
    name, weight = tape.claim(getattr(module, kind), f"experts' {kind}")
    bias_name, bias = tape.claim(getattr(module, f"{kind}_bias", None), f"experts' {kind}")
    assert weight is not None, "experts have weights"
    output_SO = product(rows_SI, weight if inputs_first else weight.transpose(1, 2), segments)
    if name is not None:
        use = ExpertWeights([name], lambda total: {name: total}, rows_SI, segments, inputs_first)
        output_SO = tape.record(output_SO, use)
    for adapter in adapted(module, kind):
        output_SO = output_SO + _low_rank(tape, adapter, rows_SI, segments)
    if bias is not None:
        output_SO = output_SO + bias.index_select(0, segments.expert).repeat_interleave(
            segments.length, 0
        ).to(output_SO.dtype)
        if bias_name is not None:
            output_SO = tape.record(output_SO, ExpertBiases(bias_name, segments))
    return output_SO


def _low_rank(tape: Tape, adapter: ExpertAdapter, rows_SI: Tensor, segments: Segments) -> Tensor:
    """scaling·B_e·(A_e·x) for the rows of each expert e."""
    down_name, down = tape.claim(adapter.down, "an expert adapter")
    up_name, up = tape.claim(adapter.up, "an expert adapter")
    assert down is not None, "an adapter has weights"
    assert up is not None, "an adapter has weights"
    h_SR = product(rows_SI, adapter.downs.by_expert(down).transpose(1, 2), segments)
    if down_name is not None:
        stored = ExpertWeights(
            [down_name], lambda total: {down_name: adapter.downs.as_kept(total)}, rows_SI, segments
        )
        h_SR = tape.record(h_SR, stored)
    output_SO = product(h_SR, adapter.ups.by_expert(up).transpose(1, 2), segments)
    if up_name is not None:
        stored = ExpertWeights(
            [up_name], lambda total: {up_name: adapter.ups.as_kept(total)}, h_SR, segments
        )
        output_SO = tape.record(output_SO, stored)
    return output_SO * adapter.scaling


def product(rows_SI: Tensor, weights_EIO: Tensor | Sequence[Tensor], segments: Segments) -> Tensor:
    """x·W_e for the rows of each expert e, in autocast's type where it is on."""
    device = rows_SI.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows_SI = rows_SI.to(dtype)
        weights_EIO = [weight.to(dtype) for weight in weights_EIO]
    return _ExpertProduct.apply(rows_SI, weights_EIO, segments.rows_per_expert)


class _ExpertProduct(torch.autograd.Function):
    """x·W_e for the rows of each expert e; differentiable in the rows only."""

    @staticmethod
    def forward(
        ctx: Any, x_SI: Tensor, weights_EIO: Tensor | Sequence[Tensor], counts: list[int]
    ) -> Tensor:
        ctx.weights, ctx.counts = weights_EIO, counts
        return _products(x_SI, weights_EIO, counts)

    @staticmethod
    def backward(ctx: Any, gradient_SO: Tensor) -> tuple[Tensor, None, None]:
        weights_EOI = [weight_IO.T for weight_IO in ctx.weights]
        return _products(gradient_SO, weights_EOI, ctx.counts), None, None


def _products(x_SI: Tensor, weights_EIO: Tensor | Sequence[Tensor], counts: list[int]) -> Tensor:
    output = x_SI.new_empty(x_SI.shape[0], weights_EIO[0].shape[1])
    multiply_into(output.split(counts), x_SI.split(counts), list(weights_EIO))
    return output


def _sums_by_expert(left: Tensor, right: Tensor, counts: list[int]) -> Tensor:
    """leftᵀ·right over each expert's rows, [E, …, …]."""
    total = left.new_empty(len(counts), left.shape[1], right.shape[1])
    multiply_into(list(total), [left_e.T for left_e in left.split(counts)], right.split(counts))
    return total


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
