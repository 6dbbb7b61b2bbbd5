"""Per-sample clipping in one forward and one backward pass.

The backward pass forms activation gradients only; on its way each trained layer adds its part of
every sample's squared gradient norm. Then the clip factors c_b = min(1, C/‖∇ℓ_b‖) are known, and
every weight gradient is formed once, from rows scaled by their sample's factor. No second backward
pass, and no per-sample gradients in memory beyond the size of the activations.

What holds:

- A sample's contribution is c_b·∇ℓ_b of its own loss, whatever else is in the batch, so adding or
  removing a sample changes the sum by at most C. (Other ways of clipping: `dp.clipping`.)
- A sample whose gradient norm is not finite contributes exactly zero: it is left out, and the rest
  of the batch computed without it.
- All of a parameter's gradient is in the norm, or `clipped_sum` raises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GenericForSequenceClassification

from dpmoe_trainer.dp.clipping import FLAT, Clipping, Groups, clip_factors
from dpmoe_trainer.dp.errors import AmbiguousBatch, NotPerSample, UncoveredParameter
from dpmoe_trainer.dp.losses import per_sample_losses
from dpmoe_trainer.dp.refusals import refuse_coupled, refusing_changed_buffers
from dpmoe_trainer.dp.routes import BalancingLoss, LoadQuery, Routes
from dpmoe_trainer.dp.rules import RULES
from dpmoe_trainer.dp.seams import evaluating, own_parts
from dpmoe_trainer.dp.tape import Tape
from dpmoe_trainer.dp.uses import ClipFactors, add_sums, wide
from dpmoe_trainer.dp.watch import watching
from dpmoe_trainer.parallel.company import Company
from dpmoe_trainer.parallel.dense import DenseShard, dense_shards, let_go, trained_wholes
from dpmoe_trainer.parallel.shards import model_shard
from dpmoe_trainer.parallel.stand_in import stand_ins, with_stand_ins

_INPUTS = ("input_ids", "hidden_states")
"""Where a batch carries its tokens: as ids, or as a frozen lower part's outputs."""

Batch = Mapping[str, Tensor]
Clipped = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class Options:
    """What of a batch is summed; `clipped_sum` says what each is."""

    clipping_norm: float
    clipping: Clipping = FLAT
    loads: LoadQuery | None = None
    balancing: BalancingLoss | None = None


class Measured(NamedTuple):
    """A batch's clipped sums by name, its samples' gradient norms, [B], and their losses, [B]."""

    sums: dict[str, Tensor]
    norms: Tensor
    losses: Tensor


def clipped_sum(
    model: nn.Module,
    batch: Batch,
    clipping_norm: float,
    *,
    clipping: Clipping = FLAT,
    loads: LoadQuery | None = None,
    balancing: BalancingLoss | None = None,
) -> Clipped:
    """Sums the clipped per-sample gradients of a batch.

    The model runs in evaluation mode, so without dropout or router jitter, and is left as it was;
    no parameter's `.grad` is touched. It may run under `torch.autocast`, and with its gradient
    checkpointing on; norms and sums are in float32 at least all the same.

    Args:
        model: A transformers model for sequence classification, for causal language modelling, or
            with encoder and decoder. Parameters that require no gradient are frozen.
        batch: `input_ids` [B, T] (or `hidden_states` [B, T, D], where the model continues from
            these), `labels`, and what else the model's forward takes, B rows each. B may be 0.
        clipping_norm: C, the bound on one sample's gradient norm.
        clipping: How gradients are brought to C: flat, per group of parameters, or automatic.
        loads: Sums the samples' expert loads too, for a joint release with the gradients. They
            stand among the sums, as `load` of their experts module, and come on top of C.
        balancing: A balancing loss that is part of each sample's own loss.

    Returns:
        Σ_b min(1, C/‖∇ℓ_b‖)·∇ℓ_b by parameter name for every trained parameter, in at least
        float32; and the norms ‖∇ℓ_b‖, [B] float64, infinite for a sample that was left out. The
        norms are private.

    Raises:
        NotPerSample: The model, its loss or the batch couples samples, or is not supported.
        UncoveredParameter: A trained parameter is not used, or is used where there is no per-sample
            norm. Names the parameter.
        ValueError: The clipping norm is not a positive number.
    """
    options = Options(clipping_norm, clipping, loads, balancing)
    measured = measure(model, batch, options)
    return measured.sums, measured.norms


def measure(model: nn.Module, batch: Batch, options: Options) -> Measured:
    """`clipped_sum` with the samples' losses besides, which are as private as their norms."""
    if not options.clipping_norm > 0:
        raise ValueError(f"clipping_norm is {options.clipping_norm}: give a positive number")
    refuse_coupled(model)
    samples, device = _size(batch)
    trained = _trained(model)
    if in_lockstep(model):
        return _clip_together(model, trained, batch, options)
    if samples == 0:
        return _nothing(model, trained, options, device)
    if samples > 1 and _takes_one_sample(model):
        return _in_halves(model, batch, options)
    try:
        measured = _clip(model, trained, batch, options)
    except AmbiguousBatch:
        return _in_halves(model, batch, options)
    finite = measured.norms.isfinite()
    if finite.all():
        return measured
    rest = measure(model, {key: value[finite] for key, value in batch.items()}, options)
    norms = torch.full_like(measured.norms, torch.inf).masked_scatter(finite, rest.norms)
    return Measured(rest.sums, norms, measured.losses)


def in_lockstep(model: nn.Module) -> bool:
    """Whether ranks share the model, so that they must go through it together, samples or none."""
    return model_shard(model) is not None or bool(dense_shards(model))


@torch.no_grad()
def predict(model: nn.Module, batch: Batch) -> Tensor:
    """A model's outputs for a batch, also where ranks share it.

    Args:
        model: As `clipped_sum` takes it.
        batch: Likewise; of labels, only what a decoder reads is used. Ranks that share the model
            all come here together, also with a batch of no rows.

    Returns:
        The logits, [B, …].
    """
    inputs = _with_decoder_inputs(model, batch)
    del inputs["labels"]
    with evaluating(model):
        if not in_lockstep(model):
            return model(**inputs).logits
        rows, _ = _size(batch)
        more = int(rows == 0)
        company = _company(model, batch, more)
        inputs = with_stand_ins(inputs, more)
        tape = Tape({}, list(inputs.values()), Groups({}, (1.0,)), company)
        with own_parts(model, tape), tape.running():
            logits = model(**inputs).logits[:rows]
        let_go(model)
        return logits


def _company(model: nn.Module, batch: Batch, more: int) -> Company:
    """The ranks that share the experts; all ranks, where only what is no expert is shared."""
    rows, device = _size(batch)
    shard, dense = model_shard(model), dense_shards(model)
    place, group = (
        (shard.place, shard.group) if shard is not None else (torch.distributed.get_rank(), None)
    )
    return Company.of(rows + more, more, place, group, device, lockstep=bool(dense))


def _nothing(
    model: nn.Module, trained: dict[str, nn.Parameter], options: Options, device: torch.device
) -> Measured:
    shards = dense_shards(model)
    zeros = {
        name: _zeros(shards[name].held if name in shards else parameter)
        for name, parameter in trained.items()
    }
    if options.loads is not None:
        zeros |= options.loads.zeros(device)
    none = torch.zeros(0, dtype=torch.float64, device=device)
    return Measured(zeros, none, none)


def _clip_together(
    model: nn.Module,
    trained: dict[str, nn.Parameter],
    batch: Batch,
    options: Options,
) -> Measured:
    """`measure` where ranks share the model: all of them come here together.

    What they decide on the way (whether there is anything to compute, or a sample to leave out)
    depends on what all of them know, so they go the same way.
    """
    if _takes_one_sample(model):
        raise NotPerSample(
            "the model classifies by a row's last token and has no padding token, so it takes one "
            "row at a time: set pad_token_id in its configuration, or expertParallel to 1 and "
            "shardDense to false"
        )
    rows, device = _size(batch)
    more = stand_ins(batch)
    company = _company(model, batch, more)
    real = company.real(device)
    if not company.anywhere(real.any()):
        return _nothing(model, trained, options, device)
    measured = _clip(model, trained, with_stand_ins(batch, more), options, company)
    finite = measured.norms.isfinite()
    if not finite[~real].all() and finite[real].all():
        raise NotPerSample(
            "the model's gradient at a row of zeros is not finite: check its weights"
        )
    own, losses = measured.norms[company.own][:rows], measured.losses[:rows]
    if measured.sums:
        return Measured(measured.sums, own, losses)
    kept = own.isfinite()
    rest = measure(model, {key: value[kept] for key, value in batch.items()}, options)
    norms = torch.full_like(own, torch.inf).masked_scatter(kept, rest.norms)
    return Measured(rest.sums, norms, losses)


def _clip(
    model: nn.Module,
    trained: dict[str, nn.Parameter],
    batch: Batch,
    options: Options,
    company: Company | None = None,
) -> Measured:
    """The sums and norms of a batch; no sums if a norm is not finite.

    In company, the norms are those of all its rows.
    """
    batch = _with_decoder_inputs(model, batch)
    groups = options.clipping.groups(trained)
    tape = Tape(trained, list(batch.values()), groups, company)
    routes = Routes.of(model, batch, options.loads, options.balancing)
    with evaluating(model), own_parts(model, tape), routes.on(tape), tape.guarding():
        with refusing_changed_buffers(model), torch.enable_grad(), watching(tape, RULES):
            losses = _losses(model, batch)
        _require_all_used(model, tape)
        # The backward pass follows the types of the forward pass. Under the caller's autocast it
        # would round anew, and otherwise where a checkpointed layer's is run again.
        with torch.autocast(tape.device.type, enabled=False):
            losses.sum().backward()
            losses = losses.detach().double()
            norms_BG = tape.norms()
            norms = torch.linalg.vector_norm(norms_BG, dim=1)
            bad = ~norms.isfinite().all()
            if bad if company is None else company.anywhere(bad):
                return Measured({}, norms, losses)
            factors_BG = clip_factors(norms_BG, options.clipping_norm, options.clipping, groups)
            own = slice(None)
            real = torch.ones(len(norms), dtype=torch.bool, device=tape.device)
            if company is not None:
                own, real = company.own, company.real(tape.device)
                factors_BG[~real] = 0
            factors = ClipFactors(factors_BG[own], factors_BG)
            sums = _book_kept(trained, tape, factors, dense_shards(model))
    return Measured(sums | routes.sums(real[own]), norms, losses)


def _in_halves(model: nn.Module, batch: Batch, options: Options) -> Measured:
    """The same by two smaller batches, down to single samples if need be."""
    samples, _ = _size(batch)
    half = samples // 2
    first = measure(model, {key: value[:half] for key, value in batch.items()}, options)
    second = measure(model, {key: value[half:] for key, value in batch.items()}, options)
    add_sums(first.sums, second.sums)
    return Measured(
        first.sums,
        torch.cat([first.norms, second.norms]),
        torch.cat([first.losses, second.losses]),
    )


def _takes_one_sample(model: nn.Module) -> bool:
    """Whether the model classifies by a row's last token, and is not told what padding is.

    transformers then refuses batches of more than one sample.
    """
    by_last_token = any(isinstance(m, GenericForSequenceClassification) for m in model.modules())
    return by_last_token and model.config.get_text_config().pad_token_id is None  # type: ignore[operator, union-attr]


@torch.no_grad()
def _book_kept(
    trained: dict[str, nn.Parameter],
    tape: Tape,
    factors: ClipFactors,
    shards: Mapping[str, DenseShard],
) -> dict[str, Tensor]:
    """Forms each weight gradient once, dropping what it is formed from on the way.

    Where a rank holds but some rows of a parameter, it keeps theirs of the sum over all ranks.
    """
    formed: dict[str, Tensor] = {}
    summed: dict[str, Tensor] = {}
    left = Counter(name for fired in tape.fired for name in fired.names)
    # Ranks sum together, so in an order that does not depend on which uses received gradients.
    # A parameter with several uses is complete late, and would hold up the others.
    waiting = sorted((name for name in trained if name in shards), key=tape.is_tied)

    def complete(name: str) -> Tensor:
        # A use whose output did not reach the loss received no gradient: its parameters' is zero.
        if name not in formed:
            return _zeros(trained[name])
        return _widened(formed.pop(name), trained[name])

    while tape.fired:
        fired = tape.fired.pop()
        add_sums(formed, fired.clipped(factors))
        left.subtract(fired.names)
        while waiting and not left[waiting[0]]:
            name = waiting.pop(0)
            summed[name] = shards[name].summed(complete(name))
    summed |= {name: shards[name].summed(complete(name)) for name in waiting}
    return {name: summed[name] if name in summed else complete(name) for name in trained}


def _widened(total: Tensor, parameter: nn.Parameter) -> Tensor:
    return total.to(torch.promote_types(parameter.dtype, torch.float32))


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    trained = trained_wholes(model)
    if not trained:
        raise NotPerSample("no parameter of the model requires a gradient: select what to train")
    return trained


def _zeros(parameter: nn.Parameter) -> Tensor:
    return wide(torch.zeros_like(parameter, requires_grad=False))


def _size(batch: Batch) -> tuple[int, torch.device]:
    """The batch's samples, and its device."""
    key = next((key for key in _INPUTS if key in batch), None)
    if key is None or "labels" not in batch:
        raise NotPerSample(
            f"the batch has {sorted(batch)}: it needs labels and one of {', '.join(_INPUTS)}"
        )
    if "num_items_in_batch" in batch:
        raise NotPerSample(
            "the batch has num_items_in_batch, a divisor that depends on the other samples: leave "
            "it out, a sample's loss is the mean over its own tokens"
        )
    samples = batch[key].shape[0]
    for other, value in batch.items():
        if value.dim() == 0 or value.shape[0] != samples:
            raise NotPerSample(
                f"the batch's {other} has not as many rows as its {key}: give every entry one row "
                "a sample"
            )
    return samples, batch[key].device


def _with_decoder_inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The batch, with what a decoder reads: the labels, shifted by one."""
    if not getattr(model.config, "is_encoder_decoder", False) or "decoder_input_ids" in batch:
        return dict(batch)
    read = model.prepare_decoder_input_ids_from_labels(batch["labels"])  # type: ignore[operator]
    return {**batch, "decoder_input_ids": read}


def _losses(model: nn.Module, batch: Batch) -> Tensor:
    inputs: dict[str, Tensor | bool] = {k: value for k, value in batch.items() if k != "labels"}
    if getattr(model.config, "use_cache", False):
        inputs["use_cache"] = False
    return per_sample_losses(model, model(**inputs).logits, batch["labels"])


def _require_all_used(model: nn.Module, tape: Tape) -> None:
    unused = [name for name in tape.unclaimed() if not _is_untied(model, name)]
    if unused:
        raise UncoveredParameter(
            f"trained parameter {unused[0]!r} is not used in the model's forward pass (in all "
            f"{len(unused)} are not): freeze it"
        )


def _is_untied(model: nn.Module, name: str) -> bool:
    """Whether the model keeps this table only to tie others to it, and they are not tied.

    Such a table of a model with encoder and decoder is part of it, but of none of its outputs: its
    gradient is zero.
    """
    ties = getattr(model, "_tied_weights_keys", None)
    sources = set(ties.values()) if isinstance(ties, dict) else set()
    return name in sources and not getattr(model.config, "tie_word_embeddings", True)
