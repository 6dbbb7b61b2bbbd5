"""What a batch's routing tells: each sample's expert load, and its own balancing loss.

Both are the sample's alone, so they are as safe as its gradient. A *load* is the share of a
sample's tokens that each expert got; it is summed over the batch for a joint release with the
gradients (`LoadQuery`). A *balancing loss* is added to the sample's own (`BalancingLoss`). A
padding token counts for neither. docs/design/balancing.md has the derivations.

Shapes: B samples, T tokens of each, N = B·T, E experts, K of them for a token, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpmoe_trainer.dp.errors import NotPerSample
from dpmoe_trainer.dp.tape import Tape
from dpmoe_trainer.dp.uses import wide

LOAD = "load"
"""The last part of a load's name among the sums; the rest is its experts module's."""


class RoutedLayer(NamedTuple):
    """A layer of experts and the router that chooses among them.

    Attributes:
        name: The experts module's name in the model.
        router: The router, which returns its scores, [N, E] or [B, T, E], among others.
        experts: E.
        choices: K.
    """

    name: str
    router: Any
    experts: int
    choices: int

    @property
    def load_bound(self) -> float:
        """The largest ‖u − 1/E‖ of shares u that sum to one and none of which is above 1/K."""
        return math.sqrt(max(0.0, 1 / self.choices - 1 / self.experts))


def routed_layers(model: nn.Module) -> dict[int, RoutedLayer]:
    """The layers of experts, by the identity of their experts module.

    Raises:
        NotPerSample: A layer's router is not where the engine could see its scores.
    """
    found: dict[int, RoutedLayer] = {}
    for name, block in model.named_modules():
        experts: Any = getattr(block, "experts", None)
        count = getattr(experts, "num_experts", None)
        if not isinstance(experts, nn.Module) or count is None:
            continue
        # An adapter on experts wraps them, and the engine runs what is wrapped.
        unwrap: Any = getattr(experts, "get_base_layer", None)
        experts = experts if unwrap is None else unwrap()
        routers: list[Any] = [
            each for each in block.children() if type(each).__name__.endswith("Router")
        ]
        if len(routers) != 1:
            raise NotPerSample(
                f"{type(block).__name__} {name!r} has {len(routers)} routers beside its experts, "
                "so its balance cannot be looked after: set balancing to none"
            )
        place = f"{name}.experts" if name else "experts"
        # Switch Transformers' routers, which choose one, have no such attribute.
        choices = int(getattr(routers[0], "top_k", 1))
        found[id(experts)] = RoutedLayer(place, routers[0], int(count), choices)
    if not found:
        raise NotPerSample("the model has no layer of experts to balance: set balancing to none")
    return found


@dataclass(frozen=True)
class LoadQuery:
    """Which loads are summed, and on what scale.

    A sample's load vector has u_e − 1/E for every expert e of every layer, times `scale`. Its norm
    is at most `norm`, whatever the sample is: a layer's part is cut to the layer's bound.

    Attributes:
        norm: The L2 bound of a sample's load vector.
        experts: E of each layer, by the name of its load.
        bounds: The bound of each layer's part before scaling.
    """

    norm: float
    experts: Mapping[str, int]
    bounds: Mapping[str, float]

    @classmethod
    def of(cls, model: nn.Module, norm: float) -> LoadQuery:
        """The query for a model.

        Raises:
            NotPerSample: The model's routers cannot be seen, or have no choice.
        """
        layers = [layer for layer in routed_layers(model).values() if layer.load_bound > 0]
        if not layers:
            raise NotPerSample("every token uses all experts: there is no load to balance")
        return cls(
            norm,
            {f"{layer.name}.{LOAD}": layer.experts for layer in layers},
            {f"{layer.name}.{LOAD}": layer.load_bound for layer in layers},
        )

    @property
    def scale(self) -> float:
        """What loads are multiplied with, so that all layers' together have at most the norm."""
        return self.norm / math.sqrt(sum(bound**2 for bound in self.bounds.values()))

    def zeros(self, device: torch.device) -> dict[str, Tensor]:
        """The sums over no sample."""
        return {
            name: torch.zeros(experts, dtype=torch.float64, device=device)
            for name, experts in self.experts.items()
        }


@dataclass(frozen=True)
class BalancingLoss:
    """strength·E·Σ_e f_e·P_e, averaged over the layers, as a part of each sample's loss.

    P_e is the mean over the sample's tokens of the router's probability of expert e. f_e is the
    share of the sample's own tokens at e (Fedus et al. 2022, "Switch Transformers", equation 4, for
    a batch of one sequence), unless a public share is given.

    Attributes:
        strength: α.
        shares: f of each layer, [E] by the name of its load, if it is to be public.
    """

    strength: float
    shares: Mapping[str, Tensor] | None = None


class Routes:
    """Sees the routing of one forward pass."""

    def __init__(
        self,
        layers: dict[int, RoutedLayer],
        counted: dict[str, Tensor],
        loads: LoadQuery | None,
        balancing: BalancingLoss | None,
    ) -> None:
        self._layers = layers
        self._counted = counted
        self._query = loads
        self._balancing = balancing
        self._loads: dict[str, Tensor] = {}
        self._scores: dict[int, Tensor] = {}

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        loads: LoadQuery | None,
        balancing: BalancingLoss | None,
    ) -> Routes:
        """For a batch; sees nothing where nothing is asked.

        Raises:
            NotPerSample: The model's routers cannot be seen.
        """
        asked = loads is not None or balancing is not None
        layers = routed_layers(model) if asked else {}
        counted = {layer.name: _counted(layer.name, model, batch) for layer in layers.values()}
        return cls(layers, counted, loads, balancing)

    @contextmanager
    def on(self, tape: Tape) -> Iterator[None]:
        """Has the experts' rules report to here, and the routers."""
        if not self._layers:
            yield
            return
        tape.routes = self
        with ExitStack() as stack:
            for experts, layer in self._layers.items():
                note = partial(self._note_scores, experts, layer.experts)
                stack.callback(layer.router.register_forward_hook(note).remove)
            yield

    def _note_scores(self, place: int, experts: int, router: Any, inputs: Any, output: Any) -> None:
        # Among a router's outputs, the first that has a number for each expert.
        found = (p for p in output if p.is_floating_point() and p.shape[-1] == experts)
        self._scores[place] = next(found).reshape(-1, experts)

    def routed(self, module: nn.Module, chosen_NK: Tensor, weights: Tensor, again: bool) -> Tensor:
        """Takes in where a layer's tokens go.

        Args:
            module: The experts.
            chosen_NK: Experts of each token, or a one at them, [N, E], with zeros elsewhere.
            weights: The experts' weights, on whose way back a balancing loss is added.
            again: Whether a checkpointed layer is computed once more.

        Returns:
            The weights.

        Raises:
            NotPerSample: The layer is used twice, or not for the batch's tokens.
        """
        layer = self._layers.get(id(module))
        if layer is None:
            raise NotPerSample(
                f"{type(module).__name__} is not a layer of experts whose router can be seen: set "
                "balancing to none"
            )
        shares_BE = self._shares(layer, chosen_NK)
        name = f"{layer.name}.{LOAD}"
        if self._query is not None and not again and name in self._query.experts:
            if name in self._loads:
                raise NotPerSample(f"{layer.name!r} is used twice: set balancing to none")
            self._loads[name] = _bounded(shares_BE, self._query.bounds[name])
        if self._balancing is None:
            return weights
        return _AddedLoss.apply(weights, self._loss(layer, name, id(module), shares_BE))

    def sums(self, real_B: Tensor) -> dict[str, Tensor]:
        """The scaled sums of the loads, [E] float64 by name; none if none are asked.

        Args:
            real_B: Which samples count.

        Raises:
            NotPerSample: The forward pass left a layer out.
        """
        if self._query is None:
            return {}
        missing = self._query.experts.keys() - self._loads.keys()
        if missing:
            raise NotPerSample(f"{min(missing)!r} was not counted: set balancing to none")
        scale = self._query.scale
        return {name: scale * self._loads[name][real_B].sum(0) for name in self._query.experts}

    def _shares(self, layer: RoutedLayer, chosen: Tensor) -> Tensor:
        """The share of a sample's counted tokens at each expert, [B, E] float64."""
        if chosen.shape[1] == layer.experts != layer.choices:
            chosen_NE = chosen.double()
        else:
            chosen_NE = torch.zeros(
                chosen.shape[0], layer.experts, dtype=torch.float64, device=chosen.device
            ).scatter_(1, chosen, 1.0)
        return self._mean(layer, chosen_NE) / layer.choices

    def _mean(self, layer: RoutedLayer, rows_NE: Tensor) -> Tensor:
        """The mean of a sample's counted rows, [B, E]."""
        counted_BT = self._counted[layer.name].to(rows_NE.dtype)
        if rows_NE.shape[0] != counted_BT.numel():
            raise NotPerSample(
                f"{layer.name!r} got other tokens than the batch's B·T: set balancing to none"
            )
        rows_BTE = rows_NE.view(*counted_BT.shape, -1)
        # No matrix product, which autocast would round.
        total_BE = (counted_BT[..., None] * rows_BTE).sum(1)
        return total_BE / counted_BT.sum(1, keepdim=True).clamp_min(1)

    def _loss(self, layer: RoutedLayer, name: str, place: int, shares_BE: Tensor) -> Tensor:
        assert self._balancing is not None, "asked for only where there is a balancing loss"
        scores_NE = self._scores.pop(place)
        mean_BE = self._mean(layer, _probabilities(layer.router, wide(scores_NE)))
        public = self._balancing.shares
        f = shares_BE if public is None else public[name]
        each_B = layer.experts * (f.to(mean_BE) * mean_BE).sum(1)
        return self._balancing.strength / len(self._layers) * each_B


def _probabilities(router: nn.Module, scores_NE: Tensor) -> Tensor:
    """A router's probabilities of all experts, [N, E]."""
    if hasattr(router, "e_score_correction_bias"):
        # DeepSeek-V3 and its kin score each expert on its own.
        affinities = scores_NE.sigmoid()
        return affinities / affinities.sum(1, keepdim=True)
    return F.softmax(scores_NE, dim=1)


def _bounded(shares_BE: Tensor, bound: float) -> Tensor:
    """Each sample's deviations from even shares, cut to the bound."""
    deviations_BE = shares_BE - shares_BE.mean(1, keepdim=True)
    norms_B1 = deviations_BE.pow(2).sum(1, keepdim=True).sqrt()
    return deviations_BE * (bound / norms_B1).clamp_max(1)


def _counted(place: str, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Which tokens of each sample a layer counts, [B, T]."""
    if getattr(model.config, "is_encoder_decoder", False) and place.startswith("decoder"):
        given = batch.get("decoder_attention_mask")
        return batch["labels"] != -100 if given is None else given
    mask = batch.get("attention_mask")
    if mask is None:
        tokens = batch["input_ids"] if "input_ids" in batch else batch["hidden_states"]
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if mask.dim() != 2:
        raise NotPerSample(f"attention_mask has {mask.dim()} dimensions: give [B, T] to balance")
    return mask


class _AddedLoss(torch.autograd.Function):
    """The weights as they are; on the way back, one is the gradient of each sample's added loss."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, losses_B: Tensor) -> Tensor:
        ctx.ones = torch.ones_like(losses_B)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, ctx.ones
