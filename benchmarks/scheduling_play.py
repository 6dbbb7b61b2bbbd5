"""Playing workloads for the benchmark: policies, ours and published, and what is kept of them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.common import Recorder
from benchmarks.scheduling_report import Detail
from dpmoe_operator.scheduling import dpack, optimal
from dpmoe_operator.scheduling.outcome import Ranking
from dpmoe_operator.scheduling.policies import POLICIES, Policy
from dpmoe_operator.simulate.elastic import Part
from dpmoe_operator.simulate.engine import play
from dpmoe_operator.simulate.rules import Rules, Unlock
from dpmoe_operator.simulate.summary import Summary, summarise, upper_bound
from dpmoe_operator.simulate.workload import Workload

FAIR_SHARES = 50
"""N of the fair share that the traces' fairness column is about."""

FORESIGHT = 30.0
"""How far ahead unlocks are counted on: as long as a block's budget takes to unlock."""

FAIRNESS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the budget that go in DPF's order, to see what efficiency that costs."""

OFFLINE = Rules()
ARTIFACT = Rules(Unlock(lifetime=30.0, steps=1000), period=10.0)
"""By which DPack's artifact plays Alibaba-DP, in days."""


PARTS = (Part.parse("0.5:0.8"), Part.parse("0.25:0.6"))
"""What an elastic task would also take: half its demand for 0.8 of its worth, a quarter for 0.6."""


def _artifact_dpack(name: str, period: int | None) -> Policy:
    """DPack as its artifact does it: tied orders, task counts, anew after every `period` grants."""

    def rank(round: Any, _prices: Any) -> Ranking:
        order = dpack.order(round, published_ties=True, counting=True, period=period)
        return Ranking(order)

    return Policy(name, rank)


STATIC_DPACK = _artifact_dpack("DPack as published, orders once a round", None)
"""As the paper has it, and as the artifact's offline experiments set it."""
ONLINE_DPACK = _artifact_dpack("DPack's artifact, anew every 50 grants", 50)
"""As the artifact's online experiments set it."""
WHOLE_QUEUE = frozenset({STATIC_DPACK.name, ONLINE_DPACK.name})
"""Policies that look at all who wait, even at those who can't be granted, as the artifact does."""


PATIENT = Policy("optimal", partial(optimal.rank, seconds=60.0))
"""The optimum, with time to prove it."""


class Bench:
    """Plays workloads and keeps what becomes of them.

    Attributes:
        out: rows with targets.
        details: all policies on all workloads.
    """

    def __init__(self) -> None:
        self.out = Recorder()
        self.details: list[Detail] = []

    def play(
        self, workload: Workload, policies: Sequence[Policy], rules: Rules, seed: int
    ) -> dict[str, Summary]:
        """Play one workload by the same rules through several policies; summaries by their name."""
        played = [
            play(workload, policy, rules, whole_queue=policy.name in WHOLE_QUEUE)
            for policy in policies
        ]
        bound = upper_bound(played[0])
        summaries = [summarise(one, upper_bound=bound, fair_shares=FAIR_SHARES) for one in played]
        self.details += [
            Detail(workload.name, seed, str(rules.unlock), summary) for summary in summaries
        ]
        return {summary.policy: summary for summary in summaries}

    def look_ahead(self, workload: Workload, rules: Rules, seed: int) -> float:
        """Play one workload through `dual` with foresight; the weight that it grants."""
        played = play(workload, POLICIES["dual"], replace(rules, foresight=FORESIGHT))
        summary = summarise(played, fair_shares=FAIR_SHARES)
        named = replace(summary, policy=f"dual, {FORESIGHT:g} days ahead")
        self.details.append(Detail(workload.name, seed, str(rules.unlock), named))
        return summary.weight

    def trade(self, workload: Workload, rules: Rules, seed: int) -> None:
        """Play one workload through `dual` with several shares reserved for DPF's order."""
        for share in FAIRNESS:
            played = play(workload, POLICIES["dual"], rules, fairness=share)
            summary = replace(
                summarise(played, fair_shares=FAIR_SHARES), policy=f"dual, fairness {share:g}"
            )
            self.details.append(Detail(workload.name, seed, str(rules.unlock), summary))


def ours() -> list[Policy]:
    return [POLICIES[name] for name in ("fcfs", "dpf", "area", "dpack", "dual")]
