"""What every benchmark shares: its options, its rows, and the file and table that it leaves.

A figure means nothing without the machine, the versions, the commit and the seed that it came from,
so all of them are in the same file. A row names a target or a peer that was measured in the same
run, or both.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
TARGET_ONLY = "target only"

Quick = Annotated[bool, typer.Option("--quick", help="Small sizes: less than 90 seconds in all.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")]
Seed = Annotated[int, typer.Option(help="Seed of all that is drawn at random.")]
Turns = Annotated[int, typer.Option(help="How often each way is timed.")]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="In float32, or bfloat16 on GPUs.")]
Markdown = Annotated[Path | None, typer.Option(help="Write the page to this file.")]

_console = Console(width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: what was measured, where.
        ours: the figure.
        unit: of all figures of the row.
        better: which direction is.
        target: what was promised; None where nothing was.
        peer: the same of something else, measured in the same run.
        peer_name: what else.
    """

    name: str
    ours: float
    unit: str
    better: Literal["lower", "higher"] = "lower"
    target: float | None = None
    peer: float | None = None
    peer_name: str = TARGET_ONLY

    @property
    def met(self) -> bool | None:
        """Whether the target was met; None without a target."""
        if self.target is None:
            return None
        return self.ours <= self.target if self.better == "lower" else self.ours >= self.target


@dataclass(frozen=True)
class Recorder:
    """Takes figures as they are measured, and says each at once.

    Attributes:
        rows: all so far.
        place: what stands before each name.
    """

    rows: list[Row] = field(default_factory=list)
    place: str = ""

    def at(self, place: str) -> "Recorder":
        """The same rows, with another place before the names."""
        return Recorder(self.rows, place)

    def add(self, name: str, ours: float, unit: str, **rest: Any) -> None:
        """Add a row; `rest` as in `Row`."""
        row = Row(f"{self.place}: {name}", ours, unit, **rest)
        self.rows.append(row)
        note(f"  {row.name}: {row.ours:.4g} {row.unit}")


@contextmanager
def seconds() -> Iterator[Callable[[], float]]:
    """Time a block of code; the value is a function that gives its seconds once it ended."""
    started = time.perf_counter()
    ended = started
    yield lambda: ended - started
    ended = time.perf_counter()


def note(text: str) -> None:
    """Say what is going on."""
    _console.print(f"[dim]{text}[/dim]")


def report(
    rows: Sequence[Row],
    *,
    packages: Sequence[str],
    seed: int,
    quick: bool,
    load: float,
    path: Path | None,
    versions: dict[str, str] | None = None,
) -> None:
    """Print the rows as a table and write everything to a file.

    Args:
        rows: the figures.
        packages: Python packages whose versions matter.
        seed: of the run.
        quick: whether sizes were small.
        load: the machine's load average when the run began.
        path: where to write JSON; None for nowhere.
        versions: of what is no Python package.
    """
    _console.print(_table(rows))
    if path is None:
        return
    result = {
        "machine": {**machine(), "load_before": load, "load_after": os.getloadavg()[0]},
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
            **(versions or {}),
        },
        **commit(),
        "seed": seed,
        "quick": quick,
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(result, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """The machine's processor, cores, memory in bytes, system and GPU (None without one)."""
    cpu = _line_of("/proc/cpuinfo", "model name") or platform.processor()
    memory = _line_of("/proc/meminfo", "MemTotal")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory": int(memory.split()[0]) * 1024 if memory else None,
        "os": f"{platform.freedesktop_os_release()['PRETTY_NAME']}, Linux {platform.release()}",
        "gpu": _gpu(),
    }


def commit() -> dict[str, Any]:
    """The commit that was measured, and whether files differed from it."""
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "operator", "trainer")
    return {
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "modified": bool(changed),
    }


def quantile(values: Sequence[float], percent: int) -> float:
    """The value that `percent` of all values do not exceed, interpolated."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def resident_bytes(pid: int) -> int:
    """Memory that a process holds now (RSS)."""
    line = _line_of(f"/proc/{pid}/status", "VmRSS")
    assert line is not None, f"process {pid} has ended"
    return int(line.split()[0]) * 1024


def _table(rows: Sequence[Row]) -> Table:
    table = Table("measured", "ours", "target", "met", "peer", "", title="benchmark")
    for row in rows:
        verdict = {None: "", True: "[green]yes[/green]", False: "[red]no[/red]"}[row.met]
        table.add_row(
            row.name,
            f"{figure(row.ours)} {row.unit}",
            ""
            if row.target is None
            else f"{'≤' if row.better == 'lower' else '≥'} {figure(row.target)}",
            verdict,
            "" if row.peer is None else figure(row.peer),
            row.peer_name if row.peer is not None else "",
        )
    return table


def figure(value: float, digits: int = 3) -> str:
    """A number with so many digits, or all of them before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _gpu() -> str | None:
    try:
        return _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _line_of(path: str, key: str) -> str | None:
    """What follows `key:` in a file of the kernel's."""
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
