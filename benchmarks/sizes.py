"""How much of everything the ledger's benchmark takes."""

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True)
class Sizes:
    """Counts.

    Attributes:
        waiting: jobs in the crowd.
        blocks: that the crowd asks for.
        plans: distinct ones in the crowd.
        singles: jobs that come when nothing else waits.
        burst: jobs that come at once and all fit.
        arrivals: jobs that come one by one while the crowd waits.
        restarts: how often the operator is killed and started again in the same pod.
        takeovers: how often it is killed and one in another pod takes over.
        appends: entries appended one by one.
        patches: statuses written in one turn.
        grants: in the long history.
        accounts: that it charges.
        repeats: how often a fold is timed.
        quiet_seconds: after how long without any change the operator counts as done.
    """

    waiting: int
    blocks: int
    plans: int
    singles: int
    burst: int
    arrivals: int
    restarts: int
    takeovers: int
    appends: int
    patches: int
    grants: int
    accounts: int
    repeats: int
    quiet_seconds: float


FULL = Sizes(
    waiting=5000,
    blocks=200,
    plans=50,
    singles=20,
    burst=100,
    arrivals=60,
    restarts=3,
    takeovers=3,
    appends=1000,
    patches=2000,
    grants=100_000,
    accounts=1000,
    repeats=5,
    quiet_seconds=6.0,
)
QUICK = Sizes(
    waiting=100,
    blocks=10,
    plans=3,
    singles=1,
    burst=10,
    arrivals=3,
    restarts=1,
    takeovers=0,
    appends=50,
    patches=100,
    grants=1000,
    accounts=50,
    repeats=1,
    quiet_seconds=1.0,
)
