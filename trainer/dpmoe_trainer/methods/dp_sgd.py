"""DP-SGD (Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1).

One step releases Σ_u clip(g_u) + N(0, (σC)² I) over a Poisson sample of units u, divided by the
public expected batch. What the optimiser makes of it is post-processing. A unit's g_u is the
gradient of the mean of its rows' losses, so a user weighs as much as another, however much each
wrote (McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models").
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dpmoe_trainer.contract import OptimizerName, OptimizerPlan
from dpmoe_trainer.data.rows import Rows
from dpmoe_trainer.data.units import Unit
from dpmoe_trainer.dp import clipped_sum

ADAM_BETAS = (0.9, 0.98)
"""The second is short-sighted because DP runs are short: tens of steps, not tens of thousands."""

Gradients = dict[str, Tensor]
"""By name of the trained parameter, and of its shape."""


def sum_clipped(
    model: nn.Module, rows: Rows, units: Iterable[Unit], clipping_norm: float, physical_batch: int
) -> Gradients:
    """Σ_u min(1, C/‖g_u‖)·g_u over a logical batch, in physical batches.

    Units of one row go through the model together. A user with more rows goes alone, since the
    norm that counts is that of the rows' mean gradient: exact, at one gradient's memory whatever
    the number of its rows, and as slow as it sounds.

    Args:
        model: the model; parameters that require no gradient are frozen.
        rows: the rows that the units consist of.
        units: the sampled units; there may be none.
        clipping_norm: C.
        physical_batch: most rows that go through the model at once.
    """
    total: Gradients = {}
    singles: list[int] = []
    for unit in units:
        if len(unit) == 1:
            singles.append(unit[0])
        else:
            _add(total, _clipped_mean(model, rows, unit, clipping_norm, physical_batch))
    for batch in rows.physical_batches(singles, physical_batch):
        _add(total, clipped_sum(model, batch, clipping_norm)[0])
    if not total:
        total = {
            name: torch.zeros_like(parameter, dtype=torch.float32)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
    return total


def _clipped_mean(
    model: nn.Module, rows: Rows, unit: Unit, clipping_norm: float, physical_batch: int
) -> Gradients:
    """min(1, C/‖g‖)·g for the mean g of the unit's row gradients."""
    mean: Gradients = {}
    for batch in rows.physical_batches(unit, physical_batch):
        unclipped, _ = clipped_sum(model, batch, math.inf)
        _add(mean, unclipped)
    for gradient in mean.values():
        gradient /= len(unit)
    # In double precision: float32 loses the small among many squares, and would clip too little.
    squares = [gradient.double().pow(2).sum() for gradient in mean.values()]
    norm = float(torch.stack(squares).sum().sqrt())
    # A gradient that overflowed has no direction to keep.
    factor = clipping_norm / max(norm, clipping_norm) if math.isfinite(norm) else 0.0
    return {
        name: gradient * factor if factor else torch.zeros_like(gradient)
        for name, gradient in mean.items()
    }


def _add(total: Gradients, more: Gradients) -> None:
    """Adds in place, and frees what was added on the way."""
    for name in list(more):
        gradient = more.pop(name)
        if name in total:
            total[name] += gradient
        else:
            total[name] = gradient


class Updater:
    """Turns noised sums into updates: the plan's optimiser and learning-rate schedule.

    The rate rises linearly over the warm-up and falls linearly to zero at the plan's last step.

    Args:
        model: its trained parameters are updated in place.
        plan: the optimiser and its settings.
        steps: the plan's steps.
        expected_batch: the public divisor of a noised sum.
    """

    def __init__(
        self, model: nn.Module, plan: OptimizerPlan, steps: int, expected_batch: float
    ) -> None:
        self._trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self._expected_batch = expected_batch
        self._optimizer = _optimizer(list(self._trained.values()), plan)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: learning_rate_factor(step, plan.warmup_steps, steps)
        )

    def update(self, noised: Gradients) -> None:
        """Makes one step; the sums are divided in place."""
        for name, parameter in self._trained.items():
            parameter.grad = noised[name].div_(self._expected_batch).to(parameter.dtype)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()


def learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """The share of the learning rate that applies in a step, counted from 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (steps - step) / max(steps - warmup, 1)


def _optimizer(parameters: Sequence[nn.Parameter], plan: OptimizerPlan) -> torch.optim.Optimizer:
    if plan.name is OptimizerName.SGD:
        return torch.optim.SGD(
            parameters,
            lr=plan.learning_rate,
            momentum=plan.momentum,
            weight_decay=plan.weight_decay,
        )
    return torch.optim.AdamW(
        parameters,
        lr=plan.learning_rate,
        betas=ADAM_BETAS,
        weight_decay=plan.weight_decay,
        fused=True,
    )
