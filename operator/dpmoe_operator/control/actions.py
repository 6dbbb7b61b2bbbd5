"""What a round may do to the cluster, as values. Applying them is another room's work.

Every action may be applied twice without harm: a crash between two of them is mended by the next
round, which decides the same again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpmoe_operator.control.views import BlockView, JobView
from dpmoe_operator.launch.launching import Launch
from dpmoe_trainer.contract import JobReference


@dataclass(frozen=True)
class Prepare:
    """Create everything that a granted job needs, its Job suspended."""

    launch: Launch


@dataclass(frozen=True)
class Release:
    """Let a launched job's pods run, or hand it to Kueue, which will.

    Applies only to the version of the Job that the decision saw: whoever gave it up since wins.

    Attributes:
        queue: Kueue's LocalQueue that it waits in from now on; None to start it at once.
        again: it ran before, and goes on.
        watch: the watch that will tell of all of its pods, if nobody let them run before.
    """

    job_uid: str
    namespace: str
    name: str
    resource_version: str
    queue: str | None = None
    again: bool = False
    watch: str | None = None


@dataclass(frozen=True)
class Pause:
    """Suspend a job whose DPMoEJob is suspended: its pods save themselves and end, its grant stays.

    Applies only to the version of the Job that the decision saw.
    """

    job_uid: str
    namespace: str
    name: str
    resource_version: str


@dataclass(frozen=True)
class MarkStarted:
    """Say to later pods of a run that there was an earlier one.

    Attributes:
        job: the DPMoEJob.
        owner: name and uid of the Kubernetes Job.
    """

    job: JobReference
    namespace: str
    owner: tuple[str, str]


@dataclass(frozen=True)
class Stop:
    """Give up a job for good: suspend it, so that its pods end and it is settled.

    Attributes:
        resource_version: where a `watch` is given, the only version of the Job to which it applies.
        watch: the watch that tells of all of its pods, if that version shows that it had none.
    """

    job_uid: str
    namespace: str
    name: str
    resource_version: str
    watch: str | None = None


@dataclass(frozen=True)
class Remove:
    """Delete a Kubernetes Job that has no open grant and no DPMoEJob, and with it what it owns."""

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True)
class DeleteJob:
    """Delete a DPMoEJob whose time to live after its end is over, unless it changed meanwhile."""

    namespace: str
    name: str
    uid: str
    resource_version: str


@dataclass(frozen=True)
class SetStatus:
    """Write the status of a block or job whose status changed, and say so in an event.

    Applies only to the version that the decision saw: an older view never overwrites a newer one's.

    Attributes:
        plural: `privateblocks` or `dpmoejobs`.
        patch: merge patch of the status; fields that vanished are None.
        event: (type, reason, message) where the reason changed, else None.
    """

    plural: str
    kind: str
    namespace: str
    name: str
    uid: str
    resource_version: str
    patch: Mapping[str, Any]
    event: tuple[str, str, str] | None


def status_write(
    plural: str, kind: str, view: JobView | BlockView, new: Mapping[str, Any], *, whole: bool = True
) -> SetStatus | None:
    """The write of a status that differs from the stored one; None where it does not.

    Args:
        plural: plural name of the resource.
        kind: its kind.
        view: the object, with the status that is stored.
        new: the fields of the status.
        whole: whether `new` is all of it, so that other fields go.
    """
    old = view.status
    patch: dict[str, Any] = {key: value for key, value in new.items() if old.get(key) != value}
    if whole:
        patch |= {key: None for key in old if key not in new}
    if not patch:
        return None
    event = None
    # Thousands may wait, and their reasons change with every grant: their statuses say it.
    waits = new.get("state") in (None, "Pending") and old.get("state") in (None, "Pending")
    if new.get("reason") and new.get("reason") != old.get("reason") and not waits:
        bad = new.get("state") in ("Rejected", "Failed", "Refused", "Frozen")
        event = ("Warning" if bad else "Normal", new["reason"], new.get("message", ""))
    meta = view.meta
    return SetStatus(
        plural, kind, meta.namespace, meta.name, meta.uid, meta.resource_version, patch, event
    )


Action = Prepare | Release | Pause | MarkStarted | Stop | Remove | DeleteJob | SetStatus
