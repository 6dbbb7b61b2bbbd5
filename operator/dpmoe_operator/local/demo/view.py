"""What the demo shows: a live table while it runs, and at the end who spent what.

Everything shown is read from the objects' status, as kubectl would show it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Object = Mapping[str, Any]

_COLOURS = {
    "Completed": "green",
    "Running": "cyan",
    "Reserved": "blue",
    "Pending": "yellow",
    "Rejected": "red",
    "Failed": "red",
    "Ready": "green",
    "Exhausted": "yellow",
    "Refused": "red",
}


def render(blocks: Sequence[Object], jobs: Sequence[Object]) -> RenderableType:
    """Blocks above, jobs below, and under them why each job is not done yet."""
    return Group(_block_table(blocks), Text(), _job_table(jobs), Text(), *_reasons(jobs))


def _reasons(jobs: Sequence[Object]) -> list[Text]:
    lines = []
    for job in jobs:
        status = job.get("status") or {}
        if status.get("state") not in (None, "Completed"):
            line = Text(f"{job['metadata']['name']} ", style="bold")
            line.append_text(_state(status.get("reason")))
            line.append(f": {status.get('message', '')}", style="not bold")
            lines.append(line)
    return lines


def _state(text: str | None) -> Text:
    return Text(text or "-", style=_COLOURS.get(text or "", ""))


def _block_table(blocks: Sequence[Object]) -> Table:
    amounts = ("consumed", "reserved", "available", "used")
    table = Table("block", "ε total", *amounts, "state", box=None)
    for block in blocks:
        status = block.get("status") or {}
        table.add_row(
            block["metadata"]["name"],
            block["spec"]["budget"]["epsilon"],
            *(status.get(name, "-") for name in amounts),
            _state(status.get("state")),
        )
    return table


def _job_table(jobs: Sequence[Object]) -> Table:
    columns = ("namespace", "state", "ε asked", "ε spent", "progress", "accuracy")
    table = Table("job", *columns, box=None)
    for job in jobs:
        status = job.get("status") or {}
        table.add_row(
            job["metadata"]["name"],
            job["metadata"]["namespace"],
            _state(status.get("state")),
            status.get("epsilon", "-"),
            status.get("epsilonSpent", "-"),
            status.get("progress", "-"),
            (status.get("evaluation") or {}).get("accuracy", "-"),
        )
    return table


def spenders(blocks: Sequence[Object]) -> Table:
    """Who spent how much of each block."""
    table = Table("block", "namespace", "jobs", "ε spent or reserved", box=None)
    for block in blocks:
        for spender in (block.get("status") or {}).get("spenders") or []:
            table.add_row(
                block["metadata"]["name"],
                spender["namespace"],
                str(spender["jobs"]),
                spender["epsilon"],
            )
    return table


def summary(blocks: Sequence[Object], jobs: Sequence[Object]) -> dict[str, Any]:
    """The demo's result as JSON."""
    return {
        "jobs": [_job_summary(job) for job in jobs],
        "blocks": [_block_summary(block) for block in blocks],
    }


def _job_summary(job: Object) -> dict[str, Any]:
    status = job.get("status") or {}
    evaluation = status.get("evaluation") or {}
    return {
        "name": job["metadata"]["name"],
        "namespace": job["metadata"]["namespace"],
        "state": status.get("state"),
        "reason": status.get("reason"),
        "epsilon": _number(status.get("epsilonSpent")),
        "dev_accuracy": _number(evaluation.get("accuracy")),
        "majority_share": _number(evaluation.get("majorityShare")),
    }


def _block_summary(block: Object) -> dict[str, Any]:
    status = block.get("status") or {}
    return {
        "name": block["metadata"]["name"],
        "capacity": _number(block["spec"]["budget"]["epsilon"]),
        "reserved": _number(status.get("reserved")),
        "consumed": _number(status.get("consumed")),
    }


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)
