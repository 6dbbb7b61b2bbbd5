"""DP-SGD (Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1).

One step releases Σ_u clip(g_u) + N(0, (σC)² I) over a Poisson sample of units u, divided by the
public expected batch. What the optimiser makes of it is post-processing. A unit's g_u is the
gradient of the mean of its rows' losses, so a user weighs as much as another, however much each
wrote (McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models").
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dpmoe_trainer.contract import OptimizerName, OptimizerPlan
from dpmoe_trainer.data.rows import Rows
from dpmoe_trainer.data.units import Unit
from dpmoe_trainer.dp import clipped_sum
from dpmoe_trainer.dp.clipping import FLAT, Clipping, clip_gradient
from dpmoe_trainer.dp.routes import BalancingLoss, LoadQuery
from dpmoe_trainer.dp.sampling import Group, lockstep_batches
from dpmoe_trainer.methods.adam_bc import AdamBC
from dpmoe_trainer.parallel.dense import dense_shards, trained_here
from dpmoe_trainer.parallel.ranks import ALONE, Ranks
from dpmoe_trainer.parallel.shards import Shard, sharded_parameters
from dpmoe_trainer.parallel.sums import counted_once, sum_over_ranks

ADAM_BETAS = (0.9, 0.98)
"""The second is short-sighted because DP runs are short: tens of steps, not tens of thousands."""

Gradients = dict[str, Tensor]
"""By name of the trained parameter, and of its shape."""


def sum_clipped(
    model: nn.Module,
    rows: Rows,
    units: Iterable[Unit],
    clipping_norm: float,
    physical_batch: int,
    *,
    clipping: Clipping = FLAT,
    loads: LoadQuery | None = None,
    balancing: BalancingLoss | None = None,
    ranks: Ranks = ALONE,
) -> Gradients:
    """Σ_u min(1, C/‖g_u‖)·g_u over a logical batch, in physical batches.

    Units of one row go through the model together. A user with more rows goes alone, since the
    norm that counts is that of the rows' mean gradient: exact, at one gradient's memory whatever
    the number of its rows, and as slow as it sounds. A user's load is the mean of its rows' too.

    Args:
        model: the model; parameters that require no gradient are frozen.
        rows: the rows that the units consist of.
        units: the sampled units; there may be none.
        clipping_norm: C.
        physical_batch: most rows that go through the model at once.
        clipping: how gradients are brought to C.
        loads: expert loads to sum as well, as in `clipped_sum`.
        balancing: a balancing loss of each row's own.
        ranks: who computes the logical batch; each gives the same units and gets the same sum, of
            the parameters that it holds.
    """
    shards, dense = sharded_parameters(model), dense_shards(model)
    total: Gradients = {}

    def sums(group: Group, bound: float, way: Clipping) -> Gradients:
        """This rank's part of a group's sum."""
        part: Gradients = {}
        for batch in rows.batches(group.of(ranks.rank)):
            if batch is None and not (shards or dense):
                continue
            given = rows.empty() if batch is None else batch
            _add(
                part,
                clipped_sum(model, given, bound, clipping=way, loads=loads, balancing=balancing)[0],
            )
        return part

    for group in lockstep_batches(units, ranks.world, physical_batch, rows.sizes):
        if group.unit_rows > 1:
            part = _complete(sums(group, math.inf, FLAT), model, loads)
            mean = _divided(sum_over_ranks(part, shards, ranks, dense), group.unit_rows)
            clipped = _clipped(mean, clipping_norm, clipping, loads, shards, dense)
            _add(total, counted_once(clipped, shards, ranks, dense))
        else:
            _add(total, sums(group, clipping_norm, clipping))
    return sum_over_ranks(_complete(total, model, loads), shards, ranks, dense)


def _complete(total: Gradients, model: nn.Module, loads: LoadQuery | None) -> Gradients:
    """The sums, with zeros for what no batch had a part in."""
    trained = trained_here(model)
    if all(name in total for name in trained):
        return total
    device = next(iter(trained.values())).device
    zeros = {
        name: torch.zeros_like(
            p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False
        )
        for name, p in trained.items()
        if name not in total
    }
    if loads is not None:
        zeros |= {n: zero for n, zero in loads.zeros(device).items() if n not in total}
    return total | zeros


def _divided(total: Gradients, rows: int) -> Gradients:
    for gradient in total.values():
        gradient /= rows
    return total


def _clipped(
    mean: Gradients,
    clipping_norm: float,
    clipping: Clipping,
    loads: LoadQuery | None,
    shards: Mapping[str, Shard],
    dense: Collection[str],
) -> Gradients:
    """A user's gradient clipped, and its load as it is; zeros if the gradient is not finite."""
    load = {name: mean.pop(name) for name in (loads.experts if loads else ())}
    clipped, finite = clip_gradient(mean, clipping_norm, clipping, shards, dense)
    return clipped | (load if finite else {n: torch.zeros_like(part) for n, part in load.items()})


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
        noise: σC, the noise's standard deviation on a sum; public.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: OptimizerPlan,
        steps: int,
        expected_batch: float,
        noise: float = 0.0,
    ) -> None:
        self._trained = trained_here(model)
        self._expected_batch = expected_batch
        self._optimizer = _optimizer(list(self._trained.values()), plan, noise / expected_batch)
        self._factor = lambda step: learning_rate_factor(step, plan.warmup_steps, steps)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._factor)

    def update(self, noised: Gradients) -> None:
        """Makes one step; the sums are divided in place."""
        for name, parameter in self._trained.items():
            parameter.grad = noised[name].div_(self._expected_batch).to(parameter.dtype)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return self._trained

    def state(self) -> dict[str, Tensor]:
        """The optimiser's state, by parameter and field: `layers.0.weight.exp_avg`.

        Whole numbers come as int64. The learning rate follows from the step.
        """
        return {
            f"{name}.{field}": value if isinstance(value, Tensor) else torch.tensor(value)
            for name, parameter in self._trained.items()
            for field, value in self._optimizer.state[parameter].items()
            if value is not None
        }

    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        """Goes on from what `state` gave after `step` steps."""
        for key, value in state.items():
            name, _, field = key.rpartition(".")
            parameter = self._trained[name]
            whole = value.dtype == torch.int64
            self._optimizer.state[parameter][field] = (
                int(value) if whole else value.to(parameter.device)
            )
        self._schedule.last_epoch = step
        for group, rate in zip(self._optimizer.param_groups, self._schedule.base_lrs, strict=True):
            group["lr"] = rate * self._factor(step)

    def state_bytes(self) -> int:
        """Bytes of the trained parameters and, once it has any, of the optimiser's state."""
        group = self._optimizer.param_groups[0]
        moments = 2 if "betas" in group else int(bool(group["momentum"]))
        return sum(parameter.nbytes for parameter in self._trained.values()) * (1 + moments)


def learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """The share of the learning rate that applies in a step, counted from 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (steps - step) / max(steps - warmup, 1)


def _optimizer(
    parameters: Sequence[nn.Parameter], plan: OptimizerPlan, noise: float
) -> torch.optim.Optimizer:
    if plan.name is OptimizerName.SGD:
        return torch.optim.SGD(
            parameters,
            lr=plan.learning_rate,
            momentum=plan.momentum,
            weight_decay=plan.weight_decay,
        )
    if plan.name is OptimizerName.ADAMBC:
        return AdamBC(
            parameters,
            lr=plan.learning_rate,
            noise=noise,
            betas=ADAM_BETAS,
            weight_decay=plan.weight_decay,
        )
    return torch.optim.AdamW(
        parameters,
        lr=plan.learning_rate,
        betas=ADAM_BETAS,
        weight_decay=plan.weight_decay,
        fused=True,
    )
