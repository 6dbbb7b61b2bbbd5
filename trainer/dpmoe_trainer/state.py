"""What changes while a run trains, as one set of named tensors: all that a checkpoint holds.

Trained parameters, the optimiser's state by parameter name, and what balances the experts. Frozen
parameters come from the pretrained model again; the learning rate follows from the step, and all
randomness from the step and the run's key.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dpmoe_trainer.checkpoint import Part
from dpmoe_trainer.dp.balancing import Balancing
from dpmoe_trainer.errors import BadCheckpoint
from dpmoe_trainer.methods.dp_sgd import Updater
from dpmoe_trainer.models.expert_adapters import Factor

_MODEL, _OPTIMIZER, _BALANCING = "model.", "optimizer.", "balancing."


class State:
    """The state of one rank.

    Args:
        updater: holds the trained parameters and the optimiser.
        balancing: what keeps experts evenly used; the same on all ranks.
        parts: which trained parameters are only a part here, by name.
        factors: of trained adapters on fused experts, how they hold the experts'.
    """

    def __init__(
        self,
        updater: Updater,
        balancing: Balancing,
        parts: Mapping[str, Part] | None = None,
        factors: Mapping[str, Factor] | None = None,
    ) -> None:
        self._updater = updater
        self._balancing = balancing
        self._parts = dict(parts or {})
        self._factors = dict(factors or {})
        self._device = next(iter(updater.trained.values())).device

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name; what is by expert has the experts first."""
        named: dict[str, Tensor] = {
            f"{_MODEL}{name}": self._by_expert(name, parameter)
            for name, parameter in self._updater.trained.items()
        }
        named |= {
            f"{_OPTIMIZER}{name}": self._by_expert(name.rpartition(".")[0], part)
            for name, part in self._updater.state().items()
        }
        return named | {f"{_BALANCING}{n}": part for n, part in self._balancing.state().items()}

    def part_of(self, name: str) -> Part | None:
        """Which part of a tensor this rank has, None for all of it."""
        if name.startswith(_MODEL):
            return self._parts.get(name.removeprefix(_MODEL))
        if name.startswith(_OPTIMIZER):
            return self._parts.get(name.removeprefix(_OPTIMIZER).rpartition(".")[0])
        return None

    def parts(self) -> dict[str, Part]:
        """The parts among `tensors`; a number that belongs to one, as a step count, is none."""
        found = {name: self.part_of(name) for name, part in self.tensors().items() if part.dim()}
        return {name: part for name, part in found.items() if part is not None}

    def size(self) -> int:
        """Bytes that a checkpoint of all ranks holds, about."""
        trained = self._updater.trained
        here = sum(parameter.nbytes for parameter in trained.values())
        whole = sum(
            parameter.nbytes * part.of // max(part.count, 1)
            if (part := self._parts.get(name))
            else parameter.nbytes
            for name, parameter in trained.items()
        )
        return self._updater.state_bytes() * whole // max(here, 1)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Goes on from what `tensors` gave after `step` steps.

        Raises:
            BadCheckpoint: a trained parameter is not there, or of another shape or type.
        """
        for name, parameter in self._updater.trained.items():
            saved = tensors.get(f"{_MODEL}{name}")
            here = self._by_expert(name, parameter)
            if saved is None or saved.shape != here.shape or saved.dtype != here.dtype:
                found = "none" if saved is None else f"{tuple(saved.shape)} of {saved.dtype}"
                raise BadCheckpoint(
                    f"checkpoint.path: the checkpoint of step {step} has for {name!r} {found}, and "
                    f"the model {tuple(here.shape)} of {here.dtype}; use the pretrained "
                    f"model that the run began with, or apply the job anew"
                )
            parameter.copy_(self._as_kept(name, saved))
        optimizer = {
            name: self._as_kept(name.rpartition(".")[0], part)
            for name, part in _part(tensors, _OPTIMIZER).items()
        }
        self._updater.restore(optimizer, step)
        balancing = _part(tensors, _BALANCING)
        self._balancing.restore({n: part.to(self._device) for n, part in balancing.items()})

    def _by_expert(self, name: str, tensor: Tensor) -> Tensor:
        """As a checkpoint has it; a number that belongs to a parameter is as it is."""
        factor = self._factors.get(name) if tensor.dim() else None
        return tensor if factor is None else factor.by_expert(tensor).contiguous()

    def _as_kept(self, name: str, saved: Tensor) -> Tensor:
        factor = self._factors.get(name) if saved.dim() else None
        return saved if factor is None else factor.as_kept(saved)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): part for n, part in tensors.items() if n.startswith(prefix)}
