"""Chooses which parameters a run trains; all others are frozen, and get neither norm nor noise."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn


def select_trainable(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freezes all parameters but those whose names match a pattern.

    Args:
        model: The model.
        patterns: Shell-style patterns of parameter names, such as `layers.5.*`.

    Returns:
        The trained parameters' names.

    Raises:
        ValueError: A pattern matches nothing; the model is then left as it was.
    """
    names = [name for name, _ in model.named_parameters()]
    if not patterns:
        raise ValueError("trainable has no patterns: name at least one, such as 'classifier.*'")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"trainable pattern {pattern!r} matches no parameter; the model has such as "
                f"{names[0]!r} and {names[-1]!r}"
            )
    trained = {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return [name for name in names if name in trained]
