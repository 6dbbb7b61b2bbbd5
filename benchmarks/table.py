"""A result file as Markdown for a README: `python -m benchmarks.table FILE`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import Row, figure


def main(file: Annotated[Path, typer.Argument(help="What a benchmark wrote with --json.")]) -> None:
    """Print a result file as a Markdown table, with where its figures come from."""
    result = json.loads(file.read_text())
    print("\n".join(_lines(result)))


def write_page(path: Path, title: str, command: str, result: dict[str, Any]) -> None:
    """Write a result as a page of the documentation.

    Args:
        path: where.
        title: of the page.
        command: that writes it.
        result: what a benchmark wrote with --json.
    """
    head = [
        f"# {title}",
        "",
        f"Written by `{command}`; `benchmarks/README.md` says what rows mean.",
    ]
    path.write_text("\n".join([*head, "", *_lines(result), ""]))


def _lines(result: dict[str, Any]) -> list[str]:
    return [*_origin(result), "", *_table([Row(**row) for row in result["rows"]])]


def _origin(result: dict[str, Any]) -> list[str]:
    machine, commit = result["machine"], result["commit"][:12]
    changed = " with changes" if result["modified"] else ""
    sizes = "quick sizes" if result["quick"] else "full sizes"
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return [
        f"Commit {commit}{changed}, seed {result['seed']}, {sizes}, on {machine['cores']} cores of"
        f" {machine['cpu']}, {machine['memory'] / 2**30:.0f} GiB, {machine['os']}, GPU"
        f" {machine['gpu'] or 'none'}; load {machine['load_before']:.1f} before and"
        f" {machine['load_after']:.1f} after; {versions}.",
    ]


def _table(rows: list[Row]) -> list[str]:
    lines = ["| measured | ours | target | peer |", "|---|---:|---:|---|"]
    for row in rows:
        sign = "≤" if row.better == "lower" else "≥"
        missed = "" if row.met in (None, True) else " (missed)"
        target = "" if row.target is None else f"{sign} {figure(row.target)}{missed}"
        peer = "" if row.peer is None else f"{figure(row.peer)} {row.peer_name}"
        lines.append(f"| {row.name} | {figure(row.ours)} {row.unit} | {target} | {peer} |")
    return lines


if __name__ == "__main__":
    typer.run(main)
