"""Switch Transformers' experts: one small network each, of which a token uses one or none.

A token that came after its expert was full is dropped: no expert computes it. transformers counts
an expert's places by sequence, so what is dropped depends on the sample alone; `check_model` makes
sure of that, with a single place at each expert.

Shapes: N tokens, S of them with an expert, E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpmoe_trainer.dp.rules.experts import ExpertWeights, product
from dpmoe_trainer.dp.rules.lora import adapters_by_layer, is_linear_wrapper
from dpmoe_trainer.dp.segments import Segments
from dpmoe_trainer.dp.tape import Tape


def switch_forward(
    module: Any, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor
) -> Tensor:
    """What Switch Transformers' experts run while a tape watches.

    Args:
        module: The experts, a dictionary of networks with weights `wi` and `wo`.
        hidden_states: [N, D] tokens, sample-major.
        selected_experts: [N, 1, E] one at a token's expert, all zero if it was dropped.
        routing_weights: [N, 1] weights of the chosen experts.

    Returns:
        [N, D], zero for a dropped token.
    """
    tape = Tape.active()
    sample_N = tape.sample_of(hidden_states)
    chosen_NE = selected_experts.squeeze(1)
    routing_weights = tape.routed(module, chosen_NE, routing_weights)
    token_S, expert_S = chosen_NE.nonzero(as_tuple=True)
    segments = Segments.of(expert_S[:, None], sample_N[token_S], chosen_NE.shape[1], tape.batch)

    sorted_S = token_S[segments.token]
    experts = list(module.values())
    x_SD = hidden_states.index_select(0, sorted_S)
    h_SF = experts[0].act(_adapted(tape, [expert.wi for expert in experts], x_SD, segments))
    y_SD = _adapted(tape, [expert.wo for expert in experts], h_SF, segments)
    y_SD = y_SD * routing_weights.index_select(0, sorted_S)
    return torch.zeros_like(hidden_states).index_add(0, sorted_S, y_SD.to(hidden_states.dtype))


def _adapted(tape: Tape, layers: Sequence[Any], rows_SI: Tensor, segments: Segments) -> Tensor:
    """Each expert's linear layer on its rows, with what peft added to it."""
    base = [layer.base_layer if is_linear_wrapper(layer) else layer for layer in layers]
    output_SO = _linear(tape, [layer.weight for layer in base], rows_SI, segments)
    for downs, ups, scaling in adapters_by_layer(layers):
        h_SR = _linear(tape, downs, rows_SI, segments)
        output_SO = output_SO + scaling * _linear(tape, ups, h_SR, segments)
    return output_SO


def _linear(tape: Tape, weights: Sequence[Tensor], rows_SI: Tensor, segments: Segments) -> Tensor:
    """Each expert's linear layer on its rows."""
    claimed = [tape.claim(weight, "an expert") for weight in weights]
    names = [name for name, _ in claimed]
    output_SO = product(rows_SI, [value.T for _, value in claimed if value is not None], segments)
    trained = [name for name in names if name is not None]
    if not trained:
        return output_SO

    def store(total_EOI: Tensor) -> dict[str, Tensor]:
        parts = zip(names, total_EOI, strict=True)
        return {name: total_OI for name, total_OI in parts if name is not None}

    trained_E = torch.tensor([name is not None for name in names], device=rows_SI.device)
    use = ExpertWeights(trained, store, rows_SI, segments, trained_E=trained_E)
    return tape.record(output_SO, use)
