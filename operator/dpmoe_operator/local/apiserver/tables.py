"""Server-side printing: the `Table` form of lists, which `kubectl get` shows.

Custom resources print the `additionalPrinterColumns` of their CRD, the built-in kinds that people
look at have the columns they are used to, and all others show name and age.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from .resources import JOBS, NAMESPACES, PODS, Object, Resource, StorageKey

UNKNOWN = "<unknown>"
NONE = "<none>"


@dataclass(frozen=True)
class Column:
    """One column: how it is called, and the cell of an object at a moment."""

    name: str
    cell: Callable[[Object, datetime], Any]
    type: str = "string"
    priority: int = 0
    format: str = ""
    description: str = ""


def table(
    resource: Resource, objects: Iterable[Object], list_metadata: Object, include: str = "Metadata"
) -> Object:
    """A `Table` of objects of one resource.

    Args:
        resource: whose columns are shown.
        objects: one row each.
        list_metadata: of the list, or of the single object.
        include: what a row carries of its object: `None`, `Metadata` or `Object`.
    """
    columns, now = columns_of(resource), datetime.now(UTC)
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": list_metadata,
        "columnDefinitions": [
            {
                "name": column.name,
                "type": column.type,
                "format": column.format,
                "description": column.description,
                "priority": column.priority,
            }
            for column in columns
        ],
        "rows": [_row(columns, obj, now, include) for obj in objects],
    }


def partial_metadata(obj: Object) -> Object:
    """An object without its content."""
    return {
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": obj["metadata"],
    }


def columns_of(resource: Resource) -> Sequence[Column]:
    """The columns that a resource prints."""
    if resource.columns is not None:
        return [_NAME, *(_custom_column(each) for each in resource.columns)]
    return _COLUMNS.get(resource.storage, (_NAME, _AGE)) if not resource.custom else (_NAME, _AGE)


def _row(columns: Sequence[Column], obj: Object, now: datetime, include: str) -> Object:
    row: Object = {"cells": [column.cell(obj, now) for column in columns]}
    if include != "None":
        row["object"] = obj if include == "Object" else partial_metadata(obj)
    return row


def duration(seconds: float) -> str:
    """A length of time in at most two units, as kubectl writes it."""
    seconds = int(seconds)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if seconds < 0:
        return "0s"
    if seconds < 120:
        return f"{seconds}s"
    if minutes < 10:
        return f"{minutes}m{_rest(seconds % 60, 's')}"
    if hours < 3:
        return f"{minutes}m"
    if hours < 8:
        return f"{hours}h{_rest(minutes % 60, 'm')}"
    if days < 2:
        return f"{hours}h"
    if days < 8:
        return f"{days}d{_rest(hours % 24, 'h')}"
    return f"{days}d"


def _rest(amount: int, unit: str) -> str:
    return f"{amount}{unit}" if amount else ""


def _since(text: str | None, now: datetime) -> str:
    if not text:
        return UNKNOWN
    return duration((now - datetime.fromisoformat(text)).total_seconds())


# Columns of custom resources


def _custom_column(definition: Mapping[str, Any]) -> Column:
    path, kind = parse_path(definition["jsonPath"]), definition["type"]
    description = f"Custom resource definition column (JSONPath): {definition['jsonPath']}"

    def cell(obj: Object, now: datetime) -> Any:
        values = walk(path, obj)
        if not values:
            return None
        if kind == "date":
            return _since(values[0], now)
        if kind == "string":
            return ",".join(_text(value) for value in values)
        return values[0]

    return Column(
        definition["name"],
        cell,
        kind,
        definition.get("priority", 0),
        definition.get("format", ""),
        definition.get("description", description),
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


Step = Callable[[Any], list[Any]]

_STEP = re.compile(
    r"""\.(?P<field>(?:\\.|[^.\[\\])+)
    | \[(?P<index>-?\d+)\]
    | \[(?P<all>\*)\]
    | \[['"](?P<quoted>(?:\\.|[^'"])+)['"]\]
    | \[\?\(@\.(?P<key>[\w.]+)\s*==\s*['"](?P<value>[^'"]*)['"]\)\]""",
    re.VERBOSE,
)


def parse_path(text: str) -> list[Step]:
    r"""Reads the JSONPath of a printer column.

    Known are `.field`, `.a\.b`, `['a.b']`, `[0]`, `[*]` and `[?(@.type=="Ready")]`.

    Raises:
        ValueError: for anything else.
    """
    text = text.strip().removeprefix("{").removesuffix("}")
    steps, position = [], 0
    while position < len(text):
        match = _STEP.match(text, position)
        if match is None:
            raise ValueError(f"JSONPath {text!r}: can't read {text[position:]!r}")
        steps.append(_step(match))
        position = match.end()
    return steps


def _step(match: re.Match[str]) -> Step:
    groups = match.groupdict()
    if groups["all"]:
        return lambda value: list(value.values() if isinstance(value, dict) else value or ())
    if groups["index"]:
        index = int(groups["index"])
        return lambda value: value[index:][:1] if isinstance(value, list) else []
    if groups["key"]:
        key, wanted = groups["key"], groups["value"]
        return lambda value: [
            each for each in value or () if isinstance(each, dict) and each.get(key) == wanted
        ]
    name = re.sub(r"\\(.)", r"\1", groups["field"] or groups["quoted"])
    return lambda value: [value[name]] if isinstance(value, dict) and name in value else []


def walk(path: Sequence[Step], obj: Object) -> list[Any]:
    """All values at a path."""
    values: list[Any] = [obj]
    for step in path:
        values = [found for value in values for found in step(value)]
    return values


# Columns of built-in kinds


def _name(obj: Object, now: datetime) -> str:
    return str(obj["metadata"]["name"])


def _age(obj: Object, now: datetime) -> str:
    return _since(obj["metadata"]["creationTimestamp"], now)


def _phase(obj: Object, now: datetime) -> str:
    return str(obj.get("status", {}).get("phase", UNKNOWN))


def _pod_ready(obj: Object, now: datetime) -> str:
    statuses = obj["status"].get("containerStatuses", ())
    ready = sum(bool(each.get("ready")) for each in statuses)
    return f"{ready}/{len(obj['spec']['containers'])}"


def _pod_status(obj: Object, now: datetime) -> str:
    """The reason of a container that waits or ended says more than the phase."""
    if "deletionTimestamp" in obj["metadata"]:
        return "Terminating"
    shown = obj["status"].get("reason") or obj["status"].get("phase", UNKNOWN)
    for container in obj["status"].get("containerStatuses", ()):
        for state in ("waiting", "terminated"):
            shown = container.get("state", {}).get(state, {}).get("reason") or shown
    return str(shown)


def _pod_restarts(obj: Object, now: datetime) -> str:
    statuses = obj["status"].get("containerStatuses", ())
    return str(sum(each.get("restartCount", 0) for each in statuses))


def _pod_ip(obj: Object, now: datetime) -> str:
    return str(obj["status"].get("podIP", NONE))


def _pod_node(obj: Object, now: datetime) -> str:
    return str(obj["spec"].get("nodeName", NONE))


_JOB_STATUSES = (
    *("Complete", "Failed", "Terminating"),
    *("Suspended", "FailureTarget", "SuccessCriteriaMet"),
)


def _job_status(obj: Object, now: datetime) -> str:
    true = {
        each["type"] for each in obj["status"].get("conditions", ()) if each["status"] == "True"
    }
    if "deletionTimestamp" in obj["metadata"]:
        true.add("Terminating")
    return next((kind for kind in _JOB_STATUSES if kind in true), "Running")


def _job_completions(obj: Object, now: datetime) -> str:
    spec, succeeded = obj["spec"], obj["status"].get("succeeded", 0)
    if spec.get("completions") is not None:
        return f"{succeeded}/{spec['completions']}"
    parallel = spec["parallelism"]
    return f"{succeeded}/1 of {parallel}" if parallel > 1 else f"{succeeded}/1"


def _job_duration(obj: Object, now: datetime) -> str:
    start, end = obj["status"].get("startTime"), obj["status"].get("completionTime")
    if not start:
        return ""
    return _since(start, datetime.fromisoformat(end) if end else now)


def _event_last_seen(obj: Object, now: datetime) -> str:
    return _since(obj.get("lastTimestamp") or obj.get("eventTime"), now)


def _event_object(obj: Object, now: datetime) -> str:
    involved = obj.get("involvedObject", {})
    return f"{involved.get('kind', '').lower()}/{involved.get('name', '')}"


def _text_of(field: str) -> Callable[[Object, datetime], str]:
    return lambda obj, now: str(obj.get(field, ""))


_NAME = Column("Name", _name, format="name")
_AGE = Column("Age", _age)
_COLUMNS: Mapping[StorageKey, Sequence[Column]] = {
    NAMESPACES.storage: (_NAME, Column("Status", _phase), _AGE),
    PODS.storage: (
        _NAME,
        Column("Ready", _pod_ready),
        Column("Status", _pod_status),
        Column("Restarts", _pod_restarts),
        _AGE,
        Column("IP", _pod_ip, priority=1),
        Column("Node", _pod_node, priority=1),
    ),
    JOBS.storage: (
        _NAME,
        Column("Status", _job_status),
        Column("Completions", _job_completions),
        Column("Duration", _job_duration),
        _AGE,
    ),
    ("", "events"): (
        Column("Last Seen", _event_last_seen),
        Column("Type", _text_of("type")),
        Column("Reason", _text_of("reason")),
        Column("Object", _event_object),
        Column("Message", _text_of("message")),
        Column("Name", _name, priority=1, format="name"),
    ),
    ("", "persistentvolumeclaims"): (_NAME, Column("Status", _phase), _AGE),
    ("", "persistentvolumes"): (_NAME, Column("Status", _phase), _AGE),
}
