"""`dpmoe simulate`: what a policy would grant, without a cluster."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dpmoe_operator.cli.errors import user_errors
from dpmoe_operator.scheduling.policies import POLICIES
from dpmoe_operator.scheduling.policies import policy as policy_named
from dpmoe_operator.simulate.elastic import Part, elastic
from dpmoe_operator.simulate.engine import Played, play
from dpmoe_operator.simulate.instance import read_instance, solve
from dpmoe_operator.simulate.plots import write_plots
from dpmoe_operator.simulate.report import to_object, to_table
from dpmoe_operator.simulate.rules import Rules, Unlock
from dpmoe_operator.simulate.spec import read_spec
from dpmoe_operator.simulate.summary import summarise, upper_bound
from dpmoe_operator.simulate.trace import TraceOptions, Weights, read_trace
from dpmoe_operator.simulate.workload import Workload

_FAST = sorted(POLICIES.keys() - {"optimal"})
"""What is compared unless asked otherwise; `optimal` may take seconds a round."""

_UPDATES = 200
"""How often a progress bar moves at most; showing every round would take longer than the rounds."""

_TRACE_RULES = Rules(Unlock(lifetime=30.0, steps=1000), period=10.0)
"""What DPack's artifact plays Alibaba-DP by, in days."""


def simulate(
    workload: Annotated[
        Path | None,
        typer.Argument(help="A trace (.csv, .csv.gz) or a workload (.yaml); see docs/simulate.md."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(sorted(POLICIES))}; may be repeated (default: all but optimal)."
        ),
    ] = None,
    instance: Annotated[
        Path | None,
        typer.Option(help="An offline problem (.npz) instead of a workload; needs one --policy."),
    ] = None,
    unlock: Annotated[
        str | None,
        typer.Option(
            help="immediate, arrivals:N (DPF-N), time:SECONDS or time:SECONDS/STEPS (DPF-T)."
        ),
    ] = None,
    period: Annotated[
        float | None,
        typer.Option(help="Time between rounds; 0 for a round at every arrival."),
    ] = None,
    foresight: Annotated[
        float | None,
        typer.Option(help="How far ahead unlocks by time are counted on, to keep budget for them."),
    ] = None,
    until: Annotated[float | None, typer.Option(help="When the last round happens.")] = None,
    horizon: Annotated[
        int, typer.Option(min=1, help="Of a trace: days that it is squeezed into.")
    ] = 30,
    initial_blocks: Annotated[
        int, typer.Option(min=1, help="Of a trace: blocks that are there at the start.")
    ] = 100,
    weights: Annotated[
        Weights, typer.Option(help="Of a trace: 1 each, its profits, or ε times blocks.")
    ] = "count",
    parts: Annotated[
        list[str] | None,
        typer.Option(
            "--elastic",
            help="PART:UTILITY: every task would also take that part of its demand; repeatable.",
        ),
    ] = None,
    fairness: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the budget that goes in DPF's order first."),
    ] = 0.0,
    fair_shares: Annotated[
        int | None,
        typer.Option(min=1, help="N of a fair share, budget/N, that `fair` is about."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of all random draws.")] = None,
    bound: Annotated[
        bool, typer.Option(help="Compute the upper bound; takes about one dual round.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write JSON to this file.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write plots into this folder.")] = None,
) -> None:
    """Play a workload through scheduling policies and compare them."""
    with user_errors():
        names = policy or _FAST
        for name in names:
            policy_named(name)
        if instance is not None:
            _solve_instance(instance, workload, policy)
            return
        if workload is None:
            raise ValueError("WORKLOAD: name a trace, a workload or an --instance")
        made, rules = _read(workload, horizon, initial_blocks, weights, seed)
        if parts:
            made = elastic(made, [Part.parse(part) for part in parts])
        rules = _with_options(rules, unlock, period, until, foresight)
        played = [_play(made, name, rules, fairness, quiet=as_json) for name in names]
        limit = upper_bound(played[0]) if bound else None
        summaries = [summarise(one, upper_bound=limit, fair_shares=fair_shares) for one in played]
        result = to_object(made, rules, played, summaries)
        if output is not None:
            output.write_text(json.dumps(result) + "\n")
        if plots is not None:
            write_plots(played, plots)
        if as_json:
            typer.echo(json.dumps(result))
        else:
            Console().print(to_table(made, rules, summaries))


def _solve_instance(path: Path, workload: Path | None, policy: list[str] | None) -> None:
    """The offline interface: JSON on stdout, nothing else."""
    if workload is not None:
        raise ValueError(f"--instance: {path}: name either a workload or an instance, not both")
    if policy is None or len(policy) != 1:
        raise ValueError(f"--policy: {policy or 'absent'}: an --instance needs exactly one")
    typer.echo(json.dumps(solve(read_instance(path), policy_named(policy[0]))))


def _read(
    path: Path, horizon: int, initial_blocks: int, weights: Weights, seed: int | None
) -> tuple[Workload, Rules]:
    if path.suffix in (".yaml", ".yml"):
        return read_spec(path, seed)
    if path.suffix == ".csv" or path.name.endswith(".csv.gz"):
        options = TraceOptions(
            horizon=horizon, initial_blocks=initial_blocks, weights=weights, seed=seed or 0
        )
        return read_trace(path, options), _TRACE_RULES
    raise ValueError(f"{path}: must be a .csv, .csv.gz or .yaml file")


def _with_options(
    rules: Rules,
    unlock: str | None,
    period: float | None,
    until: float | None,
    foresight: float | None,
) -> Rules:
    """The rules of the workload, where options say nothing else."""
    if unlock is not None:
        rules = replace(rules, unlock=Unlock.parse(unlock))
    if period is not None:
        rules = replace(rules, period=period or None)
    if until is not None:
        rules = replace(rules, until=until)
    if foresight is not None:
        rules = replace(rules, foresight=foresight)
    return rules


def _play(workload: Workload, name: str, rules: Rules, fairness: float, *, quiet: bool) -> Played:
    with _progress(name, workload.tasks, quiet) as progress:
        return play(workload, policy_named(name), rules, fairness=fairness, progress=progress)


@contextmanager
def _progress(name: str, total: int, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr while a policy plays; none where nobody would see it."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        shown = bar.add_task(name, total=total)
        step, last = max(1, total // _UPDATES), 0

        def progress(arrived: int, of: int) -> None:
            nonlocal last
            if arrived - last >= step or arrived == of:
                bar.update(shown, completed=arrived)
                last = arrived

        yield progress
