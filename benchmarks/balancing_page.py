"""What became of the experts' loads, as a page of the documentation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.common import figure
from benchmarks.page import heading


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
    head = heading(
        "Balanced experts under differential privacy",
        f"python -m benchmarks.balancing --model FOLDER --data FOLDER --markdown {path}",
        packages=packages,
        seed=seed,
        load=load,
    )
    lines = [
        *head,
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
