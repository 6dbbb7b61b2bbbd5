"""The policies by name. A policy is one module with `order` and `grant`, registered here.

A policy never decides whether something fits: it grants through `filling`, and the operator
re-verifies every round with `filling.check_grants` before it commits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dpmoe_operator.scheduling import dpf, fcfs
from dpmoe_operator.scheduling.round import Ints, Round


@dataclass(frozen=True)
class Policy:
    """How a round's budget is shared out.

    Attributes:
        name: Its name in settings, metrics and on the command line.
        order: All tasks of a round, most deserving first: int64[T]. What a rank is read from.
        grant: The tasks that get budget, in the order of their grants: int64[G].
    """

    name: str
    order: Callable[[Round], Ints]
    grant: Callable[[Round], Ints]


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            Policy("dpf", dpf.order, dpf.grant),
            Policy("fcfs", fcfs.order, fcfs.grant),
        )
    }
)


def policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ValueError: There is none; the message names those that exist.
    """
    if name not in POLICIES:
        raise ValueError(
            f"policy: {name!r} is unknown; choose one of {', '.join(sorted(POLICIES))}."
        )
    return POLICIES[name]
