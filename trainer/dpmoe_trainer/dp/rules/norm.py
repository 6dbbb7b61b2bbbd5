"""Layer norms and RMS norms: y = w⊙x̂ + b, with x̂ normalised within a row.

Only the scale and shift are parameters. Their gradients of one sample are as small as themselves,
so they are formed and kept: Σ_t g_t⊙x̂_t and Σ_t g_t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from dpmoe_trainer.dp.errors import UncoveredParameter
from dpmoe_trainer.dp.rules.linear import Bias
from dpmoe_trainer.dp.tape import Kept, Tape
from dpmoe_trainer.dp.uses import Formed, wide


class Scale(Formed):
    """A weight that multiplies every row elementwise."""

    def __init__(self, tape: Tape, name: str, scaled: Callable[[], Tensor]) -> None:
        super().__init__(name)
        self._tape = tape
        self._scaled = scaled

    def form(self) -> Tensor:
        """Σ_t g_t⊙x̂_t, [B, D]."""
        return self._tape.by_sample(wide(self.gradient) * wide(self._scaled())).sum(1)


def layer_norm(
    tape: Tape,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Stands for `torch.nn.functional.layer_norm` over the last dimension."""
    weight_name, weight_value = tape.claim(weight, "layer_norm")
    bias_name, bias_value = tape.claim(bias, "layer_norm")
    _require_last_dimension(normalized_shape, weight_name or bias_name)
    output = F.layer_norm(input, normalized_shape, weight_value, bias_value, eps)
    if weight_name is not None:
        kept = Kept(input)
        output = tape.record(
            output,
            Scale(tape, weight_name, lambda: F.layer_norm(kept.value(), normalized_shape, eps=eps)),
        )
    if bias_name is not None:
        output = tape.record(output, Bias(tape, bias_name))
    return output


def rms_norm(
    tape: Tape,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Stands for `torch.nn.functional.rms_norm` over the last dimension."""
    name, value = tape.claim(weight, "rms_norm")
    _require_last_dimension(normalized_shape, name)
    assert name is not None, "rules run for trained parameters"
    output = F.rms_norm(input, list(normalized_shape), value, eps)
    kept = Kept(input)
    return tape.record(
        output, Scale(tape, name, lambda: F.rms_norm(kept.value(), list(normalized_shape), eps=eps))
    )


def multiply(tape: Tape, one: Tensor, other: Tensor) -> Tensor:
    """Stands for `*`, as RMS norms written out in Python end with: weight times normalised rows.

    Raises:
        UncoveredParameter: The trained factor is not a vector over the other's last dimension.
    """
    trained, rows = (one, other) if tape.is_trained(one) else (other, one)
    name, value = tape.claim(trained, "multiply")
    assert name is not None, "rules run for trained parameters"
    assert value is not None, "a trained parameter has a value"
    if not isinstance(rows, Tensor) or rows.dim() < 2 or value.shape != rows.shape[-1:]:
        raise UncoveredParameter(
            f"trained parameter {name!r} is multiplied with something other than rows of its own "
            "width, for which there is no per-sample norm: freeze it"
        )
    return tape.record(value * rows, Scale(tape, name, Kept(rows).value))


def _require_last_dimension(normalized_shape: Sequence[int], name: str | None) -> None:
    if len(normalized_shape) != 1:
        raise UncoveredParameter(
            f"norm {name!r} spans the last {len(normalized_shape)} dimensions; only norms over the "
            "last one are supported: freeze it"
        )
