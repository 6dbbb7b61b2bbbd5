"""The outcome of a simulation as a table for people and as an object for programs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from dpmoe_operator.simulate.engine import Played
from dpmoe_operator.simulate.rules import Rules
from dpmoe_operator.simulate.summary import Summary
from dpmoe_operator.simulate.workload import Workload

_COLUMNS = (
    *("granted", "weight", "bound", "mean wait", "p95 wait", "fair"),
    *("rounds", "decided", "total"),
)


def to_object(
    workload: Workload, rules: Rules, played: Sequence[Played], summaries: Sequence[Summary]
) -> dict[str, Any]:
    """Everything as JSON: the summaries, and when each task was granted."""
    return {
        "workload": {
            "name": workload.name,
            "tasks": workload.jobs,
            "blocks": workload.blocks,
            "orders": workload.orders.tolist(),
        },
        "rules": {
            "unlock": str(rules.unlock),
            "period": rules.period,
            "until": rules.until,
            "foresight": rules.foresight,
        },
        "results": [
            {**summary.to_object(), "granted_at": _times(one), **_points(one)}
            for one, summary in zip(played, summaries, strict=True)
        ],
    }


def to_table(workload: Workload, rules: Rules, summaries: Sequence[Summary]) -> Table:
    """One row a policy."""
    table = Table(
        title=f"{workload.name}\n{workload.jobs:,} tasks, {workload.blocks:,} blocks,"
        f" {len(workload.orders)} orders, unlock {rules.unlock}",
        caption="bound: no policy could grant more weight. fair: of the tasks that ask at most\n"
        "their fair share, which part got it. decided, total: seconds of the policy, of all.",
        box=None,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    table.add_column("policy", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for summary in summaries:
        table.add_row(
            summary.policy,
            f"{summary.granted:,}",
            _figure(summary.weight),
            _figure(summary.upper_bound),
            _figure(summary.wait_mean),
            _figure(summary.wait_p95),
            "–" if summary.fair_granted is None else f"{summary.fair_granted:.0%}",
            f"{summary.rounds:,}",
            f"{summary.decided:.2f}",
            f"{summary.seconds:.2f}",
        )
    return table


def _times(played: Played) -> list[float | None]:
    """When each job was granted."""
    granted = np.full(played.workload.jobs, np.nan)
    job = played.workload.whole.job_of_task[played.granted]
    granted[job] = played.granted_at[played.granted]
    return [None if np.isnan(time) else time for time in granted.tolist()]


def _points(played: Played) -> dict[str, list[float | None]]:
    """What the granted point of each job weighs, where some are elastic."""
    if played.workload.group is None:
        return {}
    weight = np.full(played.workload.jobs, np.nan)
    job = played.workload.whole.job_of_task[played.granted]
    weight[job] = played.workload.weight[played.granted]
    return {"granted_weight": [None if np.isnan(one) else one for one in weight.tolist()]}


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
