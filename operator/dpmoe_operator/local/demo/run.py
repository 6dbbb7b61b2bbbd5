"""The demo's story: start everything, apply the manifests as a user would, watch, sum up."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from dpmoe_operator.local.demo.data import prepare_volumes
from dpmoe_operator.local.demo.view import render, spenders, summary
from dpmoe_operator.local.stack import NAMESPACE, Stack, StackError, kubectl_path

POLL_SECONDS = 0.5
QUIET_SECONDS = 4.0
"""The demo is over once nothing has run or been reserved for so long."""

LIMIT_SECONDS = 1800.0


@dataclass(frozen=True)
class DemoOptions:
    """What the demo shows.

    Attributes:
        downloads: where data and model are kept between runs.
        examples: folder of the manifests.
        keep: go on until Ctrl-C after the end.
    """

    downloads: Path
    examples: Path
    keep: bool = False


def run_demo(stack: Stack, options: DemoOptions, console: Console) -> dict[str, Any]:
    """Run the demo on a stack that is not started yet.

    Returns:
        The summary: jobs and blocks.

    Raises:
        StackError: a part does not start, or the demo does not come to an end.
        DownloadError: data or model cannot be fetched.
    """
    console.print(f"[bold]dpmoe demo[/bold]: {stack.description}")
    console.print(f"fetching movie-review sentences and MiniLM into {options.downloads}")
    prepare_volumes(stack.volumes, options.downloads)
    with stack:
        kubectl = f"{kubectl_path()} --kubeconfig {stack.kubeconfig}"
        console.print(f"look at it meanwhile: [cyan]{kubectl} get pb,dpj -A[/cyan]", soft_wrap=True)
        for manifest in sorted(options.examples.glob("*.yaml")):
            console.print(f"$ kubectl apply -f {manifest.name}")
            stack.kubectl("apply", "-f", str(manifest))
        blocks, jobs = _watch(stack, console)
        console.print()
        console.print(spenders(blocks))
        _export_ledger(stack, console)
        _say_where(stack, jobs, console)
        if options.keep:
            console.print(f"still running; Ctrl-C ends it. {kubectl} get pb -A", soft_wrap=True)
            _stay(stack, console)
    return summary(blocks, jobs)


def _watch(stack: Stack, console: Console) -> tuple[list[Any], list[Any]]:
    """Show the live table until nothing moves any more; where there is no terminal, what changes.

    Returns:
        Blocks and jobs as they were at the end.
    """
    started = moved = time.monotonic()
    told: dict[str, str] = {}
    with Live(console=console, refresh_per_second=4) as live:
        while True:
            for revived in stack.supervise():
                console.print(f"started again: {revived}")
            blocks, jobs = _objects(stack, "privateblocks"), _objects(stack, "dpmoejobs")
            live.update(render(blocks, jobs))
            if not console.is_terminal:
                _tell_changes(jobs, told, console)
            now = time.monotonic()
            if not _is_settled(jobs):
                moved = now
            if now - moved > QUIET_SECONDS:
                return blocks, jobs
            if now - started > LIMIT_SECONDS:
                raise StackError(
                    f"jobs still run after {LIMIT_SECONDS:.0f} s; see the logs in {stack.directory}"
                )
            time.sleep(POLL_SECONDS)


def _tell_changes(jobs: Sequence[Any], told: dict[str, str], console: Console) -> None:
    for job in jobs:
        status = job.get("status") or {}
        state = f"{status.get('state', 'Pending')} ({status.get('reason', 'new')})"
        if told.get(_name(job)) != state:
            told[_name(job)] = state
            console.print(f"{time.strftime('%H:%M:%S')} {_name(job)}: {state}", highlight=False)


def _is_settled(jobs: Sequence[Any]) -> bool:
    """Whether every job ended, was rejected, or waits with a reason."""
    ends = ("Completed", "Failed", "Rejected", "Pending", "Suspended")
    states = [(job.get("status") or {}).get("state") for job in jobs]
    return bool(states) and all(state in ends for state in states)


def _objects(stack: Stack, plural: str) -> list[Any]:
    items: list[Any] = json.loads(stack.kubectl("get", plural, "-A", "-o", "json"))["items"]
    return sorted(items, key=lambda item: (item["metadata"]["creationTimestamp"], _name(item)))


def _name(item: Any) -> str:
    return str(item["metadata"]["name"])


def _export_ledger(stack: Stack, console: Console) -> None:
    """Write the log beside the run, so that it can be verified when the cluster is gone."""
    entries = json.loads(stack.kubectl("get", "ledgerentries", "-n", NAMESPACE, "-o", "json"))
    path = stack.directory / "ledger.jsonl"
    lines = [
        json.dumps({"metadata": {"name": _name(entry)}, "spec": entry["spec"]})
        for entry in sorted(entries["items"], key=_name)
    ]
    path.write_text("".join(f"{line}\n" for line in lines))
    console.print(f"the ledger: [cyan]dpmoe ledger verify --file {path}[/cyan]", soft_wrap=True)


def _say_where(stack: Stack, jobs: Sequence[Any], console: Console) -> None:
    for job in jobs:
        output = ((job.get("status") or {}).get("output") or "").removeprefix("/dpmoe/outputs/")
        if output:
            folder = stack.volumes / job["spec"]["blocks"]["namespace"] / output
            console.print(f"trained model of {_name(job)}: {folder}", soft_wrap=True)
    console.print(
        "load one: [cyan]import dpmoe_trainer.models; from transformers import"
        " AutoModelForSequenceClassification as M; M.from_pretrained(FOLDER)[/cyan]",
        soft_wrap=True,
    )
    console.print(f"logs, volumes and kubeconfig: {stack.directory}", soft_wrap=True)


def _stay(stack: Stack, console: Console) -> None:
    while True:
        for revived in stack.supervise():
            console.print(f"started again: {revived}")
        time.sleep(POLL_SECONDS)
