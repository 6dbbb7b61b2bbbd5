"""What every page of results has: where its figures come from, and the table of its rows."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version

from benchmarks.common import Row, commit, figure, machine


def heading(
    title: str,
    command: str,
    *,
    packages: Sequence[str],
    seed: int,
    load: float,
    versions: dict[str, str] | None = None,
    quick: bool = False,
) -> list[str]:
    """The beginning of a page, in lines.

    Args:
        title: its heading.
        command: what wrote it.
        packages: whose versions matter.
        seed: of the run.
        load: the machine's load average when the run began.
        versions: of what is no package.
        quick: whether sizes were small.
    """
    host, measured = machine(), commit()
    numbers = {"Python": platform.python_version()}
    numbers |= {package: version(package) for package in packages} | (versions or {})
    return [
        f"# {title}",
        "",
        f"Written by `{command}`.",
        "",
        f"- machine: {host['cpu']}, {host['cores']} cores, {host['memory'] / 2**30:.0f} GiB,"
        f" {host['os']}, GPU {host['gpu'] or 'none'}",
        f"- load average before and after: {load:.2f}, {os.getloadavg()[0]:.2f}",
        f"- versions: {', '.join(f'{name} {number}' for name, number in numbers.items())}",
        f"- commit {measured['commit'][:12]}{', modified' if measured['modified'] else ''};"
        f" seed {seed}",
        *(["- quick: small sizes, no figures to quote"] if quick else []),
        "",
    ]


def targets(rows: Sequence[Row], digits: int = 3) -> list[str]:
    """The rows as a table, in lines."""
    head = ["| measured | ours | target | met | beside | |", "|---|---:|---:|---|---:|---|"]
    return [*head, *(_line(row, digits) for row in rows), ""]


def _line(row: Row, digits: int) -> str:
    sign = "≤" if row.better == "lower" else "≥"
    target = "" if row.target is None else f"{sign} {figure(row.target, digits)}"
    met = {None: "", True: "yes", False: "**no**"}[row.met]
    beside = ("", "") if row.peer is None else (figure(row.peer, digits), row.peer_name)
    cells = [row.name, f"{figure(row.ours, digits)} {row.unit}", target, met, *beside]
    return f"| {' | '.join(cells)} |"
