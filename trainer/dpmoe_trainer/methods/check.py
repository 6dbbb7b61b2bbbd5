"""Has ranks that share a model prove that a unit's part of their sum is bounded and its own.

`dp.check` compares the engine with automatic differentiation, in one process that has the whole
model. What it cannot see is what is between ranks: rows that arrive as another sample's, a part of
a norm that nobody added, a kernel or a network library that computes something else. So the ranks
clip a few made-up units together, on their devices, and each one alone, and look at what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from dpmoe_trainer.data.rows import Rows
from dpmoe_trainer.data.units import Unit
from dpmoe_trainer.dp.balancing import Balancing
from dpmoe_trainer.dp.check import made_up_batch
from dpmoe_trainer.dp.clipping import FLAT, Clipping, squared_norms
from dpmoe_trainer.dp.errors import NotPerSample
from dpmoe_trainer.methods.dp_sgd import Gradients, sum_clipped
from dpmoe_trainer.parallel.dense import dense_shards
from dpmoe_trainer.parallel.ranks import Ranks
from dpmoe_trainer.parallel.shards import sharded_parameters

_UNITS: tuple[Unit, ...] = ((0,), (1,), (2,), (0, 1))
"""The last is a user with two rows."""

_CLIPPING_NORM = 1e-4
"""Below the norm of any gradient that is worth a step, so that all units are clipped."""

_REMEDY = "run it on one rank, by parallelism with one worker and at most one GPU"

_ROUNDING = 1e-3
"""Largest relative difference that rounding may explain."""


def check_ranks(
    model: nn.Module,
    ranks: Ranks,
    clipping: Clipping,
    balancing: Balancing,
    exact: bool = True,
) -> None:
    """Compares the sum over units with what each adds alone, and that with C.

    All ranks call this together. Costs a few passes over samples of a few tokens, and two sums of
    what this rank holds in memory.

    Args:
        model: as this rank holds it.
        ranks: who shares it.
        clipping: as `sum_clipped` takes it.
        balancing: what is asked for with the gradients.
        exact: whether a unit must add the same in company as alone. Half precision rounds by the
            shape of a batch, which may even send a token to another expert; the bound holds still.

    Raises:
        NotPerSample: a unit adds more than C, or something else in company than alone; on all
            ranks.
    """
    rows = _made_up_rows(model)

    def total(units: Sequence[Unit]) -> Gradients:
        return sum_clipped(
            model,
            rows,
            units,
            _CLIPPING_NORM,
            physical_batch=2,
            clipping=clipping,
            loads=balancing.loads,
            balancing=balancing.loss,
            ranks=ranks,
        )

    loads = balancing.loads.experts if balancing.loads is not None else {}
    rest = total(_UNITS)
    for unit in _UNITS:
        alone = total([unit])
        added = _norm(model, {name: part for name, part in alone.items() if name not in loads})
        if not added <= _CLIPPING_NORM * (1 + _ROUNDING):
            raise NotPerSample(
                f"what a sample adds to the ranks' sum has {added / _CLIPPING_NORM:.6g} times the "
                f"clipping norm: {_REMEDY}"
            )
        for name, part in alone.items():
            rest[name] -= part
    if not exact:
        return
    left = {name: rest.pop(name) for name in loads}
    _require_little(_norm(model, rest), _CLIPPING_NORM)
    if balancing.loads is not None:
        _require_little(_norm(model, left), balancing.loads.norm)


def _require_little(left: float, bound: float) -> None:
    if not left <= _ROUNDING * bound * len(_UNITS):
        raise NotPerSample(
            "samples add something else to the ranks' sum in company than alone, by "
            f"{left / bound:.1e} of the clipping norm: {_REMEDY}"
        )


def _norm(model: nn.Module, sums: Gradients) -> float:
    """Of a sum over all ranks, of which this one holds its part."""
    groups = FLAT.groups(sums)
    return float(squared_norms(sums, groups, sharded_parameters(model), dense_shards(model)).sqrt())


def _made_up_rows(model: nn.Module) -> Rows:
    config: Any = model.config
    batch = {key: value.cpu() for key, value in made_up_batch(model).items()}
    lengths = batch["attention_mask"].sum(1).tolist()
    tokens = [
        row[:length].int().numpy() for row, length in zip(batch["input_ids"], lengths, strict=True)
    ]
    classes = batch["labels"].tolist() if batch["labels"].dim() == 1 else None
    return Rows(tokens, classes, config.pad_token_id or 0, next(model.parameters()).device)
