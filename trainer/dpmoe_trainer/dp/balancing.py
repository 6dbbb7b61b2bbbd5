"""Balanced experts without a batch's loads: what is asked for, and what is made of the answer.

`Balancing` itself leaves routers to the task's loss. `SequenceBalancing` adds a balancing
loss of each sample's own to its loss; clipping covers it. `ReleasedLoad` has the batch's expert
loads released together with the gradients, in one Gaussian query of sensitivity C, and steers the
routers by that noised answer, which is free: what is made of a release costs no privacy. It is the
exact counterpart of what balances without privacy, whose loads are the raw counts of a batch.

The query: of C², the loads have a share ρ. Gradients are clipped to √(1−ρ)·C and load vectors have
a norm of at most √ρ·C, so the two together move the sum by at most C, and the noise of σC on every
number protects both. docs/design/balancing.md derives that and what it costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpmoe_trainer.dp.errors import NotPerSample
from dpmoe_trainer.dp.routes import LOAD, BalancingLoss, LoadQuery, routed_layers

Through = Literal["bias", "loss"]
"""What a released load moves: a bias on the routers' choice, or a separable balancing loss."""

LOAD_SHARE = 0.02
"""ρ: gradients lose one percent of their clipping norm to the loads."""

_BIASES = ("selection_bias", "e_score_correction_bias")
"""What routers call the bias of their choice: ours, and DeepSeek-V3's and its kin's."""


class Balancing:
    """What one step asks for, and what it does with what was released: here, nothing.

    Attributes:
        gradient_norm: What gradients are clipped to.
        loads: The loads that are released with them, if any are.
        loss: The balancing loss of each sample, if there is one.
    """

    def __init__(self, clipping_norm: float) -> None:
        self.gradient_norm = clipping_norm
        self.loads: LoadQuery | None = None
        self.loss: BalancingLoss | None = None

    def take(self, released: MutableMapping[str, Tensor]) -> None:
        """Takes the noised loads out of what was released, and steers by them."""

    def state(self) -> dict[str, Tensor]:
        """What was made of the releases so far, for a checkpoint."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `state` gave after some step."""


class SequenceBalancing(Balancing):
    """A balancing loss over each sample's own tokens.

    Args:
        model: The model; its routers must be where the engine can see them.
        clipping_norm: C.
        strength: α.

    Raises:
        NotPerSample: They are not.
    """

    def __init__(self, model: nn.Module, clipping_norm: float, strength: float) -> None:
        super().__init__(clipping_norm)
        routed_layers(model)
        self.loss = BalancingLoss(strength)


class ReleasedLoad(Balancing):
    """Steers by loads that are released with the gradients.

    Args:
        model: The model.
        clipping_norm: C, of gradients and loads together.
        expected_batch: The public divisor.
        strength: Through a bias, how far a step moves it at most; through a loss, α.
        through: What is moved.
        load_share: ρ.

    Raises:
        NotPerSample: The model's routers cannot be seen, or have no bias to move.
        ValueError: ρ is not between 0 and 1.
    """

    def __init__(
        self,
        model: nn.Module,
        clipping_norm: float,
        expected_batch: float,
        strength: float,
        through: Through = "bias",
        load_share: float = LOAD_SHARE,
    ) -> None:
        if not 0 < load_share < 1:
            raise ValueError(f"load_share is {load_share}: give a share between 0 and 1")
        super().__init__(math.sqrt(1 - load_share) * clipping_norm)
        self.loads = LoadQuery.of(model, math.sqrt(load_share) * clipping_norm)
        self._expected_batch = expected_batch
        self._strength = strength
        self._biases = _biases(model) if through == "bias" else None
        self._deviations: dict[str, Tensor] = {}
        if through == "loss":
            self._aim_loss()

    @torch.no_grad()
    def take(self, released: MutableMapping[str, Tensor]) -> None:
        """Removes the loads from `released`.

        Through a bias: b_e -= strength·clamp(E·d_e, ±1), where d_e is what expert e got above an
        even share. Through a loss: f_e of the next step is 1/E + d_e. A mean over past steps would
        have less noise, but lags behind what the optimiser does, and has the loads swing.
        """
        assert self.loads is not None, "a released load is asked for"
        for name, experts in self.loads.experts.items():
            noised = released.pop(name) / (self.loads.scale * self._expected_batch)
            # Deviations sum to zero; only noise does not.
            deviation = noised - noised.mean()
            if self._biases is not None:
                bias = self._biases[name]
                bias -= self._strength * (experts * deviation).clamp(-1, 1).to(bias)
            else:
                self._deviations[name] = deviation
        if self._biases is None:
            self._aim_loss()

    def state(self) -> dict[str, Tensor]:
        """The routers' biases, or what each expert got above an even share, by layer."""
        return dict(self._biases if self._biases is not None else self._deviations)

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Balancing`; biases are set in place."""
        if self._biases is None:
            self._deviations = dict(state)
            self._aim_loss()
        else:
            for name, bias in self._biases.items():
                bias.copy_(state[name])

    def _aim_loss(self) -> None:
        assert self.loads is not None, "a released load is asked for"
        shares = {
            name: 1 / experts + self._deviations.get(name, torch.zeros(experts))
            for name, experts in self.loads.experts.items()
        }
        self.loss = BalancingLoss(self._strength, shares)


def _biases(model: nn.Module) -> dict[str, Tensor]:
    """The selection biases of all routers, by the name of their layer's load.

    Raises:
        NotPerSample: A router has none, or ranks hold parts of it.
    """
    found: dict[str, Tensor] = {}
    for layer in routed_layers(model).values():
        bias = next((getattr(layer.router, n) for n in _BIASES if hasattr(layer.router, n)), None)
        if bias is None:
            raise NotPerSample(
                f"{type(layer.router).__name__} has no bias on its choice: balance through a loss"
            )
        if isinstance(bias, DTensor):
            raise NotPerSample(
                f"{type(layer.router).__name__} has its bias among the parameters, of which ranks "
                "hold rows: balance through a loss, or set shardDense to false"
            )
        found[f"{layer.name}.{LOAD}"] = bias
    return found
