"""Has the engine prove itself on a model, before it sees data.

The rules know how torch functions use parameters, not how a model arranges its rows. So the engine
runs once on made-up tokens and is compared with plain automatic differentiation of the model's own
loss, one sample at a time, also with experts that have room for a single token. A model that
couples samples, or mixes their rows, cannot pass; two ways to do so are recognised by name.

In half precision both would be rounded, each in its own way, and hardly to be compared. There the
engine's own word is measured: that what it clipped is within the clipping norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dpmoe_trainer.dp.clipping import FLAT, Clipping
from dpmoe_trainer.dp.engine import Options, clipped_sum, measure
from dpmoe_trainer.dp.errors import NotPerSample
from dpmoe_trainer.dp.routes import BalancingLoss, LoadQuery
from dpmoe_trainer.dp.seams import evaluating
from dpmoe_trainer.dp.uses import add_sums

_SAMPLES, _TOKENS = 3, (5, 7, 11, 13)


def check_model(
    model: nn.Module,
    tolerance: float = 1e-3,
    *,
    clipping: Clipping = FLAT,
    loads: LoadQuery | None = None,
    balancing: BalancingLoss | None = None,
) -> None:
    """Compares the engine's gradient sum and norms with the model's own, sample by sample.

    Whatever else is to be summed or clipped is compared with that of single samples.

    Costs a few passes over three samples of five tokens, and two to three gradients in memory.

    Args:
        model: As `clipped_sum` takes it.
        tolerance: Largest relative difference that rounding may explain.
        clipping: As `clipped_sum` takes it.
        loads: Likewise.
        balancing: Likewise.

    Raises:
        NotPerSample: They differ, or `clipped_sum` refuses the model. Names the parameter.
    """
    batch = made_up_batch(model)
    _check_routing(model, batch)
    _check_gradients(model, batch, tolerance)
    _check_alone(model, batch, Options(1.0, clipping, loads, balancing), tolerance)
    if any(hasattr(module, "expert_capacity") for module in model.modules()):
        with _room_for_one(model):
            _check_gradients(model, batch, tolerance)


def check_bound(
    model: nn.Module,
    tolerance: float = 1e-4,
    *,
    clipping: Clipping = FLAT,
    loads: LoadQuery | None = None,
    balancing: BalancingLoss | None = None,
) -> None:
    """Measures what single samples contribute, computed as the caller's autocast has it.

    The model runs by itself there too, as it does to be scored. Costs a few passes over three
    samples of five tokens, and the gradient of one in memory.

    Args:
        model: As `clipped_sum` takes it.
        tolerance: The share of the clipping norm that rounding in float32 may add to it.
        clipping: As `clipped_sum` takes it.
        loads: Likewise; they come on top of the clipping norm, and are not measured.
        balancing: Likewise.

    Raises:
        NotPerSample: A contribution is larger than the clipping norm, or no number.
    """
    batch = made_up_batch(model)
    for index in range(_SAMPLES):
        sample = {key: value[index : index + 1] for key, value in batch.items()}
        with evaluating(model), torch.no_grad():
            model(**sample)
        share = _contributed(model, sample, Options(1.0, clipping, loads, balancing))
        if not share <= 1 + tolerance:
            raise NotPerSample(
                f"a sample's clipped gradient has {share:.6f} times the clipping norm in this "
                "precision: set training.precision to float32"
            )


def _contributed(model: nn.Module, sample: dict[str, Tensor], options: Options) -> float:
    """The norm of a sample's clipped gradient, by a clipping norm that clips it; NaN without."""
    norm = float(measure(model, sample, options).norms)
    if not math.isfinite(norm):
        return math.nan
    bound = norm / 2 or 1.0
    sums = measure(model, sample, replace(options, clipping_norm=bound)).sums
    loads = options.loads.experts if options.loads else ()
    squares = [total.double().pow(2).sum() for name, total in sums.items() if name not in loads]
    return float(torch.stack(squares).sum().sqrt()) / bound


def _check_gradients(model: nn.Module, batch: dict[str, Tensor], tolerance: float) -> None:
    sums, norms = clipped_sum(model, batch, math.inf)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scale = torch.zeros_like(norms[0])
    with evaluating(model):
        for index in range(_SAMPLES):
            gradients = _own_gradients(model, parameters, batch, index)
            norm = torch.stack([g.double().pow(2).sum() for g in gradients.values()]).sum().sqrt()
            _compare(f"the norm of sample {index}", norms[index] - norm, norm, tolerance)
            scale += norm
            # In place, and gone before the next one is formed: models are large.
            while gradients:
                name, gradient = gradients.popitem()
                sums[name] -= gradient
    for name, left in sums.items():
        _compare(f"parameter {name!r}", left, scale, tolerance)


def _check_alone(
    model: nn.Module, batch: dict[str, Tensor], options: Options, tolerance: float
) -> None:
    """Compares a batch's sums, clipped as they will be, with those of its samples alone."""
    if options == Options(options.clipping_norm):
        return
    expected: dict[str, Tensor] = {}
    for index in range(_SAMPLES):
        sample = {key: value[index : index + 1] for key, value in batch.items()}
        add_sums(expected, measure(model, sample, options).sums)
    scale = torch.tensor(_SAMPLES * options.clipping_norm)
    for name, total in measure(model, batch, options).sums.items():
        _compare(f"{name!r}", total - expected[name], scale, tolerance)


def _own_gradients(
    model: nn.Module, parameters: dict[str, nn.Parameter], batch: dict[str, Tensor], index: int
) -> dict[str, Tensor]:
    """One sample's gradient by the model's own loss."""
    sample = {key: value[index : index + 1] for key, value in batch.items()}
    with torch.enable_grad():
        loss = model(**sample).loss
    gradients = torch.autograd.grad(
        loss, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, gradients, strict=True))


def made_up_batch(model: nn.Module) -> dict[str, Tensor]:
    """Three samples as `clipped_sum` takes them, always the same ones; the last is padded."""
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    shape = (_SAMPLES, _unlike_any_width(model))
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.long)
    mask[-1, -2:] = 0
    if config.pad_token_id is not None:
        ids[ids == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
        ids[-1, -2:] = config.pad_token_id
    if getattr(model, "loss_type", None) in ("ForCausalLM", "ForConditionalGeneration"):
        labels = ids.masked_fill(mask == 0, -100)
    else:
        labels = torch.arange(_SAMPLES) % config.num_labels
    device = next(model.parameters()).device
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {key: value.to(device) for key, value in batch.items()}


def _unlike_any_width(model: nn.Module) -> int:
    """Tokens a sample, such that the batch's B·T is the size of nothing else in the model."""
    widths = {width for parameter in model.parameters() for width in parameter.shape}
    return next((t for t in _TOKENS if _SAMPLES * t not in widths), _TOKENS[0])


@torch.no_grad()
def _check_routing(model: nn.Module, batch: dict[str, Tensor]) -> None:
    tokens = batch["input_ids"].numel()
    if tokens not in {width for p in model.parameters() for width in p.shape}:
        with evaluating(model), _OverTheBatch(tokens):
            model(**batch)


class _OverTheBatch(TorchFunctionMode):
    """Refuses choosing among, and counting over, all tokens of a batch."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        chosen = function in _CHOOSING and self._is_over_batch(_CHOOSING[function], args, kwargs)
        if chosen and args[0].is_floating_point():
            raise NotPerSample(
                f"the model chooses among all tokens of a batch ({function.__name__}), as "
                "expert choice does: use a router whose tokens choose their experts"
            )
        if function in _COUNTING and self._is_over_batch(1, args, kwargs):
            raise NotPerSample(
                "the model counts over all tokens of a batch (cumsum), as a capacity of experts "
                "for the whole batch does: count by sequence, or use a router without capacity"
            )
        return function(*args, **kwargs)

    def _is_over_batch(self, place: int, args: Any, kwargs: dict[str, Any]) -> bool:
        dim = kwargs.get("dim", args[place] if len(args) > place else -1)
        if not args or not isinstance(dim, int) or args[0].dim() == 0:
            return False
        return bool(args[0].shape[dim] == self._tokens)


_CHOOSING = {
    torch.topk: 2,
    torch.Tensor.topk: 2,
    torch.sort: 1,
    torch.Tensor.sort: 1,
    torch.argsort: 1,
    torch.Tensor.argsort: 1,
}
"""Functions that choose by size, and where each takes the dimension."""

_COUNTING = {torch.cumsum, torch.Tensor.cumsum}


@contextmanager
def _room_for_one(model: nn.Module) -> Iterator[None]:
    """Gives every expert room for one token, so that capacity is felt."""
    limited: list[Any] = [m for m in model.modules() if hasattr(m, "expert_capacity")]
    before = [module.expert_capacity for module in limited]
    try:
        for module in limited:
            module.expert_capacity = 1
        yield
    finally:
        for module, capacity in zip(limited, before, strict=True):
            module.expert_capacity = capacity


def _compare(what: str, difference: Tensor, scale: Tensor, tolerance: float) -> None:
    relative = float(difference.double().pow(2).sum().sqrt() / scale.clamp_min(1e-12))
    if not relative <= tolerance:
        raise NotPerSample(
            f"the engine and the model's own gradients differ in {what} by {relative:.1e} of the "
            "gradient: the model couples or mixes the samples of a batch; freeze that part or use "
            "another model"
        )
