"""What a played workload comes to, in numbers."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from dpmoe_operator.scheduling.points import best_weights
from dpmoe_operator.scheduling.policies import POLICIES
from dpmoe_operator.scheduling.round import Floats, Round
from dpmoe_operator.scheduling.shares import fair_jobs
from dpmoe_operator.simulate.engine import Played
from dpmoe_operator.simulate.workload import Workload


@dataclass(frozen=True)
class Summary:
    """One policy on one workload.

    Attributes:
        policy: Its name.
        tasks: How many there were; an elastic job is one.
        granted: How many got budget.
        weight: Their weight; of an elastic job, that of the point which was granted.
        weight_of_all: The weight of all tasks, each at its best point.
        upper_bound: No policy could grant more weight out of what was unlocked in the end, not even
            one that knows all tasks in advance; None if not asked for.
        wait_mean: Mean seconds from arrival to grant, of those granted; None if nobody was.
        wait_p95: Its 95th percentile.
        fair: How many tasks asked at most their fair share.
        fair_granted: Which part of those got budget; None if there were none.
        rounds: How many rounds there were.
        seconds: How long the simulation took.
        decided: How much of that the policy took.
    """

    policy: str
    tasks: int
    granted: int
    weight: float
    weight_of_all: float
    upper_bound: float | None
    wait_mean: float | None
    wait_p95: float | None
    fair: int
    fair_granted: float | None
    rounds: int
    seconds: float
    decided: float

    def to_object(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def summarise(
    played: Played, *, upper_bound: float | None = None, fair_shares: int | None = None
) -> Summary:
    """The numbers of a played workload.

    Args:
        played: What became of it.
        upper_bound: As `upper_bound` computes it.
        fair_shares: N of a fair share c/N. If None, that of DPF-N's unlocking; under any other
            unlocking, as many as tasks that ask for the block.
    """
    workload, granted = played.workload, played.granted
    waited = waits(played)
    fair = fair_jobs(_with_fair_shares(workload, fair_shares or played.rules.unlock.fair_shares))
    return Summary(
        policy=played.policy,
        tasks=workload.jobs,
        granted=int(granted.sum()),
        weight=float(workload.weight[granted].sum()),
        weight_of_all=float(best_weights(workload.whole).sum()),
        upper_bound=upper_bound,
        wait_mean=float(waited.mean()) if len(waited) else None,
        wait_p95=float(np.quantile(waited, 0.95)) if len(waited) else None,
        fair=int(fair.sum()),
        fair_granted=float(played.granted_jobs[fair].mean()) if fair.any() else None,
        rounds=played.rounds,
        seconds=played.seconds,
        decided=played.decided,
    )


def upper_bound(played: Played) -> float:
    """The weight that no policy exceeds on what was unlocked in the end, knowing all tasks.

    Unlocking depends on tasks and time only, so the bound is the same for all policies.
    """
    everything = replace(played.workload.whole, unlocked=played.unlocked)
    bound = POLICIES["dual"].rank(everything, None).bound
    assert bound is not None, "dual bounds every round"
    return bound


def waits(played: Played) -> Floats:
    """float64[G]: seconds from arrival to grant, of the granted tasks."""
    granted = played.granted
    waited: Floats = (played.granted_at - played.workload.arrival)[granted]
    return waited


def _with_fair_shares(workload: Workload, fair_shares: int | None) -> Round:
    """All tasks as one round that knows what a fair share is."""
    if fair_shares is None:
        return workload.whole
    shares = np.full(len(workload.capacity), fair_shares, dtype=np.int64)
    return replace(workload.whole, fair_shares=shares)
