"""A benchmark's figures as a page of the documentation."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.common import Row, commit, figure, machine


def write_page(
    path: Path,
    title: str,
    command: str,
    notes: str,
    rows: Sequence[Row],
    *,
    packages: Sequence[str],
    seed: int,
    load: float,
    versions: dict[str, str] | None = None,
    more: str = "",
) -> None:
    """Writes the page.

    Args:
        path: where.
        title: its heading.
        command: what wrote it.
        notes: what a reader must know, before the table.
        rows: the figures.
        packages: whose versions matter.
        seed: of the run.
        load: the machine's load average when the run began.
        versions: of what is no package.
        more: what stands after the table.
    """
    host, measured = machine(), commit()
    numbers = {"Python": platform.python_version()}
    numbers |= {package: version(package) for package in packages} | (versions or {})
    lines = [
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
        "",
        notes,
        "| measured | ours | target | met | beside | |",
        "|---|---:|---:|---|---:|---|",
        *map(_line, rows),
        "",
        *([more] if more else []),
    ]
    path.write_text("\n".join(lines))


def _line(row: Row) -> str:
    sign = "≤" if row.better == "lower" else "≥"
    target = "" if row.target is None else f"{sign} {figure(row.target)}"
    met = {None: "", True: "yes", False: "**no**"}[row.met]
    beside = "" if row.peer is None else figure(row.peer)
    name = "" if row.peer is None else row.peer_name
    return f"| {row.name} | {figure(row.ours)} {row.unit} | {target} | {met} | {beside} | {name} |"
