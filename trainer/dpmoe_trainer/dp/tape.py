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

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpmoe_trainer.dp.clipping import Groups
from dpmoe_trainer.dp.errors import NotPerSample, UncoveredParameter
from dpmoe_trainer.dp.shared import Shared
from dpmoe_trainer.dp.uses import Clippable, Use, tied_squared_norms, wide
from dpmoe_trainer.parallel.company import Company

Rule = Callable[..., Tensor]
"""Called with the tape and then exactly as the torch function that it stands for."""


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


class RoutingObserver(Protocol):
    """Is told where the tokens of each layer of experts go."""

    def routed(self, module: nn.Module, chosen_NK: Tensor, weights: Tensor, again: bool) -> Tensor:
        """Takes in one layer's routing; returns the experts' weights to go on with."""


class Tape:
    """Collects the uses of the trained parameters during one forward and backward pass.

    Attributes:
        batch: Samples in the batch, B.
        lengths: How many tokens a sample has, padding included: T, and those of a decoder.
        device: Where the batch is.
        fired: What received a gradient, in the backward pass's order.
        routes: Who is told where tokens are routed, if anyone is.
    """

    _active: Tape | None = None

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        inputs: Collection[Tensor],
        groups: Groups,
        company: Company | None = None,
    ) -> None:
        first = next(iter(inputs))
        self.batch = first.shape[0]
        self.lengths = frozenset(entry.shape[1] for entry in inputs if entry.dim() > 1)
        self.device = first.device
        self.fired: list[Clippable] = []
        self.routes: RoutingObserver | None = None
        self._inputs = list(inputs)
        self._groups = groups
        self._squared_norms = torch.zeros(
            self.batch, len(groups.shares), dtype=torch.float64, device=self.device
        )
        self._company = company
        self._company_norms = self._squared_norms.new_zeros(
            0 if company is None else company.samples, len(groups.shares)
        )
        self._trained = {
            id(parameter): (name, parameter, parameter.detach())
            for name, parameter in trained.items()
        }
        self._uses: dict[str, list[str]] = {name: [] for name in trained}
        self._tied: dict[str, list[Use]] = {}
        self._replays = False
        self._start(self._keep)

    def _start(self, receive: Callable[[Use], None]) -> None:
        self._receive = receive
        self._claims: Counter[str] = Counter()
        self._aliases: dict[int, tuple[str, Tensor]] = {}
        self._shared: dict[int, tuple[Tensor, Shared]] = {}
        self._gram: tuple[Tensor, Tensor] | None = None

    def replay(self, receive: Callable[[Use], None]) -> Tape:
        """A tape for a part of the forward pass that is run again, whose uses go to `receive`."""
        tape = copy(self)
        tape._replays = True
        tape._start(receive)
        return tape

    @classmethod
    def active(cls) -> Tape:
        """The tape that runs now; rules reached through a module's seam ask for it."""
        assert cls._active is not None, "no tape runs"
        return cls._active

    @contextmanager
    def running(self) -> Iterator[None]:
        """Makes this the active tape."""
        assert Tape._active is None, "tapes do not nest"
        Tape._active = self
        try:
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

    # Parameters, and what a model derives from them.

    def claim(self, parameter: Tensor | None, use: str) -> tuple[str | None, Tensor | None]:
        """Takes a parameter for a rule: its name (None if frozen) and the value to compute with."""
        if parameter is None or not self.is_trained(parameter):
            return None, parameter
        name = self.name_of(parameter)
        self._claims[name] += 1
        if not self._replays:
            self._uses[name].append(use)
        if id(parameter) in self._aliases:
            return name, parameter
        return name, self._trained[id(parameter)][2]

    def alias(self, parameter: Tensor, value: Tensor) -> Tensor:
        """Has `value`, such as the parameter in another dtype, stand for the parameter."""
        value = value.detach()
        self._aliases[id(value)] = (self.name_of(parameter), value)
        return value

    def share(self, shared: Shared) -> Tensor:
        """Follows a value that all samples share from here on."""
        self._shared[id(shared.value)] = (shared.value, shared)
        return shared.value

    def shared(self, tensor: Any) -> Shared | None:
        """What is known of a tensor, if it is a value that all samples share."""
        found = self._shared.get(id(tensor))
        return None if found is None else found[1]

    def value_of(self, parameter: Tensor) -> Tensor:
        """The detached value of a trained parameter or of an alias of one."""
        return parameter if id(parameter) in self._aliases else self._trained[id(parameter)][2]

    def is_trained(self, tensor: Any) -> bool:
        """Whether this is one of the trained parameters, or stands for one."""
        return id(tensor) in self._trained or id(tensor) in self._aliases

    def name_of(self, parameter: Tensor) -> str:
        """A trained parameter's name in the model."""
        found = self._trained.get(id(parameter)) or self._aliases.get(id(parameter))
        if found is not None:
            return found[0]
        return self._shared[id(parameter)][1].name

    def touched_in(self, arguments: Any) -> list[Tensor]:
        """The trained parameters and what is made of them among arguments, containers included."""
        touched: list[Tensor] = []
        # Every torch call of the model comes by here, so this is a loop over identities.
        remaining = [arguments]
        for argument in remaining:
            if isinstance(argument, (list, tuple)):
                remaining.extend(argument)
            elif isinstance(argument, dict):
                remaining.extend(argument.values())
            elif (
                id(argument) in self._trained
                or id(argument) in self._aliases
                or id(argument) in self._shared
            ):
                touched.append(argument)
        return touched

    def claims(self, parameter: Tensor) -> int:
        """How often rules have taken this trained parameter."""
        return self._claims[self.name_of(parameter)]

    def unclaimed(self) -> list[str]:
        """Trained parameters that the forward pass did not use."""
        return [name for name, uses in self._uses.items() if not uses]

    def is_tied(self, name: str) -> bool:
        """Whether the forward pass used a parameter more than once."""
        return len(self._uses[name]) > 1

    # Uses, from the forward pass to the norms.

    def record(self, output: Tensor, use: Use) -> Tensor:
        """Has `use` receive the gradient of a layer's output, if there is to be a backward pass.

        Returns:
            The output that the model must go on with.
        """
        use.group = self._group_of(use.names)
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad or output._is_view():
            output = _Recorded.apply(torch.ones((), requires_grad=True), output)
        output.register_hook(partial(self._hand_over, use))
        return output

    def _group_of(self, names: tuple[str, ...]) -> int:
        groups = {self._groups.of[name] for name in names}
        if len(groups) > 1:
            raise UncoveredParameter(
                f"parameter {names[0]!r} and {len(names) - 1} others are computed together and are "
                "in several clipping groups: have one group match all of them"
            )
        return groups.pop()

    def _hand_over(self, use: Use, gradient: Tensor) -> None:
        use.gradient = gradient
        self._receive(use)

    def _keep(self, use: Use) -> None:
        self.add_norms(use)
        self.fired.append(use)

    def add_norms(self, use: Use) -> None:
        """Adds a use's part of the squared norms; one of a tied parameter waits for the others."""
        tied = [name for name in use.names if self.is_tied(name)]
        for name in tied:
            self._tied.setdefault(name, []).append(use)
        if not tied:
            norms_BG = self._company_norms if use.of_company else self._squared_norms
            norms_BG[:, use.group] += use.squared_norms()

    @torch.no_grad()
    def norms(self) -> Tensor:
        """‖∇ℓ_b‖ at each group of parameters, when the backward pass is over.

        Returns:
            [B, G] float64; where ranks share the experts, [S, G] of all their samples.
        """
        while self._tied:
            _, uses = self._tied.popitem()
            self._squared_norms[:, uses[0].group] += tied_squared_norms(uses)
        norms_BG = self._squared_norms
        if self._company is not None:
            norms_BG = self._company.gathered(norms_BG, self._company_norms)
        return norms_BG.clamp_min(0).sqrt()

    def routed(self, experts: nn.Module, chosen: Tensor, weights: Tensor) -> Tensor:
        """Tells where an experts module's tokens go; returns the weights to go on with."""
        if self.routes is None:
            return weights
        return self.routes.routed(experts, chosen, weights, self._replays)

    # Rows.

    def holds(self, ids: Tensor) -> bool:
        """Whether these are ids that the batch came with."""
        return any(_same_memory(ids, entry) for entry in self._inputs)

    def by_sample(self, rows: Tensor) -> Tensor:
        """Views [B, T, …, D] or [B·T, D] rows as [B, rows of a sample, D].

        Raises:
            NotPerSample: The rows are neither; which sample a row belongs to is then unknown.
        """
        if rows.dim() >= 2 and (rows.shape[0] == self.batch or self._is_flat(rows)):
            return rows.reshape(self.batch, -1, rows.shape[-1])
        raise NotPerSample(
            "a trained layer got rows that are neither [B, T, …, D] nor [B·T, D], so a row's "
            "sample is unknown: freeze that layer"
        )

    @property
    def company(self) -> Company:
        """The samples of the ranks that share the experts."""
        assert self._company is not None, "experts are shared, and nobody said with whom"
        return self._company

    def sample_of(self, tokens_ND: Tensor) -> Tensor:
        """The sample of each of [B·T, D] tokens, [N].

        Raises:
            NotPerSample: They are not the batch's tokens.
        """
        if not self._is_flat(tokens_ND):
            raise NotPerSample(
                "an experts layer got other tokens than the batch's B·T, so a token's sample is "
                "unknown"
            )
        samples = torch.arange(self.batch, device=tokens_ND.device)
        return samples.repeat_interleave(tokens_ND.shape[0] // self.batch)

    def _is_flat(self, rows: Tensor) -> bool:
        return rows.dim() == 2 and any(
            rows.shape[0] == self.batch * length for length in self.lengths
        )

    def gram(self, rows: Tensor) -> Tensor:
        """rows·rowsᵀ of each sample, [B, n, n]; kept for the next call (q, k and v share rows)."""
        if self._gram is None or not _same_memory(self._gram[0], rows):
            self._gram = (rows, wide(rows) @ wide(rows).transpose(1, 2))
        return self._gram[1]


class _Recorded(torch.autograd.Function):
    """The same numbers, as a tensor that has a gradient and that a model may change in place.

    Changed in place, a view is computed anew from what it is a view of, past the hooks that it had
    (a linear layer's output with a bias is one), and what has no history may not be changed at all.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor) -> Tensor:
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


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
