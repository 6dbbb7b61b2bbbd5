"""What the operator sees: typed, immutable views of the objects, and the snapshot of a round.

Views are built from plain JSON objects at the edge. A manifest that does not parse keeps its error:
it is answered, not skipped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from dpmoe_operator.api.base import SpecError, parse
from dpmoe_operator.api.dpmoejob import DPMoEJobSpec
from dpmoe_operator.api.privateblock import PrivateBlockSpec
from dpmoe_operator.ledger.fold import LedgerState
from dpmoe_trainer.contract import Progress

Json = Mapping[str, Any]


def parse_time(text: str) -> datetime:
    """An RFC 3339 time, as Kubernetes writes it."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def format_time(moment: datetime) -> str:
    """An RFC 3339 time in UTC to the second, as Kubernetes reads it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Meta:
    """The part of an object's metadata that decisions depend on."""

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    created: datetime
    labels: Mapping[str, str]

    @classmethod
    def of(cls, manifest: Json) -> "Meta":
        """Read the metadata of a stored object."""
        meta = manifest["metadata"]
        return cls(
            namespace=meta.get("namespace", ""),
            name=meta["name"],
            uid=meta["uid"],
            generation=meta.get("generation", 0),
            resource_version=meta.get("resourceVersion", ""),
            created=parse_time(meta["creationTimestamp"]),
            labels=meta.get("labels") or {},
        )

    @property
    def key(self) -> tuple[str, str]:
        """Namespace and name."""
        return self.namespace, self.name


@dataclass(frozen=True)
class BlockView:
    """A PrivateBlock. `spec` is None where the manifest says something that cannot hold."""

    meta: Meta
    spec: PrivateBlockSpec | None
    error: SpecError | None
    status: Json

    @classmethod
    def of(cls, manifest: Json, known: "BlockView | None" = None) -> "BlockView":
        """View a stored PrivateBlock; `known` is an earlier view, whose spec may still hold."""
        meta, status = Meta.of(manifest), manifest.get("status") or {}
        if known is not None and meta.generation and known.meta.generation == meta.generation:
            return cls(meta, known.spec, known.error, status)
        spec, error = None, None
        try:
            spec = parse(PrivateBlockSpec, manifest.get("spec") or {})
        except SpecError as problem:
            error = problem
        return cls(meta, spec, error, status)


@dataclass(frozen=True)
class JobView:
    """A DPMoEJob. `spec` is None where the manifest says something that cannot hold."""

    meta: Meta
    spec: DPMoEJobSpec | None
    error: SpecError | None
    status: Json

    @classmethod
    def of(cls, manifest: Json, known: "JobView | None" = None) -> "JobView":
        """View a stored DPMoEJob; `known` is an earlier view, whose spec may still hold."""
        meta, status = Meta.of(manifest), manifest.get("status") or {}
        if known is not None and meta.generation and known.meta.generation == meta.generation:
            return cls(meta, known.spec, known.error, status)
        spec, error = None, None
        try:
            spec = parse(DPMoEJobSpec, manifest.get("spec") or {})
        except SpecError as problem:
            error = problem
        return cls(meta, spec, error, status)


@dataclass(frozen=True)
class PodView:
    """A trainer pod, alive or as it was last seen before it was deleted.

    Attributes:
        index: its completion index, which is its rank's node.
        scheduled: a node had been chosen.
        may_have_started: nothing proves that its container never ran.
        never_found: it ended, and the kubelet found no container of it. That alone proves nothing,
            since a container that ran may be lost; see `following`.
        ended: all of its containers have ended, for good.
        exit_code: of the trainer container, once it ended.
        message: its termination message, once it ended.
        ended_by: what ended it, where the kubelet has a name for that, e.g. `OOMKilled`, `Evicted`.
        waiting: why its container does not run yet, e.g. `ErrImagePull: no such image`, or
            `Unschedulable: 0/2 nodes are available`.
    """

    uid: str
    index: int
    gone: bool
    scheduled: bool
    may_have_started: bool
    never_found: bool
    running: bool
    ended: bool
    exit_code: int | None
    message: str | None
    ended_by: str | None
    waiting: str | None

    @classmethod
    def of(cls, manifest: Json, *, gone: bool = False) -> "PodView":
        """View a pod; `gone` where the object is the last one before its deletion."""
        meta, status = manifest["metadata"], manifest.get("status") or {}
        containers = status.get("containerStatuses") or []
        states = [container.get("state") or {} for container in containers]
        ended = next((s["terminated"] for s in states if "terminated" in s), None)
        waits = next((s["waiting"] for s in states if "waiting" in s), _unschedulable(status))
        scheduled = bool((manifest.get("spec") or {}).get("nodeName"))
        return cls(
            uid=meta["uid"],
            index=_index(meta),
            gone=gone,
            scheduled=scheduled,
            may_have_started=scheduled and not _never_started(status, containers, gone),
            never_found=_never_found(status, states),
            running=any("running" in s for s in states),
            ended=status.get("phase") in ("Succeeded", "Failed"),
            exit_code=ended.get("exitCode") if ended else None,
            message=ended.get("message") if ended else None,
            ended_by=_ended_by(status, ended or {}),
            waiting=": ".join(filter(None, (waits.get("reason"), waits.get("message"))))
            if waits
            else None,
        )

    def following(self, earlier: "PodView | None") -> "PodView":
        """This view in the light of the one before it of the same pod.

        A pod that is deleted before its container starts ends as `ContainerStatusUnknown`, by the
        kubelet's last word. Whoever saw it wait until then knows that nothing ran.
        """
        if earlier is None or earlier.may_have_started == self.may_have_started:
            return self
        if earlier.may_have_started:
            return replace(self, may_have_started=True)
        return replace(self, may_have_started=not self.never_found)

    @property
    def alive(self) -> bool:
        """Whether it runs or may still run."""
        return not (self.gone or self.ended)


COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
RELEASED = "dpmoe.dev/released"
"""Annotation of a Kubernetes Job, set in the same write that lets its pods run."""
CANCELLED = "dpmoe.dev/cancelled"
"""Annotation of a Kubernetes Job that the operator gave up. The write fences off an operator with
an older view: a release carries the resource version that it was decided on."""


def _index(meta: Json) -> int:
    """A pod that hides its index counts as one that ran as rank 0."""
    text = (meta.get("annotations") or {}).get(COMPLETION_INDEX, "")
    return int(text) if text.isdecimal() else 0


def _unschedulable(status: Json) -> Json | None:
    """Why no node takes a pod, in the scheduler's words, once it has tried."""
    conditions = status.get("conditions") or []
    scheduled: Json = next((c for c in conditions if c.get("type") == "PodScheduled"), {})
    refused = scheduled.get("status") == "False" and scheduled.get("message")
    return scheduled if refused else None


def _ended_by(status: Json, ended: Json) -> str | None:
    names = (ended.get("reason"), status.get("reason"))
    return next((name for name in names if name not in (None, "Error", "Completed")), None)


def _never_started(status: Json, containers: list[Any], gone: bool) -> bool:
    """Whether the kubelet's own word shows that no container of a scheduled pod ever ran."""
    if status.get("phase", "Pending") != "Pending":
        return False
    disrupted = any(c.get("type") == "DisruptionTarget" for c in status.get("conditions") or [])
    if gone or disrupted:
        # Deleted past the kubelet, whose last word says how a pod ended: this one may be stale.
        return False
    return all(
        "waiting" in (container.get("state") or {})
        and not container.get("lastState")
        and not container.get("restartCount")
        for container in containers
    )


def _never_found(status: Json, states: list[Any]) -> bool:
    """Whether the kubelet ended a pod without ever having had a container of it."""
    ends = [state.get("terminated") or {} for state in states]
    return (
        status.get("phase") == "Failed"
        and len(ends) > 0
        and all(
            end.get("reason") == "ContainerStatusUnknown"
            and not end.get("containerID")
            and not end.get("startedAt")
            for end in ends
        )
    )


@dataclass(frozen=True)
class WorkloadView:
    """The Kubernetes Job that runs a granted job, with every pod of it that was ever seen.

    Attributes:
        released: the operator let its pods run, once; a Job that is suspended after that is over,
            since a second start would spend a second time.
        cancelled: the operator gave the Job up; it is never released after that.
        asked_to_suspend: it has to be suspended; its pods may not know yet.
        active: pods that run or may run.
        ended: pods that the Job counted as succeeded or failed.
        suspended: the Job is suspended and has no pods left that run or end.
        confirmed: the pods were read from the server after the Job had ended, so that a slow watch
            is not mistaken for a missing report.
        outcome: `Complete` or `Failed` once the Job has that condition.
        reason: the condition's reason and message.
    """

    meta: Meta
    released: bool
    cancelled: bool
    asked_to_suspend: bool
    suspended: bool
    active: int
    ended: int
    outcome: str | None
    reason: str
    confirmed: bool
    pods: tuple[PodView, ...] = ()

    @classmethod
    def of(
        cls, manifest: Json, pods: tuple[PodView, ...], *, confirmed: bool = False
    ) -> "WorkloadView":
        """View a Kubernetes Job and its pods."""
        annotations = manifest["metadata"].get("annotations") or {}
        status = manifest.get("status") or {}
        true = {c["type"]: c for c in status.get("conditions") or [] if c.get("status") == "True"}
        outcome = next((kind for kind in ("Complete", "Failed") if kind in true), None)
        condition = true.get(outcome or "", {})
        active = status.get("active") or 0
        leaving = status.get("terminating") or 0
        return cls(
            meta=Meta.of(manifest),
            released=RELEASED in annotations,
            cancelled=CANCELLED in annotations,
            asked_to_suspend=bool((manifest.get("spec") or {}).get("suspend")),
            suspended="Suspended" in true and active == 0 and leaving == 0,
            active=active,
            ended=(status.get("succeeded") or 0) + (status.get("failed") or 0),
            outcome=outcome,
            reason=": ".join(filter(None, (condition.get("reason"), condition.get("message")))),
            confirmed=confirmed,
            pods=pods,
        )

    @property
    def over(self) -> bool:
        """No pod of it runs or will run: the Job ended, or was suspended after its release.

        A Job's status lags behind its spec: right after the release it still says `Suspended`.
        """
        if any(pod.alive for pod in self.pods):
            return False
        stopped = self.released and self.asked_to_suspend and self.suspended
        return self.outcome is not None or stopped

    @property
    def may_have_run(self) -> bool:
        """Whether anybody let its pods run, the operator or not."""
        return (
            self.released
            or not self.asked_to_suspend
            or self.active > 0
            or self.ended > 0
            or len(self.pods) > 0
        )

    @property
    def first_pods(self) -> tuple[PodView, ...]:
        """The pods of completion index 0; rank 0 lives in the only one, unless it was replaced."""
        return tuple(pod for pod in self.pods if pod.index == 0)


@dataclass(frozen=True)
class Snapshot:
    """Everything that a round may look at.

    Attributes:
        blocks: by (namespace, name).
        jobs: by uid.
        workloads: Kubernetes Jobs by the uid of the DPMoEJob that they run.
        prepared: uids of DPMoEJobs whose launched objects are all known to exist.
        launch_errors: what kept a granted job's objects from being created, by its uid.
        progress: what rank 0 last reported, by the DPMoEJob's uid.
        unserved: data namespaces that the operator may not look into, and what it was told. What
            is in them is not gone, it is not seen: nothing there is decided.
        ledger: fold of the log.
        now: the time of the decision.
    """

    blocks: Mapping[tuple[str, str], BlockView]
    jobs: Mapping[str, JobView]
    workloads: Mapping[str, WorkloadView]
    ledger: LedgerState
    now: datetime
    prepared: frozenset[str] = frozenset()
    launch_errors: Mapping[str, str] = field(default_factory=dict)
    progress: Mapping[str, Progress] = field(default_factory=dict)
    unserved: Mapping[str, str] = field(default_factory=dict)
