"""Plots of a simulation: tasks over time, budget per block, and how long tasks waited.

Colours are those of Okabe and Ito, which people with any colour vision tell apart; lines differ in
their strokes as well, so that a plot survives a black-and-white printer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpmoe_operator.scheduling.round import Floats
from dpmoe_operator.simulate.engine import Played
from dpmoe_operator.simulate.summary import waits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STROKES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_MOST_BARS = 200


def write_plots(played: Sequence[Played], folder: Path) -> list[Path]:
    """Write all plots as PNG files into a folder; returns their paths.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "granted.png": _granted(played),
        "waits.png": _waits(played),
        **{f"budget-{one.policy}.png": _budget(one) for one in played},
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
    return [folder / name for name in figures]


def _granted(played: Sequence[Played]) -> "Figure":
    figure, axes = _axes("Tasks granted", played[0].workload.name)
    workload = played[0].workload
    first_points = np.diff(workload.whole.job_of_task, prepend=-1) > 0
    arrival = workload.arrival[first_points]
    # A little beyond the last grant, so that what it led to can be seen.
    last = [float(np.nanmax(one.granted_at, initial=0.0)) for one in played]
    end = 1.03 * max(float(arrival.max(initial=0.0)), *last)
    axes.step(arrival, np.arange(1, len(arrival) + 1), color="0.6", where="post", label="arrived")
    for place, one in enumerate(played):
        times = np.sort(one.granted_at[one.granted])
        axes.step(
            *_staircase(times, end),
            color=COLOURS[place % len(COLOURS)],
            linestyle=STROKES[place % len(STROKES)],
            where="post",
            label=f"{one.policy} ({len(times):,})",
        )
    axes.set_xlabel("time")
    axes.set_ylabel("tasks")
    axes.legend()
    return figure


def _waits(played: Sequence[Played]) -> "Figure":
    figure, axes = _axes("Waits of granted tasks", played[0].workload.name)
    for place, one in enumerate(played):
        waited = np.sort(waits(one))
        part = np.arange(1, len(waited) + 1) / max(1, len(waited))
        axes.step(
            waited,
            part,
            color=COLOURS[place % len(COLOURS)],
            linestyle=STROKES[place % len(STROKES)],
            where="post",
            label=one.policy,
        )
    axes.set_xlabel("time from arrival to grant")
    axes.set_ylabel("part of the granted tasks")
    axes.set_ylim(0, 1.02)
    axes.legend(loc="lower right")
    return figure


def _budget(played: Played) -> "Figure":
    """Each block's budget at the order of which it has the largest part left."""
    figure, axes = _axes(f"Budget of each block, {played.policy}", played.workload.name)
    spent, unlocked = budget_parts(played)
    if len(spent) > _MOST_BARS:
        axes.set_title(f"{axes.get_title()} (the latest {_MOST_BARS})")
        spent, unlocked = spent[-_MOST_BARS:], unlocked[-_MOST_BARS:]
    blocks = np.arange(len(spent))
    parts = (
        ("spent", spent, "//"),
        ("unlocked", unlocked, ""),
        ("locked", 1 - spent - unlocked, ".."),
    )
    bottom = np.zeros(len(spent))
    for (label, part, hatch), colour in zip(parts, ("#D55E00", "#56B4E9", "0.85"), strict=True):
        axes.bar(
            blocks,
            part,
            bottom=bottom,
            width=1.0,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0,
            label=label,
        )
        bottom = bottom + part
    axes.set_xlabel("block, the earliest first")
    axes.set_ylabel("part of its budget, at its best order")
    axes.set_ylim(0, 1)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def budget_parts(played: Played) -> tuple[Floats, Floats]:
    """float64[blocks] each: which part is spent, and which is unlocked and not spent.

    Both at the order of which the block has the largest part left, since that is the one that its
    guarantee will hold at.
    """
    blocks = ~played.workload.is_cap
    capacity = played.workload.capacity[blocks]
    spent, unlocked = played.spent[blocks], played.unlocked[blocks]
    usable = capacity > 0
    part = np.divide(spent, capacity, out=np.full(capacity.shape, np.inf), where=usable)
    best = part.argmin(axis=1)
    rows = np.arange(len(part))
    taken = np.clip(part[rows, best], 0, 1)
    open_part = np.divide(unlocked, capacity, out=np.zeros(capacity.shape), where=usable)
    return taken, np.clip(open_part[rows, best] - taken, 0, 1)


def _staircase(times: Floats, end: float) -> tuple[Floats, Floats]:
    """Times and counts of a curve from zero to an end."""
    counts = np.arange(len(times) + 1, dtype=np.float64)
    return np.concatenate(([0.0], times, [end])), np.append(counts, len(times))


def _axes(title: str, subtitle: str) -> "tuple[Figure, Axes]":
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "--plots: matplotlib is not installed; pip install 'dpmoe[simulate]'"
        ) from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(f"{title} — {subtitle}")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes
