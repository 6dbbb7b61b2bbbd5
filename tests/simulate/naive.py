"""A simulator that is as plain as can be: every round anew, in Python's own integers."""

from dataclasses import replace
from fractions import Fraction
from math import ceil, floor

import numpy as np

from dpmoe_operator.scheduling.filling import tasks_that_fit
from dpmoe_operator.scheduling.policies import Policy
from dpmoe_operator.scheduling.round import Round
from dpmoe_operator.simulate.rules import Rules
from dpmoe_operator.simulate.workload import Workload


def play(
    workload: Workload, policy: Policy, rules: Rules, *, all_waiting: bool
) -> dict[int, float]:
    """When each granted task was granted.

    Args:
        workload: Blocks and tasks.
        policy: Who gets budget.
        rules: When rounds happen, and how budget unlocks.
        all_waiting: Whether the policy sees tasks that don't fit before the round, too.
    """
    granted: dict[int, float] = {}
    job = workload.whole.job_of_task.tolist()
    for now in round_times(workload, rules):
        waiting = [
            task
            for task in range(workload.tasks)
            if job[task] not in {job[one] for one in granted}
            and workload.arrival[task] <= now <= workload.arrival[task] + workload.timeout[task]
        ]
        if not waiting:
            continue
        round = round_of(workload, rules, now, waiting, granted)
        if not all_waiting:
            fitting = np.flatnonzero(tasks_that_fit(round, round.available))
            if len(fitting) == 0:
                continue
            waiting = [waiting[place] for place in fitting]
            round = round_of(workload, rules, now, waiting, granted)
        for place in policy.grant(round).granted.tolist():
            granted[waiting[place]] = now
    return granted


def round_times(workload: Workload, rules: Rules) -> list[float]:
    last = float(workload.arrival[-1])
    until = last if rules.until is None else rules.until
    if rules.period is None:
        times = {float(time) for time in workload.arrival if time <= until}
        return sorted(times | ({rules.until} if rules.until is not None else set()))
    count = ceil(last / rules.period) if rules.until is None else floor(until / rules.period)
    return [rules.period * number for number in range(1, count + 1)]


def round_of(
    workload: Workload, rules: Rules, now: float, waiting: list[int], granted: dict[int, float]
) -> Round:
    rows_of = [
        workload.indices[workload.indptr[task] : workload.indptr[task + 1]].tolist()
        for task in range(workload.tasks)
    ]
    held = [[0] * len(workload.orders) for _ in workload.capacity]
    for task in granted:
        for row in rows_of[task]:
            held[row] = [
                h + d for h, d in zip(held[row], workload.demand[task].tolist(), strict=True)
            ]
    unlocked = []
    for row, amounts in enumerate(workload.capacity.tolist()):
        arrivals = len(
            {
                int(workload.whole.job_of_task[task])
                for task in range(workload.tasks)
                if workload.arrival[task] <= now and row in rows_of[task]
            }
        )
        part = released(workload, rules, row, now, arrivals)
        unlocked.append([floor(a * part) if a > 0 else a for a in amounts])
    asked = [rows_of[task] for task in waiting]
    return replace(
        workload.whole,
        demand=workload.demand[waiting],
        indptr=np.cumsum([0, *map(len, asked)]),
        indices=np.array([row for rows in asked for row in rows]),
        consumed=np.array(held),
        unlocked=np.array(unlocked),
        arrival=workload.arrival[waiting],
        weight=workload.weight[waiting],
        priority=workload.priority[waiting],
        group=None if workload.group is None else workload.group[waiting],
    )


def released(workload: Workload, rules: Rules, row: int, now: float, arrivals: int) -> Fraction:
    """The unlocked part of a row."""
    unlock = rules.unlock
    if workload.is_cap[row]:
        return Fraction(1)
    if unlock.fair_shares is not None:
        return min(Fraction(1), Fraction(arrivals, unlock.fair_shares))
    if unlock.lifetime is not None:
        part = (Fraction(now) - Fraction(float(workload.opened[row]))) / Fraction(unlock.lifetime)
        part = max(Fraction(0), min(Fraction(1), part))
        return part if unlock.steps is None else Fraction(floor(part * unlock.steps), unlock.steps)
    return Fraction(1)
