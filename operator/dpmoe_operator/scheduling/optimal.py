"""Optimal: the best set of tasks for a round, by integer programming. For small rounds.

The privacy knapsack as DPack states it (Tholoniat et al., EuroSys 2025, Section 3): with x_i for
granting task i and z_jα for holding block j at order α,

    max Σ_i w_i x_i   s.t.   Σ_i d_iα x_i + M_jα z_jα ≤ a_jα + M_jα   for all j, α
                             Σ_α z_jα ≥ 1                             for all j
                             x, z ∈ {0, 1},

and at most one point of an elastic job, Σ x_i ≤ 1 over its points. M_jα lets an order go that a
block is not held at. The smaller it is, the tighter is the relaxation: not all tasks together, but
at most what tasks could ask at α while the block is held at another order, less a_jα. Blocks that
would hold if every task were granted are left out.

HiGHS solves it from the solution of `dual`; where that meets its own bound there is nothing left
to solve. The problem is NP-hard: in rounds of more than about a hundred tasks the time limit
decides, and the best solution so far counts.

The solver works in floats with tolerances. Its answer is only an order in which tasks are tried:
filling decides in exact integers, and drops a task that the tolerances had let in.
"""

from dataclasses import dataclass, field, replace

import highspy
import numpy as np
from numpy.typing import NDArray

from dpmoe_operator.scheduling import dual
from dpmoe_operator.scheduling.bounds import rounded
from dpmoe_operator.scheduling.filling import fill, left_after, tasks_that_fit
from dpmoe_operator.scheduling.outcome import Prices, Ranking
from dpmoe_operator.scheduling.round import Floats, Ints, Round

_MOST_TRIPLES = 100_000
"""Of (task, block, order): in larger rounds the solver hardly gets beyond its first relaxation."""

_SOUND = (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kTimeLimit)
"""How the solver may end; its bound counts for nothing otherwise."""

_TINY = 1e-9

_OPTIONS: dict[str, bool | int | float] = {
    "output_flag": False,
    "threads": 1,
    "mip_rel_gap": 0.0,
    "mip_feasibility_tolerance": 1e-9,
    "primal_feasibility_tolerance": 1e-9,
}


def rank(round: Round, prices: Prices | None = None, *, seconds: float = 5.0) -> Ranking:
    """Rank the tasks of a round, the best set first.

    Args:
        round: The round.
        prices: Prices and picks of an earlier round, for `dual`.
        seconds: How long the solver may take. What it finds depends on the machine's speed then.
    """
    start = dual.rank(round, prices)
    granted = fill(round, start.order)
    weight, bound = float(round.weight[granted].sum()), start.bound
    assert bound is not None
    triples = len(round.indices) * len(round.orders)
    if weight >= bound or triples > _MOST_TRIPLES:
        return start
    chosen, proven = _solve(round, granted, seconds)
    # What the solver chose first, both parts in the order of `dual`.
    order = start.order[np.argsort(~chosen[start.order], kind="stable")]
    if float(round.weight[fill(round, order)].sum()) <= weight:
        order = start.order
    if weight <= proven < bound:
        bound = rounded(proven, round.weight)
    return replace(start, order=order, bound=bound)


@dataclass
class _Program:
    """The rows of the integer program, and the (block, order) of each z, one after the other."""

    tasks: int
    columns: list[Ints] = field(default_factory=list)
    values: list[Floats] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    choices: list[tuple[int, int]] = field(default_factory=list)

    def add_block(self, block: int, tasks: Ints, demand: Ints, available: Ints) -> None:
        """Add what holds at one block.

        Args:
            block: The block.
            tasks: int64[n], the tasks that ask for it and may get it.
            demand: int64[n, A], what they ask.
            available: int64[A], what it has.
        """
        orders = np.flatnonzero(available >= 0)
        # Over what is there. Who asks for more is out at that order: twice as much says so, too.
        room = np.where(available > 0, 1.0, 0.0)[orders]
        parts = np.minimum(demand / np.where(available > 0, available, 0.5), 2.0)[:, orders]
        if not len(tasks) or (parts.sum(axis=0) <= room).any():
            return
        first = self.tasks + len(self.choices)
        for place, order in enumerate(orders.tolist()):
            slack = max(0.0, _most_held_elsewhere(parts, room, place) - room[place])
            self.choices.append((block, order))
            self.columns.append(np.append(tasks, first + place))
            self.values.append(np.append(parts[:, place], slack))
            self.lower.append(-highspy.kHighsInf)
            self.upper.append(float(room[place] + slack))
        self.columns.append(first + np.arange(len(orders)))
        self.values.append(np.ones(len(orders)))
        self.lower.append(1.0)
        self.upper.append(highspy.kHighsInf)

    def add_job(self, points: Ints) -> None:
        """Add that at most one of an elastic job's points, int64[n], is granted."""
        self.columns.append(points)
        self.values.append(np.ones(len(points)))
        self.lower.append(-highspy.kHighsInf)
        self.upper.append(1.0)

    def model(self, weight: Floats) -> highspy.HighsLp:
        """The program as HiGHS takes it: first all x, then all z."""
        model = highspy.HighsLp()
        columns = self.tasks + len(self.choices)
        model.num_col_, model.num_row_ = columns, len(self.columns)
        model.sense_ = highspy.ObjSense.kMaximize
        model.col_cost_ = np.append(weight, np.zeros(len(self.choices)))
        model.col_lower_, model.col_upper_ = np.zeros(columns), np.ones(columns)
        model.integrality_ = [highspy.HighsVarType.kInteger] * columns
        model.row_lower_, model.row_upper_ = np.array(self.lower), np.array(self.upper)
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.cumsum([0, *map(len, self.columns)], dtype=np.int32)
        model.a_matrix_.index_ = np.concatenate(self.columns).astype(np.int32)
        model.a_matrix_.value_ = np.concatenate(self.values)
        return model


def _most_held_elsewhere(parts: Floats, room: Floats, at: int) -> float:
    """What tasks could ask at one order, at most, if the block is held at another one.

    For each other order a fractional knapsack; a little more than that, for the solver's floats.

    Args:
        parts: float64[n, A], what each task asks over what is there.
        room: float64[A], 1, or 0 where nothing is there.
        at: The place of the order.
    """
    most = 0.0
    for other in range(len(room)):
        fitting = parts[:, other] <= room[other]
        asked, value = parts[fitting, other], parts[fitting, at]
        if other == at or not len(asked):
            continue
        densest_first = np.argsort(asked / np.maximum(value, _TINY), kind="stable")
        asked, value = asked[densest_first], value[densest_first]
        before = np.cumsum(asked) - asked
        taken = np.clip((room[other] - before) / np.maximum(asked, _TINY), 0.0, 1.0)
        taken[asked == 0.0] = 1.0
        most = max(most, float((taken * value).sum()))
    return most * (1 + _TINY)


def _solve(round: Round, incumbent: Ints, seconds: float) -> tuple[NDArray[np.bool_], float]:
    """The solver's best set of tasks, bool[T], and a weight that it proved none to exceed."""
    hopeful = np.flatnonzero(tasks_that_fit(round, round.available))
    program = _Program(len(hopeful))
    pairs = round.pairs_of(hopeful)
    place = np.repeat(np.arange(len(hopeful)), np.diff(round.indptr)[hopeful])
    for block in range(round.blocks):
        tasks = place[round.indices[pairs] == block]
        program.add_block(block, tasks, round.demand[hopeful[tasks]], round.available[block])
    chosen = np.zeros(round.tasks, dtype=bool)
    first = np.flatnonzero(np.diff(round.job_of_task[hopeful], prepend=-1))
    for points in np.split(np.arange(len(hopeful)), first[1:]):
        if len(points) > 1:
            program.add_job(points)
    if not program.columns:
        chosen[hopeful] = True
        return chosen, float(round.weight[hopeful].sum())
    holds = left_after(round, incumbent) >= 0
    point = np.append(
        np.isin(hopeful, incumbent), [holds[block, order] for block, order in program.choices]
    )
    solver = highspy.Highs()
    for option, value in _OPTIONS.items():
        solver.setOptionValue(option, value)
    solver.setOptionValue("time_limit", seconds)
    solver.passModel(program.model(round.weight[hopeful]))
    solver.setSolution(len(point), np.arange(len(point), dtype=np.int32), point.astype(np.float64))
    solver.run()
    values = np.array(solver.getSolution().col_value)[: len(hopeful)]
    chosen[hopeful[np.flatnonzero(values > 0.5)]] = True
    if solver.getModelStatus() not in _SOUND:
        return chosen, np.inf
    return chosen, float(solver.getInfo().mip_dual_bound)
