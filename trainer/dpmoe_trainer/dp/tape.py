"""The tape: every use of a trained parameter in one forward pass, seen or refused.

Per-sample clipping is safe only if *all* of a parameter's gradient passes through it. So the
engine does not look for known modules; it watches the parameters. While a tape runs, each call of
a torch function that touches a trained parameter goes to that function's rule (`dp.rules`), and a
call without a rule is an error that names the parameter. Routers, norms and projections of any
model family are thereby covered by their own forward code, and nothing on the model is patched.

A rule computes its output from detached weights, so that the backward pass forms activation
gradients only, and records a `Use`: what turns the output's gradient into norms, and later, once
the clip factors are known, into the clipped weight gradient (book-keeping: Bu et al. 2022,
"Differentially Private Optimization on Large Model at Small Cost", arXiv 2210.00038).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dpmoe_trainer.dp.errors import NotPerSample, UncoveredParameter

Rule = Callable[..., Tensor]
"""Called with the tape and then exactly as the torch function that it stands for."""

# Reading a parameter's metadata tells nothing that a gradient could flow through.
_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_meta")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point}


def wide(tensor: Tensor) -> Tensor:
    """The tensor in at least float32: norms and sums are never formed in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Kept:
    """A layer's input, kept for the backward pass; one that was changed since is not given out.

    Autograd checks this for what it keeps itself; here it is told that weights need no gradient.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        self._version = self._count_changes()

    def value(self) -> Tensor:
        """The input as the layer saw it.

        Raises:
            NotPerSample: The model has since changed it in place.
        """
        if self._count_changes() != self._version:
            raise NotPerSample(
                "the model changed a trained layer's input in place, so its gradient is lost: "
                "freeze that layer"
            )
        return self._tensor

    def _count_changes(self) -> int | None:
        return None if self._tensor.is_inference() else self._tensor._version


class Use(ABC):
    """One use of trained parameters, from its output's gradient to its clipped gradient sum."""

    @abstractmethod
    def squared_norms(self, gradient: Tensor) -> Tensor:
        """Takes the loss gradient of the output; returns this use's part of ‖∇ℓ_b‖², [batch]."""

    @abstractmethod
    def clipped_sum(self, factors: Tensor) -> dict[str, Tensor]:
        """Σ_b factors[b]·∇ℓ_b for each parameter of this use, by parameter name."""


class Tape:
    """Collects the uses of the trained parameters during one forward and backward pass.

    Attributes:
        batch: Samples in the batch, B.
        length: Tokens of each sample, padding included, T.
        squared_norms: Each sample's ‖∇ℓ_b‖² so far, [B] float64.
        fired: The uses whose output received a gradient.
    """

    _active: Tape | None = None

    def __init__(
        self, trained: Mapping[str, nn.Parameter], batch: int, length: int, device: torch.device
    ) -> None:
        self.batch = batch
        self.length = length
        self.squared_norms = torch.zeros(batch, dtype=torch.float64, device=device)
        self.fired: list[Use] = []
        self._trained = {
            id(parameter): (name, parameter, parameter.detach())
            for name, parameter in trained.items()
        }
        self._claimed: dict[str, str] = {}
        self._gram: tuple[Tensor, Tensor] | None = None

    @classmethod
    def active(cls) -> Tape:
        """The tape that runs now; rules reached through a module's seam ask for it."""
        assert cls._active is not None, "no tape runs"
        return cls._active

    @contextmanager
    def watching(self, rules: dict[Callable[..., Any], Rule]) -> Iterator[None]:
        """Sends every torch call that touches a trained parameter to its rule."""
        assert Tape._active is None, "tapes do not nest"
        Tape._active = self
        try:
            with _Watch(self, rules):
                yield
        finally:
            Tape._active = None

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Refuses a gradient that reaches a parameter itself.

        It came through something that no watch over calls can see, such as a view of the parameter
        taken before the tape ran.
        """
        with ExitStack() as stack:
            for name, parameter, _ in self._trained.values():
                stack.callback(parameter.register_hook(partial(_refuse_gradient, name)).remove)
            yield

    def claim(self, parameter: Tensor | None, use: str) -> tuple[str | None, Tensor | None]:
        """Takes a parameter for a rule: its name (None if frozen) and the value to compute with.

        Raises:
            UncoveredParameter: The parameter was used before in this forward pass: the norm of a
                sum of two gradients is not the sum of their norms.
        """
        if parameter is None or id(parameter) not in self._trained:
            return None, parameter
        name, _, value = self._trained[id(parameter)]
        if name in self._claimed:
            raise UncoveredParameter(
                f"parameter {name!r} is used twice in one forward pass ({self._claimed[name]}, "
                f"then {use}), and tied weights are not supported: untie or freeze it"
            )
        self._claimed[name] = use
        return name, value

    def record(self, output: Tensor, use: Use) -> Tensor:
        """Has `use` receive the gradient of `output` in the backward pass."""
        if not output.requires_grad:
            output.requires_grad_()
        output.register_hook(partial(self._receive, use))
        return output

    def _receive(self, use: Use, gradient: Tensor) -> None:
        self.squared_norms += use.squared_norms(gradient)
        self.fired.append(use)

    def is_trained(self, tensor: Any) -> bool:
        """Whether this is one of the trained parameters."""
        return id(tensor) in self._trained

    def trained_in(self, arguments: Any) -> Iterator[Tensor]:
        """The trained parameters among a call's arguments, containers included."""
        if isinstance(arguments, Tensor):
            if self.is_trained(arguments):
                yield arguments
        elif isinstance(arguments, (list, tuple)):
            for argument in arguments:
                yield from self.trained_in(argument)
        elif isinstance(arguments, dict):
            yield from self.trained_in(tuple(arguments.values()))

    def is_claimed(self, parameter: Tensor) -> bool:
        """Whether a rule has taken this trained parameter."""
        return self.name_of(parameter) in self._claimed

    def name_of(self, parameter: Tensor) -> str:
        """A trained parameter's name in the model."""
        return self._trained[id(parameter)][0]

    def unclaimed(self) -> list[str]:
        """Trained parameters that the forward pass did not use."""
        return [name for name, _, _ in self._trained.values() if name not in self._claimed]

    def by_sample(self, rows: Tensor) -> Tensor:
        """Views [B, T, …, D] or [B·T, D] rows as [B, rows of a sample, D].

        Raises:
            NotPerSample: The rows are neither; which sample a row belongs to is then unknown.
        """
        if rows.dim() >= 2 and (
            rows.shape[0] == self.batch or tuple(rows.shape[:-1]) == (self.batch * self.length,)
        ):
            return rows.reshape(self.batch, -1, rows.shape[-1])
        raise NotPerSample(
            "a trained layer got rows that are neither [B, T, …, D] nor [B·T, D], so a row's "
            "sample is unknown: freeze that layer"
        )

    def gram(self, rows: Tensor) -> Tensor:
        """rows·rowsᵀ of each sample, [B, n, n]; kept for the next call (q, k and v share rows)."""
        if self._gram is None or not _same_memory(self._gram[0], rows):
            self._gram = (rows, wide(rows) @ wide(rows).transpose(1, 2))
        return self._gram[1]


class _Watch(TorchFunctionMode):
    """Sends every torch call that touches a trained parameter to its rule."""

    def __init__(self, tape: Tape, rules: dict[Callable[..., Any], Rule]) -> None:
        super().__init__()
        self._tape = tape
        self._rules = rules

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        touched = [*self._tape.trained_in(args), *self._tape.trained_in(kwargs)]
        if not touched or function in _METADATA:
            return function(*args, **kwargs)
        rule = self._rules.get(function)
        if rule is not None:
            output = rule(self._tape, *args, **kwargs)
            if all(self._tape.is_claimed(parameter) for parameter in touched):
                return output
        names = ", ".join(repr(self._tape.name_of(parameter)) for parameter in touched)
        raise UncoveredParameter(
            f"trained parameter {names} is used by {getattr(function, '__name__', function)}, for "
            "which there is no per-sample norm: freeze it, or add a rule to dpmoe_trainer.dp.rules"
        )


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return (one.data_ptr(), one.shape, one.stride()) == (
        other.data_ptr(),
        other.shape,
        other.stride(),
    )


def _refuse_gradient(name: str, gradient: Tensor) -> None:
    raise UncoveredParameter(
        f"a gradient reached trained parameter {name!r} around its per-sample rule: freeze it"
    )
