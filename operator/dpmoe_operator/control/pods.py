"""What the operator sees of a trainer pod, and what of that proves that its container never ran."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from dpmoe_operator.control.times import parse_time

Json = Mapping[str, Any]

COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
INDEX_FAILURES = "batch.kubernetes.io/job-index-failure-count"
INDEX_DISRUPTIONS = "batch.kubernetes.io/job-index-ignored-failure-count"
TRACKING = "batch.kubernetes.io/job-tracking"
"""Finalizer of a Job's pods, until the Job controller has counted how they ended."""

ANSWERED = ("EvictionByEvictionAPI", "PreemptionByScheduler", "TerminationByKubelet")
"""Reasons of disruptions that the node's kubelet carries out and has the last word on. Others, such
as `DeletionByTaintManager` and `DeletionByPodGC`, come where the node was not heard any more: what
its kubelet said before is stale, and after a reboot it may say only what it can still find."""
LOST = "ContainerStatusUnknown"
"""Reason that a kubelet gives for the end of a container that it cannot find."""
REJECTED = "Pod was rejected: "
"""How the message of a pod begins that the kubelet of its node did not admit."""


@dataclass(frozen=True)
class PodView:
    """A trainer pod, alive or as it was last seen before it was deleted.

    Attributes:
        index: its completion index, which is its rank's node.
        scheduled: a node had been chosen.
        may_have_started: nothing proves that its container never ran.
        never_found: it ended, and the kubelet found no container of it. That alone proves nothing,
            since a container that ran may be lost; see `following`.
        heard_of: its node's kubelet has said something about it.
        rejected: its node's kubelet did not admit it. That alone proves nothing, since a kubelet
            that starts again may reject what it admitted before.
        ended: all of its containers have ended, for good.
        exit_code: of the trainer container, once it ended.
        message: its termination message, once it ended.
        ended_by: what ended it, where the kubelet has a name for that, e.g. `OOMKilled`, `Evicted`.
        waiting: why its container does not run yet, e.g. `ErrImagePull: no such image`, or
            `Unschedulable: 0/2 nodes are available`.
        failures: pods of its index that failed or were disrupted before it, since the Job last
            started, by Kubernetes' own count.
        witnessed: it was seen before it ended, and the watch brought all that came after that. So
            nothing that followed it went unseen, as far as the watch has come.
        tracked: the Job controller will count how it ends.
        let_go: it lived when the Job controller had given up counting it, which it does to suspend
            the Job. So nothing followed it before the Job was started again.
    """

    uid: str
    index: int
    created: datetime
    failures: int
    witnessed: bool
    tracked: bool
    let_go: bool
    gone: bool
    scheduled: bool
    may_have_started: bool
    never_found: bool
    heard_of: bool
    rejected: bool
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
            created=parse_time(meta["creationTimestamp"]),
            failures=sum(_count(meta, key) for key in (INDEX_FAILURES, INDEX_DISRUPTIONS)),
            witnessed=not gone and status.get("phase") not in ("Succeeded", "Failed"),
            tracked=TRACKING in (meta.get("finalizers") or ()),
            let_go=False,
            gone=gone,
            scheduled=scheduled,
            may_have_started=scheduled and not _never_started(status, containers, gone),
            never_found=_never_found(status, states),
            heard_of=bool(status.get("startTime") or containers),
            rejected=_rejected(status, containers),
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
        kubelet's last word. Whoever saw it wait until then knows that nothing ran. So does who saw
        it rejected as the first thing that its kubelet said.
        """
        if earlier is None:
            return self
        seen = replace(
            self,
            witnessed=self.witnessed or earlier.witnessed,
            let_go=earlier.let_go or (self.alive and earlier.tracked and not self.tracked),
        )
        if earlier.may_have_started == self.may_have_started:
            return seen
        if earlier.may_have_started:
            return replace(seen, may_have_started=True)
        at_first = self.rejected and (earlier.rejected or not earlier.heard_of)
        return replace(seen, may_have_started=not (self.never_found or at_first))

    @property
    def alive(self) -> bool:
        """Whether it runs or may still run."""
        return not (self.gone or self.ended)


def _index(meta: Json) -> int:
    """A pod that hides its index counts as one that ran as rank 0."""
    text = (meta.get("annotations") or {}).get(COMPLETION_INDEX, "")
    return int(text) if text.isdecimal() else 0


def _count(meta: Json, key: str) -> int:
    text = (meta.get("annotations") or {}).get(key, "")
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
    if gone or _is_cut_off(status):
        # Deleted past the kubelet, whose last word says how a pod ended: this one may be stale.
        return False
    return all(
        "waiting" in (container.get("state") or {})
        and not container.get("lastState")
        and not container.get("restartCount")
        for container in containers
    )


def _is_cut_off(status: Json) -> bool:
    """Whether a pod was given up without a word of its kubelet."""
    return any(
        c.get("type") == "DisruptionTarget" and c.get("reason") not in ANSWERED
        for c in status.get("conditions") or []
    )


def _never_found(status: Json, states: list[Any]) -> bool:
    """Whether the kubelet ended a pod without ever having had a container of it."""
    ends = [state.get("terminated") or {} for state in states]
    return (
        status.get("phase") == "Failed"
        and not _is_cut_off(status)
        and len(ends) > 0
        and all(
            end.get("reason") == LOST and not end.get("containerID") and not end.get("startedAt")
            for end in ends
        )
    )


def _rejected(status: Json, containers: list[Any]) -> bool:
    """Whether the kubelet ended a pod since it did not admit it to its node."""
    return (
        status.get("phase") == "Failed"
        and not containers
        and not _is_cut_off(status)
        and str(status.get("message") or "").startswith(REJECTED)
    )
