"""What became of the experts' loads, as a page of the documentation."""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from benchmarks.common import commit, figure, machine


class Seen(Protocol):
    """What was seen after a number of steps."""

    step: int
    most: float
    variation: float
    entropy: float
    accuracy: float
    loss: float


def write_page(
    path: Path,
    seen: Mapping[str, Sequence[Seen]],
    setting: str,
    packages: Sequence[str],
    seed: int,
    load: float,
) -> None:
    """Writes the page.

    Args:
        path: where.
        seen: by way of balancing, in the order of steps.
        setting: what was trained, in words.
        packages: whose versions matter.
        seed: of the run.
        load: the machine's load average when the run began.
    """
    host, measured = machine(), commit()
    numbers = {"Python": platform.python_version()}
    numbers |= {package: version(package) for package in packages}
    lines = [
        "# Balanced experts under differential privacy",
        "",
        "Written by `python -m benchmarks.balancing --model FOLDER --data FOLDER"
        f" --markdown {path}`.",
        "",
        f"- machine: {host['cpu']}, {host['cores']} cores, {host['memory'] / 2**30:.0f} GiB,"
        f" {host['os']}, GPU {host['gpu'] or 'none'}",
        f"- load average before and after: {load:.2f}, {os.getloadavg()[0]:.2f}",
        f"- versions: {', '.join(f'{name} {number}' for name, number in numbers.items())}",
        f"- commit {measured['commit'][:12]}{', modified' if measured['modified'] else ''};"
        f" seed {seed}",
        "",
        setting,
        "",
        "## The busiest expert's load over the mean",
        "",
        *_over_time(seen),
        "",
        "## After the last step",
        "",
        "| balancing | busiest expert over the mean | standard deviation over the mean |"
        " entropy of the loads, of the most there can be | held-out accuracy | held-out loss |",
        "|---|---:|---:|---:|---:|---:|",
        *(_last(way, each[-1]) for way, each in seen.items()),
        "",
    ]
    path.write_text("\n".join(lines))


def _over_time(seen: Mapping[str, Sequence[Seen]]) -> list[str]:
    steps = [each.step for each in next(iter(seen.values()))]
    return [
        f"| balancing | {' | '.join(f'step {step}' for step in steps)} |",
        f"|---|{'---:|' * len(steps)}",
        *(
            f"| {way} | {' | '.join(figure(each.most) for each in sequence)} |"
            for way, sequence in seen.items()
        ),
    ]


def _last(way: str, last: Seen) -> str:
    return (
        f"| {way} | {figure(last.most)} | {figure(last.variation)} | {100 * last.entropy:.1f} % |"
        f" {100 * last.accuracy:.1f} % | {last.loss:.3f} |"
    )
