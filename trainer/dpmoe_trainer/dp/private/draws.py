"""From one draw to one step: what happened to the batch that a loop is at.

The accounting holds if every step releases one fresh Poisson sample, each sample clipped once. A
loop that is somebody else's could train on a batch twice, add two batches up, or bring a batch of
its own. So the loader, the module and the optimiser share this, and go one way:
drawn → clipped → handed over → released.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class LoopError(RuntimeError):
    """The training loop does what the accounting does not cover."""


@dataclass(frozen=True)
class ClippedSum:
    """A batch's sum, and what it was clipped to.

    Attributes:
        sums: By parameter name.
        clipping_norm: C.
    """

    sums: dict[str, Tensor]
    clipping_norm: float


class Draws:
    """The batch that is under way."""

    def __init__(self) -> None:
        self._drawn: int | None = None
        self._clipped: ClippedSum | None = None

    def draw(self, samples: int) -> None:
        """The loader gives a batch out; one that was not used costs nothing."""
        self._drawn, self._clipped = samples, None

    def hand_over(self, samples: int, clipped: ClippedSum) -> None:
        """The backward pass of a clipped batch.

        Raises:
            LoopError: It is not the batch that was drawn last, or was handed over before.
        """
        if self._drawn is None or self._clipped is not None:
            raise LoopError(
                "backward() was called for a second batch before step(), or for one that was used: "
                "draw a batch from the loader for every step, and train on it once"
            )
        if samples != self._drawn:
            raise LoopError(
                "the batch has not the samples that were drawn: give the model the loader's whole "
                "batch (max_physical_batch_size of make_private bounds its memory)"
            )
        self._clipped = clipped

    def release(self) -> ClippedSum:
        """The optimiser takes the sum, once.

        Raises:
            LoopError: There is none.
        """
        if self._clipped is None:
            raise LoopError("step() was called without a batch: call backward() before")
        released = self._clipped
        self._drawn, self._clipped = None, None
        return released
