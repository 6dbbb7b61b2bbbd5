"""The run's secret key, and the random streams that come from it.

Noise protects only while nobody can predict it. Two things follow. The key comes from the system's
random generator, is never logged, and leaves the run at most onto its checkpoint volume. And its
streams are cryptographic: parts of the noise are seen exactly (the update of an expert that no
token reached is nothing else), and from those no other part may follow. torch's CPU generator would
fail both ways: it keeps 32 bits of a seed, and its Mersenne twister can be run on from 624 outputs.

A stream belongs to its context (what is drawn, for which parameter, expert and step) and to nothing
else. So it is the same on whatever rank, device or shard it is drawn, and again after a restart.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_KEY_BYTES = 32


def _fresh_secret() -> bytes:
    return secrets.token_bytes(_KEY_BYTES)


@dataclass(frozen=True)
class NoiseKey:
    """The secret that seeds a run's noise and sampling.

    Attributes:
        secret: The key's 32 bytes, fresh by default; not shown in its representation.
    """

    secret: bytes = field(default_factory=_fresh_secret, repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != _KEY_BYTES:
            raise ValueError(f"a key has {_KEY_BYTES} bytes, not {len(self.secret)}")

    def derive(self, purpose: str, *context: str | int) -> bytes:
        """A key for one stream: a keyed hash (BLAKE2b) of its context, 32 bytes."""
        # Any kind of integer names the same stream as Python's own.
        parts = [part if isinstance(part, str) else int(part) for part in (purpose, *context)]
        return hashlib.blake2b(repr(parts).encode(), key=self.secret, digest_size=32).digest()

    def uniform(self, count: int, purpose: str, *context: str | int) -> npt.NDArray[np.float64]:
        """Uniform numbers on the grid of 2⁻⁵³ in [0, 1), the same for the same context.

        The stream's key seeds an extendable-output hash (SHAKE-128).
        """
        stream = hashlib.shake_128(self.derive(purpose, *context)).digest(8 * count)
        grid = np.frombuffer(stream, dtype="<u8") >> np.uint64(11)
        return grid.astype(np.float64) * 2.0**-53
