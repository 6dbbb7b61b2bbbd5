"""`make_private` with Opacus' argument names, for mixtures of experts that Opacus cannot clip.

    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader,
        noise_multiplier=1.0, max_grad_norm=0.1,
    )
    for batch in loader:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    print(engine.get_epsilon(delta=1e-5))

What it is not: a grad-sample module, on whose per-sample gradients any loss could be built. The
loss is each sample's own, by the model's class, and the engine computes it. Opacus' accountants
count the steps, and its optimiser makes them. Arguments that would weaken the guarantee, or that
mean what the engine does not do, are refused by name.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from opacus.accountants import create_accountant
from opacus.accountants.utils import get_noise_multiplier
from torch import nn
from torch.utils.data import DataLoader

from dpmoe_trainer.dp.check import check_model
from dpmoe_trainer.dp.clipping import FLAT, Clipping
from dpmoe_trainer.dp.keys import NoiseKey
from dpmoe_trainer.dp.private.draws import Draws
from dpmoe_trainer.dp.private.loader import PoissonLoader
from dpmoe_trainer.dp.private.module import PrivateModule
from dpmoe_trainer.dp.private.optimizer import PrivateOptimizer

Made = tuple[PrivateModule, PrivateOptimizer, PoissonLoader]

_FIXED = {
    "criterion": (None, "the loss is the model's own, sample by sample: leave it out"),
    "batch_first": (True, "rows of a batch are samples: leave it out"),
    "loss_reduction": ("mean", "sums are divided by the expected batch: scale the learning rate"),
    "poisson_sampling": (True, "the accounting is of Poisson samples: leave it out"),
    "noise_generator": (None, "noise that can be predicted protects nothing: leave it out"),
    "grad_sample_mode": ("dpmoe", "gradients are clipped by this engine: leave it out"),
    "wrap_model": (True, "the model is called through its wrapper: leave it out"),
    "rand_on_empty": (False, "a made-up sample would be summed: leave it out"),
    "secure_mode": (True, "noise and sampling are always keyed and secret: leave it out"),
}
"""Arguments of Opacus that have one value here, and why."""


class PrivacyEngine:
    """Makes a model, an optimiser and a loader private, and counts what that costs.

    Args:
        accountant: The name of one of Opacus' accountants: `prv`, `rdp` or `gdp`.
        secure_mode: Is always on.

    Attributes:
        accountant: Opacus' accountant; it takes a step for every step of the optimiser.
    """

    def __init__(self, *, accountant: str = "prv", secure_mode: bool = True) -> None:
        _refuse(secure_mode=secure_mode)
        self.accountant = create_accountant(mechanism=accountant)

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: None = None,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str | Clipping = "flat",
        noise_generator: None = None,
        grad_sample_mode: str = "dpmoe",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        max_physical_batch_size: int | None = None,
    ) -> Made:
        """Wraps what a training loop consists of.

        The model proves itself to the engine on made-up tokens before it is wrapped.

        Args:
            module: A transformers model that `clipped_sum` takes.
            optimizer: Of exactly the module's parameters that require a gradient.
            criterion: Refused.
            data_loader: Its batches are mappings with `labels`, as a model takes them; its batch
                size becomes the expected one.
            noise_multiplier: σ.
            max_grad_norm: C.
            batch_first: Must be True.
            loss_reduction: Must be `mean`.
            poisson_sampling: Must be True.
            clipping: `flat`, or an object of `dpmoe_trainer.dp.clipping`.
            noise_generator: Refused.
            grad_sample_mode: Must be `dpmoe`.
            wrap_model: Must be True.
            rand_on_empty: Must be False.
            max_physical_batch_size: Most samples that are computed at once.

        Returns:
            The module, the optimiser and the loader to train with.

        Raises:
            ValueError: Names the argument and the remedy.
            NotPerSample: The model cannot be clipped.
        """
        _refuse(
            criterion=criterion,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            poisson_sampling=poisson_sampling,
            noise_generator=noise_generator,
            grad_sample_mode=grad_sample_mode,
            wrap_model=wrap_model,
            rand_on_empty=rand_on_empty,
        )
        _require_positive("noise_multiplier", noise_multiplier)
        _require_positive("max_grad_norm", max_grad_norm)
        if max_physical_batch_size is not None:
            _require_positive("max_physical_batch_size", max_physical_batch_size)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise ValueError("module is trained by several processes: use one")
        way = _clipping_of(clipping)
        trained = _trained(module, optimizer)
        check_model(module, clipping=way)

        draws, key = Draws(), NoiseKey()
        loader = PoissonLoader(data_loader, key, draws)
        private = PrivateOptimizer(
            optimizer,
            trained,
            draws,
            key,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=len(loader.dataset) * loader.sample_rate,
        )
        private.attach_step_hook(
            self.accountant.get_optimizer_hook_fn(sample_rate=loader.sample_rate)
        )
        wrapped = PrivateModule(
            module, draws, lambda: float(private.max_grad_norm), way, max_physical_batch_size
        )
        return wrapped.train(), private, loader

    def make_private_with_epsilon(
        self,
        *,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        **arguments: Any,
    ) -> Made:
        """`make_private` with the noise multiplier that the target allows.

        Args:
            data_loader: As for `make_private`.
            target_epsilon: ε.
            target_delta: δ.
            epochs: Passes over the loader that are planned.
            **arguments: All others of `make_private`.

        Raises:
            ValueError: As `make_private`; or steps were counted already, which a fresh budget does
                not cover.
        """
        if len(self.accountant):
            raise ValueError(
                "target_epsilon is for a fresh engine, and this one has counted steps: make another"
            )
        noise_multiplier = get_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            sample_rate=1 / len(data_loader),
            epochs=epochs,
            accountant=self.accountant.mechanism(),
        )
        return self.make_private(
            data_loader=data_loader, noise_multiplier=noise_multiplier, **arguments
        )

    def get_epsilon(self, delta: float) -> float:
        """The ε at δ of all steps so far."""
        return float(self.accountant.get_epsilon(delta))


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        allowed, why = _FIXED[name]
        if value != allowed:
            raise ValueError(f"{name} is {value!r}, must be {allowed!r}: {why}")


def _require_positive(name: str, value: Any) -> None:
    if not (isinstance(value, (int, float)) and value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value!r}: give one positive number")


def _clipping_of(clipping: str | Clipping) -> Clipping:
    if isinstance(clipping, Clipping):
        return clipping
    if clipping != "flat":
        raise ValueError(
            f"clipping is {clipping!r}: give 'flat' or an object of dpmoe_trainer.dp.clipping, as "
            "PerGroup() is; a threshold that adapts to the data would be a release of its own"
        )
    return FLAT


def _trained(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left_out = [name for name, parameter in trained.items() if id(parameter) not in updated]
    if left_out:
        raise ValueError(f"optimizer does not have the module's {left_out[0]!r}: freeze it")
    if len(updated) > len(trained):
        raise ValueError(
            "optimizer has parameters that are not the module's, or that are frozen: leave them out"
        )
    return trained
