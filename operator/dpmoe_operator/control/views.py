"""What the operator sees: typed, immutable views of the objects, and the snapshot of a round.

Views are built from plain JSON objects at the edge. A manifest that does not parse keeps its error:
it is answered, not skipped.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from dpmoe_operator.api.base import SpecError, parse
from dpmoe_operator.api.dpmoejob import DPMoEJobSpec
from dpmoe_operator.api.privateblock import PrivateBlockSpec
from dpmoe_operator.control.pods import PodView
from dpmoe_operator.control.times import parse_time
from dpmoe_operator.ledger.fold import LedgerState
from dpmoe_trainer.contract import Progress

Json = Mapping[str, Any]


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


QUEUE_NAME = "kueue.x-k8s.io/queue-name"
"""Label by which Kueue takes a Job: from then on Kueue alone suspends and starts it."""
PAUSED = "dpmoe.dev/paused"
"""Annotation of a Kubernetes Job that the operator suspended since its DPMoEJob is, for now."""
RELEASED = "dpmoe.dev/released"
"""Annotation of a Kubernetes Job, set in the same write that lets its pods run."""
CANCELLED = "dpmoe.dev/cancelled"
"""Annotation of a Kubernetes Job that the operator gave up. The write fences off an operator with
an older view: a release carries the resource version that it was decided on."""

POD_COUNTS = (
    "active",
    "ready",
    "terminating",
    "succeeded",
    "failed",
    "uncountedTerminatedPods",
)
"""Fields of a Job's status that tell of its pods."""


@dataclass(frozen=True)
class WorkloadView:
    """The Kubernetes Job that runs a granted job, with every pod of it that was ever seen.

    Attributes:
        released: the operator let its pods run, and when. A Job that is suspended after that is
            over, since a second start would spend a second time, unless it is `restartable`.
        restartable: its pods keep checkpoints and a journal, and failed ones are replaced.
        queued: it is Kueue's to start and to suspend.
        paused: the operator suspended it, to let it go on later.
        cancelled: the operator gave the Job up; it is never released after that.
        asked_to_suspend: it has to be suspended; its pods may not know yet.
        active: pods that run or may run.
        ended: pods that succeeded or failed, by the Job's own count; disrupted ones it does not
            count. One that is gone is among them: before it may go, the Job names it as uncounted.
        failed_first: index 0 failed for good.
        suspended: the Job is suspended and has no pods left that run or end.
        confirmed: the pods were read from the server after the Job had ended, so that a slow watch
            is not mistaken for a missing report.
        caught_up: the watch has told what happened to the pods before they were read.
        watch: names the watch that tells of its pods, until that may have missed something.
        watched: that watch was there before the first of its pods.
        idle: its status counts no pod, neither of those that run or end nor of those that ended.
        stop_observed: the Job controller has acted upon the suspension, and makes no pod any more.
        outcome: `Complete` or `Failed` once the Job has that condition.
        reason: the condition's reason and message.
    """

    meta: Meta
    released: datetime | None
    restartable: bool
    queued: bool
    paused: bool
    cancelled: bool
    asked_to_suspend: bool
    suspended: bool
    active: int
    ended: int
    failed_first: bool
    outcome: str | None
    reason: str
    confirmed: bool
    caught_up: bool
    watch: str | None
    watched: bool
    idle: bool
    stop_observed: bool
    pods: tuple[PodView, ...] = ()

    @classmethod
    def of(
        cls,
        manifest: Json,
        pods: tuple[PodView, ...],
        *,
        confirmed: bool = False,
        caught_up: bool = False,
        watch: str | None = None,
        watched: bool = False,
        stop_observed: bool = False,
    ) -> "WorkloadView":
        """View a Kubernetes Job and its pods."""
        annotations = manifest["metadata"].get("annotations") or {}
        spec, status = manifest.get("spec") or {}, manifest.get("status") or {}
        released = annotations.get(RELEASED)
        true = {c["type"]: c for c in status.get("conditions") or [] if c.get("status") == "True"}
        outcome = next((kind for kind in ("Complete", "Failed") if kind in true), None)
        condition = true.get(outcome or "", {})
        active = status.get("active") or 0
        leaving = status.get("terminating") or 0
        return cls(
            meta=Meta.of(manifest),
            released=_time_of(released) if released is not None else None,
            restartable=spec.get("backoffLimitPerIndex") is not None,
            queued=QUEUE_NAME in (manifest["metadata"].get("labels") or {}),
            paused=PAUSED in annotations,
            cancelled=CANCELLED in annotations,
            asked_to_suspend=bool(spec.get("suspend")),
            suspended="Suspended" in true and active == 0 and leaving == 0,
            active=active,
            ended=_ended(status),
            failed_first=_begins_with_zero(status.get("failedIndexes") or ""),
            outcome=outcome,
            reason=": ".join(filter(None, (condition.get("reason"), condition.get("message")))),
            confirmed=confirmed,
            caught_up=caught_up,
            watch=watch,
            watched=watched,
            idle=not any(status.get(count) for count in POD_COUNTS),
            stop_observed=stop_observed,
            pods=pods,
        )

    @property
    def over(self) -> bool:
        """No pod of it runs or will run: the Job ended, or was suspended after its release.

        A Job's status lags behind its spec: right after the release it still says `Suspended`.
        Where it may go on, a suspension is no end: by the operator for a while, or by Kueue, which
        wants the GPUs for somebody else.
        """
        if any(pod.alive for pod in self.pods):
            return False
        goes_on = self.restartable and (self.paused or self.queued) and not self.cancelled
        stopped = self.released and self.asked_to_suspend and self.suspended and not goes_on
        return self.outcome is not None or bool(stopped)

    @property
    def starts(self) -> int:
        """How often its pods were let run, at most: a generation counts changes of the spec.

        It is created suspended, and every start is a change, as is every suspension before another.
        Other changes count as well: Kueue restores the template where it stops a Job.
        """
        return self.meta.generation // 2

    @property
    def untouched(self) -> bool:
        """Nobody ever let its pods run: nothing of its spec changed since it was made suspended."""
        return self.asked_to_suspend and self.meta.generation == 1

    @property
    def podless(self) -> bool:
        """No pod of it is known, and none can have ended and be forgotten.

        As long as a Job is not suspended, each pod that ends is counted before it may go, but for
        disrupted ones where failed ones are replaced.
        """
        started_once = self.released is not None and self.meta.generation <= 2
        forgets = self.restartable or self.asked_to_suspend
        return started_once and self.idle and not self.pods and not forgets

    @property
    def all_pods_known(self) -> bool:
        """No pod of a Job that is over can have gone unseen, nor that of any start of it."""
        made_all = self.outcome is not None or self.stop_observed
        return self.watched and self.caught_up and made_all

    @property
    def may_have_run(self) -> bool:
        """Whether anybody let its pods run, the operator or not."""
        return (
            self.released is not None
            or not self.asked_to_suspend
            or self.active > 0
            or self.ended > 0
            or len(self.pods) > 0
        )

    @property
    def first_pods(self) -> tuple[PodView, ...]:
        """The pods of completion index 0, in which rank 0 lives, in the order of their creation."""
        pods = [pod for pod in self.pods if pod.index == 0]
        return tuple(sorted(pods, key=lambda pod: (pod.created, pod.failures)))

    @property
    def restarts(self) -> int:
        """How often a pod that had started was followed by another, at the index with most."""
        started = [pod.index for pod in self.pods if pod.may_have_started]
        return max((started.count(index) for index in set(started)), default=1) - 1


def _time_of(mark: str) -> datetime:
    """When a mark was set; long ago where somebody wrote into it."""
    try:
        return parse_time(mark)
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)


def stop_was_observed(before: Json, now: Json, *, already: bool) -> bool:
    """Whether the Job controller has acted upon the suspension that the later of two states shows.

    Its status lags behind the spec: it may say `Suspended` of the time before a start that the
    controller will still make pods for. So it counts only where it was seen to become true, with
    no start since.

    Args:
        before: the Job's state that was seen before.
        now: the one that is seen now.
        already: the suspension that `before` shows was observed.
    """
    changes = now["metadata"].get("generation", 0) - before["metadata"].get("generation", 0)
    if changes > 1 or not (now.get("spec") or {}).get("suspend"):
        return False
    return already or (_says_suspended(now) and not _says_suspended(before))


def _says_suspended(manifest: Json) -> bool:
    conditions = (manifest.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Suspended" and c.get("status") == "True" for c in conditions)


def _ended(status: Json) -> int:
    uncounted = status.get("uncountedTerminatedPods") or {}
    return sum(
        (status.get(how) or 0) + len(uncounted.get(how) or ()) for how in ("succeeded", "failed")
    )


def _begins_with_zero(indexes: str) -> bool:
    """Whether a list such as `0-2,4` has index 0 in it."""
    return re.match(r"0(?![0-9])", indexes) is not None


@dataclass(frozen=True)
class Snapshot:
    """Everything that a round may look at.

    Attributes:
        blocks: by (namespace, name).
        jobs: by uid.
        workloads: Kubernetes Jobs by the uid of the DPMoEJob that they run.
        prepared: uids of DPMoEJobs whose launched objects are all known to exist.
        marked: uids of DPMoEJobs whose later pods are known to see that there was an earlier one.
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
    marked: frozenset[str] = frozenset()
    launch_errors: Mapping[str, str] = field(default_factory=dict)
    progress: Mapping[str, Progress] = field(default_factory=dict)
    unserved: Mapping[str, str] = field(default_factory=dict)
