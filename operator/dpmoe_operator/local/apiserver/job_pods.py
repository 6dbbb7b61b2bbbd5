"""The pods of a Job: how they are built, and how indexes and times are written. Pure."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from .resources import Object

TRACKING_FINALIZER = "batch.kubernetes.io/job-tracking"
INDEX_KEY = "batch.kubernetes.io/job-completion-index"
FAILURES_KEY = "batch.kubernetes.io/job-index-failure-count"
IGNORED_KEY = "batch.kubernetes.io/job-index-ignored-failure-count"
INDEX_FIELD_PATH = f"metadata.labels['{INDEX_KEY}']"
# Names that the server generates have at most 63 characters, five of them random.
_LONGEST_PREFIX = 58


@dataclass(frozen=True)
class Failures:
    """How often the pod of an index failed, since the Job last started."""

    counted: int = 0
    ignored: int = 0

    @classmethod
    def before(cls, pod: Object) -> "Failures":
        """Those that its own pod knows of."""
        notes = pod["metadata"].get("annotations", {})
        return cls(int(notes.get(FAILURES_KEY, 0)), int(notes.get(IGNORED_KEY, 0)))

    def and_one(self, *, ignored: bool) -> "Failures":
        """With one more."""
        return Failures(self.counted + (not ignored), self.ignored + ignored)


def build_pod(job: Object, index: int | None, failures: Failures | None = None) -> Object:
    """A pod of a Job, from its template; `failures` of its index where those are counted."""
    template, name = job["spec"]["template"], job["metadata"]["name"]
    metadata = template["metadata"]
    owner = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "name": name,
        "uid": job["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
    suffix = "-" if index is None else f"-{index}-"
    pod: Object = {
        "metadata": {
            **{key: metadata[key] for key in ("labels", "annotations") if key in metadata},
            "generateName": name[: _LONGEST_PREFIX - len(suffix)] + suffix,
            "ownerReferences": [owner],
            "finalizers": [*metadata.get("finalizers", ()), TRACKING_FINALIZER],
        },
        "spec": template["spec"],
    }
    return pod if index is None else _indexed(pod, name, index, failures)


def _indexed(pod: Object, job_name: str, index: int, failures: Failures | None) -> Object:
    metadata, spec = pod["metadata"], pod["spec"]
    mark = {INDEX_KEY: str(index)}
    notes = mark | ({FAILURES_KEY: str(failures.counted)} if failures is not None else {})
    if failures is not None and failures.ignored:
        notes[IGNORED_KEY] = str(failures.ignored)
    variable = {
        "name": "JOB_COMPLETION_INDEX",
        "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": INDEX_FIELD_PATH}},
    }

    def with_index(container: Object) -> Object:
        env = container.get("env", [])
        if any(each["name"] == variable["name"] for each in env):
            return container
        return {**container, "env": [*env, variable]}

    spec = {"hostname": f"{job_name}-{index}", **spec}
    for kind in ("containers", "initContainers"):
        if kind in spec:
            spec[kind] = [with_index(each) for each in spec[kind]]
    metadata = {
        **metadata,
        "labels": metadata.get("labels", {}) | mark,
        "annotations": metadata.get("annotations", {}) | notes,
    }
    return {"metadata": metadata, "spec": spec}


def parse_indexes(text: str) -> set[int]:
    """Reads `completedIndexes`, such as `0-2,4`."""
    indexes: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        indexes |= set(range(int(first), int(last or first) + 1))
    return indexes


def format_indexes(indexes: set[int]) -> str:
    """Writes `completedIndexes`: three or more in a row become a range."""
    runs: list[list[int]] = []
    for index in sorted(indexes):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    parts: list[Any] = []
    for run in runs:
        parts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else run
    return ",".join(str(part) for part in parts)


def index_of(pod: Object) -> int:
    """The completion index of a pod; -1 if it has none."""
    return int(pod["metadata"].get("annotations", {}).get(INDEX_KEY, -1))


def format_time(moment: datetime) -> str:
    """A time as Kubernetes writes it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> datetime:
    """A time as Kubernetes writes it."""
    return datetime.fromisoformat(text)
