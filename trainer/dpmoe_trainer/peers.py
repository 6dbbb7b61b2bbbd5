"""How the ranks of a run agree on what it does next, whatever carries their words."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Peers:
    """The ranks of a run, and how they agree; by default, one process alone.

    Attributes:
        rank: this process's, from 0.
        world: how many there are.
        any_of: whether any rank says so; all must call it, and none goes on before.
        from_first: rank 0's value, for all; all must call it.
    """

    rank: int = 0
    world: int = 1
    any_of: Callable[[bool], bool] = lambda mine: mine
    from_first: Callable[[Any], Any] = lambda value: value

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0
