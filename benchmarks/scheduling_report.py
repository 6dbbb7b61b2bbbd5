"""The scheduling benchmark as a page: targets, then every policy on every workload."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from benchmarks.common import Row, figure
from benchmarks.page import heading, targets
from dpmoe_operator.simulate.summary import Summary

_PLOTS = """
## Plots

Thirty days of the Alibaba-DP surrogate. Written by
`dpmoe simulate tasks.csv.gz --horizon 30 --plots docs/results/plots`.

![Tasks granted over time, by policy](plots/granted.png)

![How long granted tasks waited, by policy](plots/waits.png)

![Budget of each block in the end, dual](plots/budget-dual.png)

![Budget of each block in the end, DPF](plots/budget-dpf.png)
"""

_NOTES = """
- *DPack as published* and *DPack's artifact* pick a block's orders as the authors' code does: by
  how many of all who wait would fit, whatever they weigh and whether they can be granted or not,
  and tied orders are summed; once a round, or anew after every 50 grants. Ranks are by weight.
  At all five horizons with weights by size, they grant the same tasks in the same rounds as that
  code itself (columbia/dpack@706b990) does.
  *dpack* is ours, which picks one order, by weight; with weights it grants more than as published.
- *weight by size*: thousandths of ε times blocks, the profit that the authors' generator calls
  `ksize`.
- *elastic*: every task would also take half its demand for 0.8 of its weight, or a quarter for 0.6.
  Where budget unlocks bit by bit, only foresight makes that a gain: without it, tasks settle for
  the little that is there when they come.
- *dual, 30 days ahead*: with foresight, budget is kept for tasks that are worth more and fit once
  more is unlocked, up to the last round, and who is not worth twice its price waits until then for
  tasks that are yet to come.
- *dual, fairness f*: the part f of the budget goes in DPF's order first.
- *bound*: no policy could grant more weight out of what was unlocked in the end, not even one that
  knows all tasks in advance.
- *fair*: of the tasks that ask at most a fiftieth of each of their blocks, the part that got it.
- *decided*: seconds that the policy took, over all rounds.
- Targets were set on other random draws of the same workloads. The bound says what was possible on
  these: where it is below a target, no policy could have met it. The ratio of weights that no
  policy exceeds stands as the peer of each ratio of weights, against the same DPack.
- PrivateKube's figures were measured with its own simulator on its own seed (its workload, another
  random stream). Times are of different machines where the peer is not in the same run.
"""


@dataclass(frozen=True)
class Detail:
    """One policy on one workload."""

    workload: str
    seed: int
    unlock: str
    summary: Summary


def write_markdown(
    path: Path,
    rows: Sequence[Row],
    details: Sequence[Detail],
    *,
    packages: Sequence[str],
    seed: int,
    quick: bool,
    load: float,
) -> None:
    """Write the page.

    Args:
        path: The file.
        rows: Figures with targets.
        details: Every policy on every workload, those of one workload together.
        packages: Python packages whose versions matter.
        seed: Of the run.
        quick: Whether sizes were small.
        load: The machine's load average when the run began.
    """
    head = heading(
        "Scheduling: policies on published workloads",
        "python benchmarks/scheduling.py",
        packages=packages,
        seed=seed,
        load=load,
        quick=quick,
    )
    parts = [*head, "## Targets\n", *targets(rows, digits=4)]
    if details:
        parts += [_PLOTS, "\n## All policies\n", _all_policies(details)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, _NOTES]))


def _all_policies(details: Sequence[Detail]) -> str:
    lines = [
        "| workload | policy | granted | weight | bound | fair | mean wait | decided s |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (workload, seed, unlock), group in groupby(
        details, lambda detail: (detail.workload, detail.seed, detail.unlock)
    ):
        name = f"{workload}, seed {seed}, unlock {unlock}"
        for detail in group:
            summary = detail.summary
            cells = [
                *(name, summary.policy, f"{summary.granted:,}", _figure(summary.weight)),
                *map(_figure, (summary.upper_bound, summary.fair_granted, summary.wait_mean)),
                f"{summary.decided:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
            name = ""
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "" if value is None else figure(value, digits=4)
