"""The watch: while a tape runs, no torch call touches a trained parameter but through here.

A parameter's metadata may be read. A cast of it stands for it. What a model makes of a vector to
broadcast over the batch is followed (`dp.shared`). Every other call goes to its rule, and a call
without one is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from dpmoe_trainer.dp.errors import UncoveredParameter
from dpmoe_trainer.dp.shared import BROADCASTS, VIEWS, Shared
from dpmoe_trainer.dp.tape import Rule, Tape
from dpmoe_trainer.dp.uses import Formed, wide

# Reading a parameter's metadata tells nothing that a gradient could flow through.
_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_meta", "grad")
} | {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch._has_compatible_shallow_copy_type,
}

_CASTS = {torch.Tensor.to, torch.Tensor.type, torch.Tensor.float, torch.Tensor.type_as}

_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


@contextmanager
def watching(tape: Tape, rules: dict[Callable[..., Any], Rule]) -> Iterator[None]:
    """Sends every torch call that touches a trained parameter to its rule."""
    with tape.running(), _Watch(tape, rules):
        yield


class _Watch(TorchFunctionMode):
    def __init__(self, tape: Tape, rules: dict[Callable[..., Any], Rule]) -> None:
        super().__init__()
        self._tape = tape
        self._rules = rules

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        touched = self._tape.touched_in((args, kwargs))
        if not touched or function in _METADATA:
            return function(*args, **kwargs)
        if all(self._tape.shared(tensor) is not None for tensor in touched):
            return self._on_shared(function, args, kwargs, touched)
        only = len(touched) == 1 and bool(args) and touched[0] is args[0]
        if function in _CASTS and only:
            return self._cast(function, args, kwargs)
        if function == _SET_DATA and args[1] is args[0]:
            return None
        if function in VIEWS and only and args[0].dim() == 1:
            return self._tape.share(self._vector(args[0]).viewed(function, *args[1:], **kwargs))
        return self._by_rule(function, args, kwargs, touched)

    def _by_rule(self, function: Any, args: Any, kwargs: Any, touched: list[Tensor]) -> Any:
        rule = self._rules.get(function)
        if rule is None:
            raise self._uncovered(function, touched)
        before = {id(tensor): self._tape.claims(tensor) for tensor in touched}
        output = rule(self._tape, *args, **kwargs)
        if any(self._tape.claims(tensor) == before[id(tensor)] for tensor in touched):
            raise self._uncovered(function, touched)
        return output

    def _cast(self, function: Any, args: Any, kwargs: Any) -> Tensor:
        value = self._tape.value_of(args[0])
        cast = function(value, *args[1:], **kwargs)
        return args[0] if cast is value else self._tape.alias(args[0], cast)

    def _vector(self, parameter: Tensor) -> Shared:
        name, value = self._tape.claim(parameter, "a vector that all samples share")
        assert name is not None, "rules run for trained parameters"
        assert value is not None, "a trained parameter has a value"
        copies = value.expand(self._tape.batch, -1)
        return Shared(name, value, lambda: self._tape.record(copies, Copies(name)))

    def _on_shared(self, function: Any, args: Any, kwargs: Any, touched: list[Tensor]) -> Any:
        shared = self._tape.shared(args[0]) if args else None
        if function in VIEWS and len(touched) == 1 and shared is not None:
            return self._tape.share(shared.viewed(function, *args[1:], **kwargs))
        if function in BROADCASTS:
            args, kwargs = tree_map(self._batched, (args, kwargs))
            output = function(*args, **kwargs)
            if output.shape[0] == self._tape.batch:
                return output
        raise self._uncovered(function, touched)

    def _batched(self, value: Any) -> Any:
        shared = self._tape.shared(value)
        return value if shared is None else shared.batched()

    def _uncovered(self, function: Any, touched: list[Tensor]) -> UncoveredParameter:
        names = ", ".join(repr(self._tape.name_of(tensor)) for tensor in touched)
        return UncoveredParameter(
            f"trained parameter {names} is used by {getattr(function, '__name__', function)}, for "
            "which there is no per-sample norm: freeze it, or add a rule to dpmoe_trainer.dp.rules"
        )


class Copies(Formed):
    """A parameter of which every sample has a copy, whose gradient is the sample's."""

    def form(self) -> Tensor:
        """As they came."""
        return wide(self.gradient)
