"""Per-sample clipping in one forward and one backward pass.

The backward pass forms activation gradients only; on its way each trained layer adds its part of
every sample's squared gradient norm. Then the clip factors c_b = min(1, C/‖∇ℓ_b‖) are known, and
every weight gradient is formed once, from rows scaled by their sample's factor. No second backward
pass, and no per-sample gradients in memory beyond the size of the activations.

What holds:

- A sample's contribution is c_b·∇ℓ_b of its own loss, whatever else is in the batch, so adding or
  removing a sample changes the sum by at most C.
- A sample whose gradient norm is not finite contributes exactly zero: it is left out, and the rest
  of the batch computed without it.
- All of a parameter's gradient is in the norm, or `clipped_sum` raises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpmoe_trainer.dp.errors import NotPerSample, UncoveredParameter
from dpmoe_trainer.dp.losses import per_sample_losses
from dpmoe_trainer.dp.refusals import refuse_coupled
from dpmoe_trainer.dp.rules import RULES
from dpmoe_trainer.dp.rules.experts import IMPLEMENTATION
from dpmoe_trainer.dp.tape import Tape, wide

_INPUTS = ("input_ids", "hidden_states")
"""Where a batch carries its tokens: as ids, or as a frozen lower part's outputs."""


def clipped_sum(
    model: nn.Module, batch: Mapping[str, Tensor], clipping_norm: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Sums the clipped per-sample gradients of a batch.

    The model runs in evaluation mode, so without dropout or router jitter, and is left as it was;
    no parameter's `.grad` is touched.

    Args:
        model: A transformers model for sequence classification or causal language modelling.
            Parameters that require no gradient are frozen.
        batch: `input_ids` [B, T] (or `hidden_states` [B, T, D], where the model continues from
            these), `labels`, and what else the model's forward takes, B rows each. B may be 0.
        clipping_norm: C, the bound on one sample's gradient norm.

    Returns:
        Σ_b min(1, C/‖∇ℓ_b‖)·∇ℓ_b by parameter name for every trained parameter, in at least
        float32; and the norms ‖∇ℓ_b‖, [B] float64, infinite for a sample that was left out. The
        norms are private.

    Raises:
        NotPerSample: The model, its loss or the batch couples samples, or is not supported.
        UncoveredParameter: A trained parameter is not used, is used twice, or is used where there
            is no per-sample norm. Names the parameter.
        ValueError: The clipping norm is not a positive number.
    """
    if not clipping_norm > 0:
        raise ValueError(f"clipping_norm is {clipping_norm}: give a positive number")
    refuse_coupled(model)
    samples, length, device = _measure(batch)
    trained = _trained(model)
    if samples == 0:
        zeros = {name: _zeros(parameter) for name, parameter in trained.items()}
        return zeros, torch.zeros(0, dtype=torch.float64, device=device)

    tape = Tape(trained, samples, length, device)
    with evaluating(model), _own_experts(model), tape.guarding():
        with torch.enable_grad(), tape.watching(RULES):
            losses = _losses(model, batch)
        _require_all_used(tape)
        losses.sum().backward()
    norms = tape.squared_norms.clamp_min(0).sqrt()

    finite = norms.isfinite()
    if not finite.all():
        tape.fired.clear()
        kept = {key: value[finite] for key, value in batch.items()}
        sums, kept_norms = clipped_sum(model, kept, clipping_norm)
        norms = torch.full_like(norms, torch.inf).masked_scatter(finite, kept_norms)
        return sums, norms

    factors = (clipping_norm / norms).clamp_max(1)
    return _book_kept(trained, tape, factors), norms


@torch.no_grad()
def _book_kept(trained: dict[str, nn.Parameter], tape: Tape, factors: Tensor) -> dict[str, Tensor]:
    """Forms each weight gradient once, dropping what it is formed from on the way."""
    formed: dict[str, Tensor] = {}
    while tape.fired:
        formed.update(tape.fired.pop().clipped_sum(factors))
    # A use whose output did not reach the loss received no gradient: its parameters' is zero.
    return {
        name: formed[name] if name in formed else _zeros(parameter)
        for name, parameter in trained.items()
    }


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise NotPerSample("no parameter of the model requires a gradient: select what to train")
    return trained


def _zeros(parameter: nn.Parameter) -> Tensor:
    return wide(torch.zeros_like(parameter, requires_grad=False))


def _measure(batch: Mapping[str, Tensor]) -> tuple[int, int, torch.device]:
    """The batch's samples, their padded length, and its device."""
    key = next((key for key in _INPUTS if key in batch), None)
    if key is None or "labels" not in batch:
        raise NotPerSample(
            f"the batch has {sorted(batch)}: it needs labels and one of {', '.join(_INPUTS)}"
        )
    samples, length = batch[key].shape[:2]
    for other, value in batch.items():
        if value.shape[0] != samples:
            raise NotPerSample(
                f"the batch's {other} has not as many rows as its {key}: give every entry one row "
                "a sample"
            )
    return samples, length, batch[key].device


def _losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
    if getattr(model.config, "use_cache", False):
        inputs["use_cache"] = False
    return per_sample_losses(model, model(**inputs).logits, batch["labels"])


def _require_all_used(tape: Tape) -> None:
    unused = tape.unclaimed()
    if unused:
        raise UncoveredParameter(
            f"trained parameter {unused[0]!r} is not used in the model's forward pass (in all "
            f"{len(unused)} are not): freeze it"
        )


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
def _own_experts(model: nn.Module) -> Iterator[None]:
    """Has the model's experts run `dp.rules.experts`, and then what they ran before."""
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
