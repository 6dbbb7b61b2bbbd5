"""The rules that a workload is played by: when rounds happen, and how budget unlocks."""

import math
import re
from dataclasses import dataclass

_UNLOCK = re.compile(
    r"immediate|arrivals:(?P<fair_shares>[0-9]{1,9})"
    r"|time:(?P<lifetime>[0-9]+(\.[0-9]+)?)(/(?P<steps>[0-9]{1,9}))?"
)
_MOST = 10**9
"""Fair shares and steps: their square must fit 64 bits."""


@dataclass(frozen=True)
class Unlock:
    """How each block's budget unlocks. With neither of both, at once.

    Attributes:
        fair_shares: DPF-N: with each of the first N tasks that ask for the block, one share c/N.
        lifetime: DPF-T: evenly over so many seconds from when the block opens.
        steps: With a lifetime: in so many equal steps; None for continuously, as the operator does.

    Raises:
        ValueError: Both are set, or a number is out of range.
    """

    fair_shares: int | None = None
    lifetime: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.fair_shares is not None and self.lifetime is not None:
            raise ValueError("unlock: set arrivals or a lifetime, not both.")
        if self.steps is not None and self.lifetime is None:
            raise ValueError(f"unlock: {self.steps} steps need a lifetime.")
        for name, number in (("arrivals", self.fair_shares), ("steps", self.steps)):
            if number is not None and not 1 <= number <= _MOST:
                raise ValueError(f"unlock: {number} {name} must lie in [1, {_MOST}].")
        if self.lifetime is not None and not 0 < self.lifetime < math.inf:
            raise ValueError(f"unlock: a lifetime of {self.lifetime} must be above 0 and finite.")

    @classmethod
    def parse(cls, text: str) -> "Unlock":
        """The rule that a command line states: `immediate`, `arrivals:N`, `time:SECONDS[/STEPS]`.

        >>> Unlock.parse("time:30/1000")
        Unlock(fair_shares=None, lifetime=30.0, steps=1000)

        Raises:
            ValueError: It is none of these.
        """
        match = _UNLOCK.fullmatch(text)
        if match is None:
            raise ValueError(
                f"unlock: {text!r} is no rule; say immediate, arrivals:N or time:SECONDS[/STEPS]"
            )
        fair_shares, lifetime, steps = match.group("fair_shares", "lifetime", "steps")
        return cls(
            fair_shares=int(fair_shares) if fair_shares else None,
            lifetime=float(lifetime) if lifetime else None,
            steps=int(steps) if steps else None,
        )

    def __str__(self) -> str:
        if self.fair_shares is not None:
            return f"arrivals:{self.fair_shares}"
        if self.lifetime is not None:
            steps = "" if self.steps is None else f"/{self.steps}"
            return f"time:{self.lifetime:g}{steps}"
        return "immediate"


@dataclass(frozen=True)
class Rules:
    """When rounds happen, and how budget unlocks.

    Attributes:
        unlock: How each block's budget unlocks.
        period: Seconds between rounds, the first one after one period; None for a round at every
            arrival, as PrivateKube's simulator does.
        until: When the last round happens at the latest. None for the first round that sees the
            last task. Later rounds matter where budget unlocks by time.
        foresight: How many seconds ahead unlocks by time are counted on, up to the last round; see
            `scheduling.policies`.

    Raises:
        ValueError: A number is out of range.
    """

    unlock: Unlock = Unlock()
    period: float | None = None
    until: float | None = None
    foresight: float = 0.0

    def __post_init__(self) -> None:
        if self.period is not None and not 0 < self.period < math.inf:
            raise ValueError(
                f"period: {self.period} must be above 0; leave it out for a round at every arrival."
            )
        if self.until is not None and not 0 <= self.until < math.inf:
            raise ValueError(f"until: {self.until} must be finite and at least 0.")
        if not 0 <= self.foresight < math.inf:
            raise ValueError(f"foresight: {self.foresight} must be finite and at least 0.")
        if self.foresight > 0 and self.unlock.lifetime is None:
            raise ValueError(f"foresight: {self.foresight} needs budget that unlocks by time.")
