"""What a round may do to the cluster, as values. Applying them is another room's work.

Every action may be applied twice without harm: a crash between two of them is mended by the next
round, which decides the same again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpmoe_operator.launch.manifests import Launch


@dataclass(frozen=True)
class Prepare:
    """Create everything that a granted job needs, its Job suspended."""

    launch: Launch


@dataclass(frozen=True)
class Release:
    """Let a launched job's pods run, once and for ever.

    Applies only to the version of the Job that the decision saw: whoever gave it up since wins.
    """

    job_uid: str
    namespace: str
    name: str
    resource_version: str


@dataclass(frozen=True)
class Stop:
    """Give up a job whose DPMoEJob is gone: suspend it, so that its pods end and it is settled."""

    job_uid: str
    namespace: str
    name: str


@dataclass(frozen=True)
class Remove:
    """Delete a Kubernetes Job that has no open grant and no DPMoEJob, and with it what it owns."""

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True)
class DeleteJob:
    """Delete a DPMoEJob whose time to live after its end is over."""

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True)
class SetStatus:
    """Write the status of a block or job whose status changed, and say so in an event.

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
    patch: Mapping[str, Any]
    event: tuple[str, str, str] | None


Action = Prepare | Release | Stop | Remove | DeleteJob | SetStatus
